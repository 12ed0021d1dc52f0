"""The student of a loss: it returns the logits of a few rows, takes their gradient, and accumulates the gradients of
its inputs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from shmbridge.head import Head
from shmbridge.losses.sources import Rows, flat, put, ready_head, take

Wanted = tuple[bool, bool, bool]
"""Which gradients autograd asks for: of the logits or hidden states, the head's weight, its bias."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Student(Protocol):
    """The interface that the loop over chunks uses."""

    device: torch.device
    dtype: torch.dtype
    """What the loss is computed in: float64 for float64 logits, else float32."""
    rounds_to: torch.dtype
    """What the gradient of the logits is rounded to."""

    def logits(self, rows: Rows) -> Tensor:
        """(r, vocab) in `dtype`; the caller may overwrite them."""

    def add(self, rows: Rows, gradient: Tensor) -> None:
        """Add the gradient (r, vocab) with respect to the logits last returned, for the same rows. It may be
        overwritten."""

    def gradients(self) -> Gradients:
        """The gradients of the inputs, in the order of Wanted; the head's are float32 or float64, whatever its
        dtype."""


class GivenLogits:
    """Logits (..., vocab) that exist already. Their gradient has their dtype, and is written over them if `inplace`."""

    def __init__(self, logits: Tensor, wanted: Wanted, mask: Tensor | None, inplace: bool) -> None:
        self._whole = logits
        self._logits = flat(logits)
        self.device, self.dtype, self.rounds_to = logits.device, computed_in(logits.dtype), logits.dtype
        self._gradient: Tensor | None = None
        if wanted[0] and inplace:
            self._gradient = self._logits
            self._left_out = None if mask is None else ~mask.view(logits.shape[:-1]).unsqueeze(-1)
        elif wanted[0]:
            self._gradient = _blank(logits, mask)

    def logits(self, rows: Rows) -> Tensor:
        return take(self._logits, rows).to(self.dtype, copy=True)

    def add(self, rows: Rows, gradient: Tensor) -> None:
        assert self._gradient is not None
        put(self._gradient, rows, _rounded(gradient, self._gradient.dtype))

    def gradients(self) -> Gradients:
        if self._gradient is None:
            return None, None, None
        if self._gradient is not self._logits:
            return self._gradient.view(self._whole.shape), None, None
        if self._left_out is not None:
            self._whole.masked_fill_(self._left_out, 0.0)
        return self._whole, None, None


class ProjectedLogits:
    """Hidden states (..., dim) under a head: logits and their gradient exist for one chunk only."""

    def __init__(self, hidden: Tensor, head: Head, wanted: Wanted, mask: Tensor | None, matmul_in: torch.dtype) -> None:
        self._whole = hidden
        self._hidden = flat(hidden)
        self._head = ready_head(head, matmul_in)
        self.device, self.dtype, self.rounds_to = hidden.device, computed_in(matmul_in), matmul_in
        self._capped: Tensor | None = None
        self._of_hidden, self._of_weight, self._of_bias = (
            _blank(hidden, mask) if wanted[0] else None,
            torch.zeros_like(self._head.weight, dtype=self.dtype) if wanted[1] else None,
            torch.zeros_like(self._head.weight[:, 0], dtype=self.dtype) if wanted[2] else None,
        )

    def logits(self, rows: Rows) -> Tensor:
        logits = self._head(self._inputs(rows))
        if self._head.softcap is None:
            return logits.to(self.dtype)
        self._capped = logits
        return logits.to(self.dtype, copy=True)

    def add(self, rows: Rows, gradient: Tensor) -> None:
        head = self._head
        if head.softcap is not None and self._capped is not None:
            slope = self._capped.to(self.dtype, copy=True).div_(head.softcap).square_().neg_().add_(1.0)
            gradient.mul_(slope)
            self._capped = None
        if head.scale != 1.0:
            gradient.mul_(head.scale)
        if self._of_bias is not None:
            self._of_bias += gradient.sum(0)
        gradient = _rounded(gradient, head.weight.dtype)
        if self._of_hidden is not None:
            put(self._of_hidden, rows, (gradient @ head.weight).to(self._of_hidden.dtype))
        if self._of_weight is not None:
            _add_product(self._of_weight, gradient, self._inputs(rows))

    def gradients(self) -> Gradients:
        of_hidden = None if self._of_hidden is None else self._of_hidden.view(self._whole.shape)
        return of_hidden, self._of_weight, self._of_bias

    def _inputs(self, rows: Rows) -> Tensor:
        return take(self._hidden, rows).to(self._head.weight.dtype)


def make_student(
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    head: Head | None,
    wanted: Wanted,
    mask: Tensor | None,
    inplace: bool,
    matmul_in: torch.dtype,
) -> Student:
    """The student of the autograd node's inputs, detached. `head` turns hidden states into logits; None if the input is
    logits."""
    if head is None or weight is None:
        return GivenLogits(source, wanted, mask, inplace)
    return ProjectedLogits(source, Head(weight, bias, head.softcap, head.scale), wanted, mask, matmul_in)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss over logits of `dtype` is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which nn.Linear would multiply: the autocast dtype if autocast is on, else that of the hidden
    states."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _blank(like: Tensor, mask: Tensor | None) -> Tensor:
    """An empty (rows, width) tensor for the gradient of `like`; zeros if a mask may leave rows out."""
    make = torch.empty if mask is None else torch.zeros
    return make((like.shape[:-1].numel(), like.shape[-1]), dtype=like.dtype, device=like.device)


def _rounded(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype`; float16 saturates instead of becoming infinite."""
    if dtype == torch.float16:
        gradient.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return gradient.to(dtype)


def _add_product(total: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """total (vocab, dim) += gradient.T @ inputs. Half-precision products are added in blocks of the chunk's size."""
    if inputs.dtype == total.dtype:
        total.addmm_(gradient.T, inputs)
        return
    block = max(1, gradient.numel() // total.shape[1])
    for part, columns in zip(torch.split(total, block), torch.split(gradient, block, dim=1), strict=True):
        part += columns.T @ inputs
