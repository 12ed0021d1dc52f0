"""A loss over chunks of rows, as one node of the autograd graph.

    forward     for each chunk:  the student's logits, once -> each term's losses and their gradient by these logits
                                 -> into the gradients of the student's inputs; the chunk is dropped
    backward    the gradients times grad_output

The gradient is computed in the forward, while the chunk's logits exist, so that no tensor of the logits' size has to be
kept until the backward. Prior art: Liger-Kernel's fused linear losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shmbridge.losses.divergence import TEMPORARIES, LossAndGradient
from shmbridge.losses.sources import (
    LazyLogits,
    Rows,
    Source,
    among,
    as_dtensor,
    chunks,
    flat,
    plain,
    read,
    ready,
    shape,
)
from shmbridge.losses.student import Gradients, Student, Wanted, computed_in, make_student, matmul_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

CHUNK_BYTES = 128 << 20
"""What the temporaries of a chunk may take together, unless `chunk_rows` says otherwise."""

Piece = tuple[slice, Source]
"""Consecutive positions and what the teacher has for them."""


@dataclass
class Term:
    """One summand of a loss: a divergence from the teacher, or the cross entropy with targets."""

    formula: Callable[[Tensor, Any, Tensor | None], LossAndGradient]
    weight: float  # 0: only the term's value is computed
    mask: Tensor | None  # (rows,) bool on the student's device, the rows that the term is summed over; None: all
    num_items: float | Tensor | None  # what the sum is divided by; None: those rows

    def divisor(self, student: Student, rows: int) -> Tensor:
        """() in the student's dtype; `rows` is how many the student has."""
        items = self.num_items
        if items is None:
            items = max(1, rows) if self.mask is None else self.mask.sum().clamp(min=1)
        return torch.as_tensor(items, dtype=student.dtype, device=student.device).reshape(())


@dataclass
class Task:
    """One call of a loss, checked."""

    student: Callable[[Tensor, Tensor | None, Tensor | None], Student]  # from the node's inputs, without autograd
    terms: list[Term]
    pieces: Iterator[tuple[slice, list[Source]]]  # consecutive positions and what each term compares them with
    mask: Tensor | None  # (rows,) bool, the rows of any term
    wants_gradient: bool  # then one of the terms has a weight
    chunk_rows: int

    def run(self, student: Student, scales: list[Tensor | None]) -> Tensor:
        """(terms,): the sum of each term's losses. The student has taken the gradient of each times its scale, where
        that is not None."""
        totals = torch.zeros(len(self.terms), dtype=student.dtype, device=student.device)
        for span, sources in self.pieces:
            with torch.autocast(student.device.type, enabled=False):
                prepared = [ready(source, student.dtype, student.device) for source in sources]
                for ours, theirs in chunks(self.mask, span, self.chunk_rows):
                    totals += torch.stack(self._chunk(student, ours, theirs, prepared, scales))
        return totals

    def _chunk(
        self, student: Student, ours: Rows, theirs: Rows, sources: list[Source], scales: list[Tensor | None]
    ) -> list[Tensor]:
        logits = student.logits(ours)
        size, sums, gradient = logits.shape, list[Tensor](), None
        for term, source, scale in zip(self.terms, sources, scales, strict=True):
            chosen = self._chosen(term, ours)
            rows = theirs if chosen is None else among(theirs, chosen)
            own = logits if chosen is None else logits[chosen]
            if len(sums) == len(sources) - 1:
                del logits  # the last term may overwrite them
            elif chosen is None:
                own = logits.clone()
            losses, part = term.formula(own, read(source, rows, student.dtype, student.device), scale)
            sums.append(losses.sum())
            if part is not None and chosen is not None:
                gradient = part.new_zeros(size) if gradient is None else gradient
                gradient.index_add_(0, chosen, part)
            elif part is not None:
                gradient = part if gradient is None else gradient.add_(part)
        if gradient is not None:
            student.add(ours, gradient)
        return sums

    def _chosen(self, term: Term, rows: Rows) -> Tensor | None:
        """Which of a chunk's rows are the term's, counted from the chunk's first; None: all."""
        if term.mask is None or term.mask is self.mask:
            return None
        chosen = term.mask[rows].nonzero().squeeze(-1)
        return None if len(chosen) == len(term.mask[rows]) else chosen


