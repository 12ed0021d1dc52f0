"""The teacher's output head in shared memory: written once per session, read by every rank."""

from __future__ import annotations

import torch

from shmbridge.head import Head
from shmbridge.output_spec import HeadSpec
from shmbridge.plane import tensors
from shmbridge.shm import layout
from shmbridge.shm.session import Names, Token

_CPU = torch.device("cpu")


def spec_of(head: Head) -> HeadSpec:
    """How a head is offered. Raises PlanError for a dtype that cannot travel."""
    words, width = head.weight.shape
    dtype = tensors.dtype_name(head.weight.dtype, "the output head")
    return HeadSpec(dtype, words, width, head.bias is not None, head.softcap, head.scale)


def write(token: Token, spec: HeadSpec, head: Head) -> None:
    """Teacher 0: copy the head into its segment, which the owner has created. Raises AttachError."""
    shared = attach(token, spec)
    shared.weight.copy_(head.weight)
    if head.bias is not None and shared.bias is not None:
        shared.bias.copy_(head.bias)


def attach(token: Token, spec: HeadSpec, device: torch.device = _CPU) -> Head:
    """The head: weight (words, width) and bias (words,). On the CPU in place, shared with every other rank and so not to be
    written; copied to any other `device`. Raises AttachError."""
    nbytes = layout.align(layout.PAGE + layout.head_bytes(spec), layout.PAGE)
    memory = tensors.attach(Names(token.session_id).head(), layout.HEAD, nbytes, token.session_id).bytes
    weight = tensors.over(memory, layout.PAGE, spec.dtype, (spec.words, spec.width))
    bias: torch.Tensor | None = None
    if spec.bias:
        bias = tensors.over(memory, layout.PAGE + layout.head_bias_offset(spec), spec.dtype, (spec.words,))
    return Head(weight.to(device), None if bias is None else bias.to(device), spec.softcap, spec.scale)
