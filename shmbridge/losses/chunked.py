"""A loss over chunks of rows, as one node of the autograd graph.

    forward     for each chunk:  logits of both sides -> losses and their gradient by the student's logits
                                 -> into the gradients of the student's inputs; the chunk is dropped
    backward    the gradients times grad_output

The gradient is made in the forward, while the chunk's logits are there, so that neither side's logits nor anything of
their size has to live until the backward. Prior art: Liger-Kernel's fused linear losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shmbridge.losses.divergence import TEMPORARIES, LossAndGradient, TopK
from shmbridge.losses.rows import Rows, Source, as_dtensor, chunks, flat, read, ready
from shmbridge.losses.student import Gradients, Student

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

CHUNK_BYTES = 128 << 20
"""What the temporaries of a chunk may take together, unless `chunk_rows` says otherwise."""

Piece = tuple[slice, Source]
"""Consecutive positions and what the teacher has for them."""


@dataclass
class Task:
    """One call of a loss, checked."""

    student: Callable[[Tensor, Tensor | None, Tensor | None], Student]  # from the node's inputs, without autograd
    pieces: Iterator[Piece]
    mask: Tensor | None  # (rows,) bool
    formula: Callable[[Tensor, Any, float, Tensor | None], LossAndGradient]
    temperature: float
    wants_gradient: bool
    chunk_rows: int
    num_items: float | Tensor

    def run(self, student: Student, weight: Tensor | None) -> Tensor:
        """The sum of the rows' losses. The student has taken their gradients, times `weight`, unless that is None."""
        total = torch.zeros((), dtype=student.dtype, device=student.device)
        for span, teacher in self.pieces:
            with torch.autocast(student.device.type, enabled=False):
                source = ready(teacher, student.dtype, student.device)
                for ours, theirs in chunks(self.mask, span, self.chunk_rows):
                    rows = read(source, theirs, student.dtype, student.device)
                    total += self._chunk(student, ours, rows, weight)
        return total

    def _chunk(self, student: Student, rows: Rows, teacher: Tensor | TopK, weight: Tensor | None) -> Tensor:
        losses, gradient = self.formula(student.logits(rows), teacher, self.temperature, weight)
        if gradient is not None:
            student.add(rows, gradient)
        return losses.sum()


class ChunkedLoss(torch.autograd.Function):
    """apply(task, source, weight, bias): the scalar loss. `source` is the student's logits or hidden states."""

    @staticmethod
    def forward(ctx: Any, task: Task, *inputs: Tensor | None) -> Tensor:
        source, weight, bias = (None if tensor is None else tensor.detach() for tensor in inputs)
        assert source is not None
        student = task.student(source, weight, bias)
        inverse = torch.as_tensor(task.num_items, dtype=student.dtype, device=student.device).reshape(()).reciprocal()
        # In float16 the division waits for the loss scaling, which then saves from underflow what it is there to save.
        now = torch.ones_like(inverse) if student.rounds_to == torch.float16 else inverse
        total = task.run(student, now if task.wants_gradient else None)
        ctx.inputs = [None if tensor is None else _Input.of(tensor) for tensor in (source, weight, bias)]
        ctx.save_for_backward(inverse / now, *student.gradients())
        return total * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, *Gradients]:
        later, *gradients = ctx.saved_tensors
        scale = grad_output * later
        kept = _graph_is_kept()
        found = [
            None if gradient is None else _finished(gradient, scale, made_for, kept)
            for gradient, made_for in zip(gradients, ctx.inputs, strict=True)
        ]
        return None, found[0], found[1], found[2]


def default_chunk_rows(vocab: int, dtype: torch.dtype, head_dim: int | None) -> int:
    """Rows whose temporaries fit CHUNK_BYTES.

    Under a head whose gradient is accumulated (`head_dim` is not None), at least so many that the temporaries weigh as
    much as that gradient: fewer would save little, and every chunk reads and writes the whole of it.
    """
    fitting = CHUNK_BYTES // (vocab * dtype.itemsize * TEMPORARIES)
    return max(1, fitting, 0 if head_dim is None else head_dim // TEMPORARIES)


@dataclass
class _Input:
    """What a gradient has to be like. `mesh` and `placements` are those of a DTensor."""

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

    torch tells this nowhere in public; without the function the answer costs memory, never correctness.
    """
    told = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return told is None or bool(told())