class ChunkedLoss(torch.autograd.Function):
    """apply(task, source, weight, bias): the scalar loss, and (terms,) the terms, unweighted and without a gradient.

    `source` is the student's logits or hidden states.
    """

    @staticmethod
    def forward(ctx: Any, task: Task, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        source, weight, bias = (None if tensor is None else tensor.detach() for tensor in inputs)
        assert source is not None
        student = task.student(source, weight, bias)
        rows = source.shape[:-1].numel()
        inverses = [term.divisor(student, rows).reciprocal() for term in task.terms]
        scales = [term.weight * inverse for term, inverse in zip(task.terms, inverses, strict=True)]
        # In float16 the division waits for the loss scaling, which then saves from underflow what it is there to save.
        later = torch.stack(scales).max() if student.rounds_to == torch.float16 else torch.ones_like(scales[0])
        now = [
            scale / later if task.wants_gradient and term.weight else None
            for term, scale in zip(task.terms, scales, strict=True)
        ]
        sums = task.run(student, now)
        weighted = [scale * total for term, scale, total in zip(task.terms, scales, sums, strict=True) if term.weight]
        terms = sums * torch.stack(inverses)
        ctx.inputs = [None if tensor is None else _Input.of(tensor) for tensor in (source, weight, bias)]
        ctx.save_for_backward(later, *student.gradients())
        ctx.mark_non_differentiable(terms)
        return torch.stack(weighted).sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[None, *Gradients]:
        later, *gradients = ctx.saved_tensors
        scale = grad_output * later
        kept = _graph_is_kept()
        found = [
            None if gradient is None else _finished(gradient, scale, made_for, kept)
            for gradient, made_for in zip(gradients, ctx.inputs, strict=True)
        ]
        return None, found[0], found[1], found[2]


def run(
    student: Tensor | LazyLogits,
    terms: list[Term],
    pieces: Iterator[tuple[slice, list[Source]]],
    *,
    inplace: bool = False,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor]:
    """ChunkedLoss of a student that was checked."""
    inputs = _inputs(student)
    source = inputs[0]
    wanted: Wanted = _wants_gradient(source), _wants_gradient(inputs[1]), _wants_gradient(inputs[2])
    mask = _any_of([term.mask for term in terms])
    head_dim = source.shape[-1] if wanted[1] else None
    task = Task(
        student=partial(
            make_student,
            head=student.head if isinstance(student, LazyLogits) else None,
            wanted=wanted,
            mask=mask,
            inplace=inplace,
            matmul_in=matmul_dtype(source),
        ),
        terms=terms,
        pieces=pieces,
        mask=mask,
        wants_gradient=any(wanted),
        chunk_rows=chunk_rows
        or default_chunk_rows(shape(student)[-1], computed_in(source.dtype), head_dim, TEMPORARIES + len(terms) - 1),
    )
    loss, values = ChunkedLoss.apply(task, *inputs)  # type: ignore[no-untyped-call]
    return loss, values


def default_chunk_rows(vocab: int, dtype: torch.dtype, head_dim: int | None, temporaries: int = TEMPORARIES) -> int:
    """Rows whose temporaries, that many tensors (rows, vocab), fit CHUNK_BYTES.

    Under a head whose gradient is accumulated (`head_dim` is not None), at least so many that the temporaries weigh as
    much as that gradient: fewer would save little, and every chunk reads and writes the whole of it.
    """
    fitting = CHUNK_BYTES // (vocab * dtype.itemsize * temporaries)
    return max(1, fitting, 0 if head_dim is None else head_dim // temporaries)


def _any_of(masks: list[Tensor | None]) -> Tensor | None:
    """The rows that any of the masks includes; None, which is all, if one of them is None."""
    joint = masks[0]
    for mask in masks[1:]:
        if joint is None or mask is None:
            return None
        joint = joint if mask is joint else joint | mask
    return joint


def _inputs(student: Tensor | LazyLogits) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The inputs that autograd sees: logits or hidden states, the head's weight and bias. Sharded activations are
    gathered."""
    if isinstance(student, LazyLogits):
        head = student.head
        return plain(student.hidden).to(head.weight.device), head.weight, head.bias
    return plain(student), None, None


def _wants_gradient(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


@dataclass
class _Input:
    """What a gradient has to match. `mesh` and `placements` are a DTensor's."""

    dtype: torch.dtype
    mesh: DeviceMesh | None = None
    placements: Sequence[Placement] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> _Input:
        sharded = as_dtensor(tensor)
        if sharded is None:
            return cls(tensor.dtype)
        return cls(tensor.dtype, sharded.device_mesh, sharded.placements)


def _finished(gradient: Tensor, scale: Tensor, like: _Input, kept: bool) -> Tensor:
    """`scale` times the gradient in the input's dtype, in its own memory where dtype and graph allow.

    For a sharded parameter: the mean over its mesh, sharded alike, which is what FSDP makes of a gradient.
    """
    if like.mesh is None:
        return _scaled(gradient, scale, like.dtype, kept)
    from torch.distributed.tensor import DTensor, Partial

    mine = _scaled(gradient, scale / like.mesh.size(), gradient.dtype, kept)
    whole = DTensor.from_local(mine, like.mesh, [Partial()] * like.mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements).to(like.dtype)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, kept: bool) -> Tensor:
    """A block at a time, through the scale's precision: half-precision tensors would round the scale first."""
    into = torch.empty_like(gradient, dtype=dtype) if kept or dtype != gradient.dtype else gradient
    size = CHUNK_BYTES // (scale.dtype.itemsize * TEMPORARIES)
    for source, target in zip(_blocks(gradient, size), _blocks(into, size), strict=True):
        torch.mul(source.to(scale.dtype), scale, out=target)
    return into


def _blocks(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Views of some `size` elements each, which cover the tensor."""
    if tensor.ndim < 2:
        yield tensor
        return
    whole = flat(tensor)
    if whole.ndim == 2:
        yield from torch.split(whole, max(1, size // whole.shape[1]))
        return
    for part in tensor:
        yield from _blocks(part, size)


def _graph_is_kept() -> bool:
    """True where a second backward may follow (retain_graph=True), which needs the gradients as they are.

    torch has no public function for this. Where the private one is missing, the answer is True, which costs memory
    only.
    """
    told = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return told is None or bool(told())
