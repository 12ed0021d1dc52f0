"""The losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from shmbridge.losses import divergence
from shmbridge.losses.checks import check_mask, check_settings, check_student, check_weights, check_words, pieces
from shmbridge.losses.chunked import Term, run
from shmbridge.losses.divergence import LossAndGradient, Targets, TopK
from shmbridge.losses.labels import IGNORE_INDEX
from shmbridge.losses.sources import LazyLogits, Source, device_of

F = TypeVar("F", bound=Callable[..., Any])
Logits = Tensor | LazyLogits
Stream = Iterable[tuple[slice, Logits]]
"""The teacher's rows as they arrive: consecutive slices over the flattened positions, from 0 to the last."""
TopKStream = Iterable[tuple[slice, TopK]]


class DistillationLoss(NamedTuple):
    """What `distillation_loss` returns: scalars, float64 for float64 logits and float32 otherwise.

    loss: kd_weight * kd + ce_weight * ce, with the gradient.
    kd: the divergence from the teacher, summed over its rows and divided by num_items; detached; 0 without a teacher.
    ce: the cross entropy with the targets, likewise; 0 without targets.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor


def _not_compiled(function: F) -> F:
    """Leave `function` out of torch.compile: the rows that a mask lets in are data."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]


@_not_compiled
def distillation_loss(
    student: Logits,
    teacher: Logits | TopK | Stream | TopKStream | None,
    *,
    loss: Literal["forward_kl", "reverse_kl", "jsd", "topk"] | str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    targets: Tensor | None = None,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    chunk_rows: int | None = None,
) -> DistillationLoss:
    """kd_weight * divergence from the teacher + ce_weight * cross entropy with the targets.

    Both come from one pass over the student's rows: a row's logits are computed once.

    Args:
        student: logits (..., vocab) of at least two dimensions, or LazyLogits; float64, float32, bfloat16 or float16.
        teacher: logits or LazyLogits of the same positions and vocabulary, or a TopK of the same positions, in a float
            dtype of its own; never gets a gradient. It may lie on another device: a chunk at a time is moved. A stream
            gives it piecewise. None: cross entropy alone.
        loss: the divergence, as the function of that name: "forward_kl", "reverse_kl", "jsd" (`generalized_jsd`), or
            "topk" (`topk_kl`), which takes a TopK.
        temperature: T of the divergence; both sides' logits are divided by it. Cross entropy is at temperature 1.
        beta: of "jsd".
        kd_weight, ce_weight: 0 or more, not both 0. A term of weight 0 is computed for its value alone.
        targets: (...) int64 or int32, the next token of each row, such as `targets_from_labels(labels)` gives; -100: no
            cross entropy for this row.
        mask: (...) bool or integer; the rows of the divergence. What the teacher holds in others is never read, and
            what the student holds is read for the cross entropy alone. None: all rows.
        num_items: what to divide both sums by: `count_items(...)` wherever the gradient is summed over micro-steps or
            averaged over ranks. None: each by its own rows in this call (1 if there is none).
        inplace: let the gradient overwrite the student's logits, which nobody may read afterwards.
        chunk_rows: rows computed at a time. None: as CHUNK_BYTES allow.

    Returns:
        The loss and its two terms. Without a row that counts it is 0 with a gradient of zeros.

    Raises:
        ValueError: shapes, vocabularies, dtypes or a setting do not fit; says which and what to do.
    """
    check_settings(num_items, chunk_rows, temperature=temperature, beta=beta)
    check_weights(kd_weight, ce_weight, teacher, targets)
    *lead, vocab = check_student(student, inplace)
    counted = None if mask is None else check_mask(mask, lead).to(device_of(student))
    formula = _formula(loss, temperature, beta)
    terms = []
    stream: Iterator[tuple[slice, list[Source]]] = iter([(slice(0, prod(lead)), [])])
    if teacher is not None:
        terms.append(Term(formula, kd_weight, counted, num_items))
        kind = TopK if loss == "topk" else Logits
        stream = ((rows, [piece]) for rows, piece in pieces(teacher, lead, vocab, counted, kind))
    if targets is not None:
        words = check_words("the targets", targets, lead, vocab).to(device_of(student))
        there = words != IGNORE_INDEX
        same = there.all() if counted is None else torch.equal(there, counted)  # then a chunk has no rows to pick
        terms.append(Term(divergence.cross_entropy, ce_weight, counted if same else there, num_items))
        stream = ((rows, [*sources, Targets(words[rows].unsqueeze(-1))]) for rows, sources in stream)
    total, values = run(student, terms, stream, inplace=inplace, chunk_rows=chunk_rows)
    zero = torch.zeros_like(values[0])
    return DistillationLoss(total, zero if teacher is None else values[0], zero if targets is None else values[-1])


def cross_entropy(
    student: Logits,
    targets: Tensor,
    *,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross entropy with the next tokens, one scalar, in bounded memory. Arguments as in `distillation_loss`."""
    return distillation_loss(
        student,
        None,
        ce_weight=1.0,
        targets=targets,
        num_items=num_items,
        inplace=inplace,
        chunk_rows=chunk_rows,
    ).loss


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
    """T^2 KL(teacher || student), one scalar. Arguments as in `distillation_loss`."""
    return distillation_loss(
        student,
        teacher,
        temperature=temperature,
        mask=mask,
        num_items=num_items,
        inplace=inplace,
        chunk_rows=chunk_rows,
    ).loss


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
    """T^2 KL(student || teacher). Arguments as in `distillation_loss`."""
    return distillation_loss(
        student,
        teacher,
        loss="reverse_kl",
        temperature=temperature,
        mask=mask,
        num_items=num_items,
        inplace=inplace,
        chunk_rows=chunk_rows,
    ).loss


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
    Other arguments as in `distillation_loss`.
    """
    return distillation_loss(
        student,
        teacher,
        loss="jsd",
        temperature=temperature,
        beta=beta,
        mask=mask,
        num_items=num_items,
        inplace=inplace,
        chunk_rows=chunk_rows,
    ).loss


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
    fewer words it is never above it. Other arguments as in `distillation_loss`.
    """
    return distillation_loss(
        student,
        teacher,
        loss="topk",
        temperature=temperature,
        mask=mask,
        num_items=num_items,
        inplace=inplace,
        chunk_rows=chunk_rows,
    ).loss


def _formula(loss: str, temperature: float, beta: float) -> Callable[..., LossAndGradient]:
    formulas: dict[str, Callable[..., LossAndGradient]] = {
        "forward_kl": divergence.forward_kl,
        "reverse_kl": divergence.reverse_kl,
        "jsd": {0.0: divergence.forward_kl, 1.0: divergence.reverse_kl}.get(
            beta, partial(divergence.generalized_jsd, beta=beta)
        ),
        "topk": divergence.topk_kl,
    }
    if loss not in formulas:
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(formulas)}.")
    return partial(formulas[loss], temperature=temperature)
