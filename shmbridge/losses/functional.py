"""The losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod

import torch
from torch import Tensor

from shmbridge.losses import divergence
from shmbridge.losses.checks import check_mask, check_settings, check_student, pieces
from shmbridge.losses.chunked import ChunkedLoss, Piece, Task, default_chunk_rows
from shmbridge.losses.divergence import LossAndGradient, TopK
from shmbridge.losses.rows import LazyLogits, Source, plain
from shmbridge.losses.student import computed_in, make_student, matmul_dtype

Logits = Tensor | LazyLogits
Stream = Iterable[tuple[slice, Logits]]
"""The teacher's rows as they arrive: consecutive slices over the flattened positions, from 0 to the last."""


def forward_kl(
    student: Logits,
    teacher: Logits | Stream,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """T^2 KL(teacher || student), summed over the rows of `mask` and divided by `num_items`.

    Args:
        student: logits (..., vocab) of at least two dimensions, or LazyLogits; float64, float32, bfloat16 or float16.
        teacher: the same positions and vocabulary, in a float dtype of its own; never gets a gradient. It may lie on
            another device: a chunk at a time is moved. A stream gives it piecewise.
        temperature: T; both sides' logits are divided by it.
        mask: (...) bool or integer; the rows that count. What the others hold is never read. None: all count.
        num_items: what to divide by: `count_items(...)` wherever the gradient is summed over micro-steps or averaged
            over ranks. None: the rows that count in this call (1 if none does).
        inplace: let the gradient overwrite the student's logits, which nobody may read afterwards.
        chunk_rows: rows computed at a time. None: as CHUNK_BYTES allow.

    Returns:
        A scalar, float64 for float64 logits and float32 otherwise.

    Raises:
        ValueError: shapes, vocabularies, dtypes or a setting do not fit; says which and what to do.
    """
    return _loss(divergence.forward_kl, student, teacher, temperature, mask, num_items, inplace, chunk_rows)


def reverse_kl(
    student: Logits,
    teacher: Logits | Stream,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """T^2 KL(student || teacher). Arguments as in `forward_kl`."""
    return _loss(divergence.reverse_kl, student, teacher, temperature, mask, num_items, inplace, chunk_rows)


def generalized_jsd(
    student: Logits,
    teacher: Logits | Stream,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """T^2 JSD_beta(teacher || student) of GKD (Agarwal et al. 2023, equation 1; TRL's convention).

    beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, P the teacher. Divided by beta it tends to
    forward KL as beta -> 0, divided by 1 - beta to reverse KL as beta -> 1; beta = 0 and beta = 1 are these limits.
    Other arguments as in `forward_kl`.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; expected 0 (forward KL) to 1 (reverse KL).")
    formula = {0.0: divergence.forward_kl, 1.0: divergence.reverse_kl}.get(
        beta, partial(divergence.generalized_jsd, beta=beta)
    )
    return _loss(formula, student, teacher, temperature, mask, num_items, inplace, chunk_rows)


def topk_kl(
    student: Logits,
    teacher: TopK | Iterable[tuple[slice, TopK]],
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """T^2 KL(teacher || student) over k + 1 buckets: the teacher's k words, and all others as one.

    `temperature` must be the one at which the teacher took `tail_logmass`. With k = vocab this is `forward_kl`; with
    fewer words it is never above it. Other arguments as in `forward_kl`.
    """
    return _loss(divergence.topk_kl, student, teacher, temperature, mask, num_items, inplace, chunk_rows)


def _compute(
    formula: Callable[..., LossAndGradient],
    student: Logits,
    teacher: Source | Iterable[Piece],
    temperature: float,
    mask: Tensor | None,
    num_items: float | Tensor | None,
    inplace: bool,
    chunk_rows: int | None,
) -> Tensor:
    """Check everything, then run. Left out of torch.compile: the rows that a mask lets in are data."""
    check_settings(temperature, num_items, chunk_rows)
    *lead, vocab = check_student(student, inplace)
    head = student.head if isinstance(student, LazyLogits) else None
    inputs = _inputs(student)
    source = inputs[0]
    of_source, of_weight, of_bias = (_wants_gradient(tensor) for tensor in inputs)
    counted = None if mask is None else check_mask(mask, lead).to(source.device)
    dtype = computed_in(source.dtype)
    task = Task(
        formula=formula,
        temperature=temperature,
        wants_gradient=of_source or of_weight or of_bias,
        pieces=pieces(teacher, lead, vocab, counted, TopK if formula is divergence.topk_kl else Logits),
        mask=counted,
        chunk_rows=chunk_rows or default_chunk_rows(vocab, dtype, source.shape[-1] if of_weight else None),
        num_items=_items_of_this_call(counted, lead) if num_items is None else num_items,
        student=partial(
            make_student,
            head=head,
            wanted=(of_source, of_weight, of_bias),
            mask=counted,
            inplace=inplace,
            matmul_in=matmul_dtype(source),
        ),
    )
    loss: Tensor = ChunkedLoss.apply(task, *inputs)  # type: ignore[no-untyped-call]
    return loss


_loss: Callable[..., Tensor] = torch.compiler.disable(_compute)  # type: ignore[no-untyped-call]


def _wants_gradient(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def _items_of_this_call(mask: Tensor | None, lead: list[int]) -> float | Tensor:
    return max(1, prod(lead)) if mask is None else mask.sum().clamp(min=1)


def _inputs(student: Logits) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What autograd sees: logits or hidden states, the head's weight and bias. Sharded activations are gathered."""
    if isinstance(student, LazyLogits):
        head = student.head
        return plain(student.hidden).to(head.weight.device), head.weight, head.bias
    return plain(student), None, None
