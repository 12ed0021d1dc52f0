"""Rows of logits, flattened over the leading axes, computed a few at a time: the sources that a loss reads from.

Positions are counted over all leading axes: in (batch, seq, vocab), row b * seq + i follows token i of sequence b.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shmbridge.head import Head
from shmbridge.losses.divergence import Candidates, Targets, TopK

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Rows = slice | Tensor
"""Positions: a range, or an int64 tensor of them."""


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """Logits that are computed a few rows at a time, by applying `head` to rows of `hidden` (..., dim)."""

    hidden: Tensor
    head: Head


Table = TopK | Targets | Candidates
"""A few numbers or words for each row, as a named tuple of tensors."""
Source = Tensor | LazyLogits | Table


def shape(source: Tensor | LazyLogits) -> tuple[int, ...]:
    """(..., vocab)."""
    if isinstance(source, LazyLogits):
        return (*source.hidden.shape[:-1], source.head.weight.shape[0])
    return tuple(source.shape)


def device_of(student: Tensor | LazyLogits) -> torch.device:
    """Where the student's logits are."""
    return student.head.weight.device if isinstance(student, LazyLogits) else student.device


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor if it is a DTensor. Whoever made it has imported the module, which takes as long as half of torch."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def plain(tensor: Tensor) -> Tensor:
    """A DTensor whole, as every rank sees it; its gradient goes back to the shards. Anything else as it is."""
    sharded = as_dtensor(tensor)
    return tensor if sharded is None else sharded.full_tensor()


def flat(tensor: Tensor) -> Tensor:
    """(..., width) as (rows, width) where the strides allow it without a copy; otherwise as it is."""
    try:
        return tensor.view(prod(tensor.shape[:-1]), tensor.shape[-1])
    except RuntimeError:
        return tensor


def take(tensor: Tensor, rows: Rows) -> Tensor:
    """(r, width) of a `flat` tensor; a view of it where `rows` is a slice and the tensor is 2-dimensional."""
    return tensor[_index(tensor, rows)]


def put(tensor: Tensor, rows: Rows, values: Tensor) -> None:
    """Write (r, width) into a `flat` tensor."""
    tensor[_index(tensor, rows)] = values


def ready(source: Source, dtype: torch.dtype, device: torch.device) -> Source:
    """The source without autograd and flat. Its head is gathered and cast here, once, instead of for each chunk."""
    if isinstance(source, LazyLogits):
        hidden = flat(plain(source.hidden.detach()))
        return LazyLogits(hidden, ready_head(source.head, hidden.dtype))
    if isinstance(source, tuple):
        columns = [_column(tensor, source[0].ndim, dtype, device) for tensor in source]
        return type(source)(*columns)
    return flat(plain(source.detach()))


def ready_head(head: Head, dtype: torch.dtype) -> Head:
    """The head in `dtype`, gathered where it is sharded: cast first, so that less travels."""
    weight = plain(head.weight.detach().to(dtype))
    return replace(head, weight=weight, bias=None if head.bias is None else plain(head.bias.detach().to(dtype)))


def read(source: Source, rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor | Table:
    """The rows of a `ready` source: logits (r, vocab) that may be overwritten, or a table of columns (r, width)."""
    if isinstance(source, tuple):
        return type(source)(*(take(tensor, rows) for tensor in source))
    if isinstance(source, LazyLogits):
        return source.head(take(source.hidden, rows)).to(device, dtype)
    return take(source, rows).to(device, dtype, copy=True)


def chunks(mask: Tensor | None, span: slice, size: int) -> Iterator[tuple[Rows, Rows]]:
    """Positions within `span` that the mask (n,) includes, at most `size` at a time: counted from 0, and from the
    span's start.

    Other positions are never read. The mask is read once for each call, which waits for the device.
    """
    start, stop = span.start, span.stop
    if mask is not None:
        chosen = mask[span].nonzero().squeeze(-1)
        if len(chosen) < stop - start:
            yield from ((part + start, part) for part in torch.split(chosen, size) if len(part))
            return
    for first in range(start, stop, size):
        last = min(first + size, stop)
        yield slice(first, last), slice(first - start, last - start)


def among(rows: Rows, chosen: Tensor) -> Rows:
    """The entries of `rows` at the indices `chosen` (n,), which count from 0."""
    return chosen + rows.start if isinstance(rows, slice) else rows[chosen.to(rows.device)]


def _column(tensor: Tensor, ndim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, width): a tensor of one axis less than `ndim` has one number for each row."""
    tensor = plain(tensor.detach())
    tensor = flat(tensor if tensor.ndim == ndim else tensor.unsqueeze(-1))
    return tensor.to(device, dtype if tensor.is_floating_point() else torch.int64)


def _index(tensor: Tensor, rows: Rows) -> Rows | tuple[Tensor, ...]:
    if isinstance(rows, slice):
        if tensor.ndim == 2:
            return rows
        rows = torch.arange(rows.start, rows.stop)
    rows = rows.to(tensor.device)
    return rows if tensor.ndim == 2 else tuple(torch.unravel_index(rows, tensor.shape[:-1]))
