"""What travels in a reply, as torch sees it: dtypes, views over shared memory, and the probe that finds a teacher's
outputs.

Tensors over shared memory are made through NumPy, whose arrays pin the mapping; torch.frombuffer does not, and would
leave a pointer behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from shmbridge.config import OutputConfig, TorchDtype
from shmbridge.errors import PlanError
from shmbridge.output_spec import Extent, OutputSpec

DTYPES: dict[TorchDtype, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES: dict[torch.dtype, TorchDtype] = {dtype: name for name, dtype in DTYPES.items()}
_CARRIERS = {name: np.dtype("int16" if name == "bfloat16" else name) for name in DTYPES}

MAX_OUTPUTS = 8


class Batch(NamedTuple):
    """One combined forward, on the teacher's device."""

    input_ids: torch.Tensor  # (rows, seq) int64, padded on the right with teacher.pad_id
    attention_mask: (
        torch.Tensor | None
    )  # (rows, seq) int64, 1 where a token is real; None where causality is mask enough
    position_ids: torch.Tensor | None = None  # (rows, seq) int64, from 0 again at each packed document


Forward = Callable[[Batch], Mapping[str, torch.Tensor]]
"""What it returns is not written again by a later call: on a GPU it may still be on its way to the ranks then."""


def over(memory: memoryview, offset: int, dtype: TorchDtype, dims: tuple[int, ...]) -> torch.Tensor:
    """A tensor of `dims` in place at `offset` bytes of `memory`.

    Never an inference tensor, even where it is first made within inference_mode: autograd may need it later.
    """
    with torch.inference_mode(False):
        if not prod(dims):
            return torch.empty(dims, dtype=DTYPES[dtype])
        array = np.frombuffer(memory, _CARRIERS[dtype], prod(dims), offset).reshape(dims)
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def dtype_name(dtype: torch.dtype, what: str) -> TorchDtype:
    """How a dtype is called in an offer. Raises PlanError, naming `what`, for one that cannot travel."""
    if dtype not in _NAMES:
        raise PlanError(f"{what} has the dtype {dtype}; a reply carries {', '.join(DTYPES)}.")
    return _NAMES[dtype]


def probe(forward: Forward, device: torch.device, declared: Mapping[str, OutputConfig]) -> tuple[OutputSpec, ...]:
    """What `forward` returns: as declared, or as two small batches of different shapes show it.

    An axis follows the sequence if it is axis 1 and equals the length in both batches.

    Raises:
        PlanError: an output is no tensor, lacks the batch axis, has a dtype or shape that cannot travel, or differs from
            its declaration.
    """
    shapes = ((1, 4), (2, 6))
    returned = [_run_probe(forward, device, *shape) for shape in shapes]
    if declared:
        specs = tuple(OutputSpec(name, output.dtype, output.shape) for name, output in declared.items())
    else:
        specs = tuple(_infer(name, [outputs.get(name) for outputs in returned], shapes) for name in returned[0])
    if not 0 < len(specs) <= MAX_OUTPUTS:
        raise PlanError(f"the teacher returned {len(specs)} outputs; a reply carries 1 to {MAX_OUTPUTS}.")
    for outputs, (batch, seq) in zip(returned, shapes, strict=True):
        check_outputs(specs, outputs, batch, seq)
    return specs


def check_outputs(specs: tuple[OutputSpec, ...], outputs: Mapping[str, torch.Tensor], batch: int, seq: int) -> None:
    """Raise PlanError unless `outputs` holds every output of `specs` in the shape for (batch, seq).

    A float travels as any float dtype; an integer never becomes a float or the other way round."""
    for spec in specs:
        tensor = outputs.get(spec.name)
        if not isinstance(tensor, torch.Tensor):
            raise PlanError(f"the teacher returned {sorted(outputs)}; expected a tensor {spec.name!r} among them.")
        if tensor.dtype.is_floating_point != DTYPES[spec.dtype].is_floating_point:
            raise PlanError(f"the teacher returned {spec.name!r} as {tensor.dtype}; {spec.dtype} was offered.")
        expected = spec.dims(Extent(batch, seq))
        if tensor.shape != expected:
            raise PlanError(
                f"the teacher returned {spec.name!r} of shape {tuple(tensor.shape)} for a batch of {batch} x {seq}; "
                f"expected {expected}. The first axis is the batch; axis 1 may be the sequence."
            )


def _run_probe(forward: Forward, device: torch.device, batch: int, seq: int) -> Mapping[str, torch.Tensor]:
    ids = torch.zeros(batch, seq, dtype=torch.int64, device=device)
    outputs = forward(Batch(ids, None))
    if not isinstance(outputs, Mapping):
        raise PlanError(
            f"the teacher's forward returned a {type(outputs).__name__}; expected a dict of names to tensors with a "
            'leading batch axis, such as {"logits": logits}.'
        )
    return outputs


def _infer(name: str, tensors: list[torch.Tensor | None], shapes: tuple[tuple[int, int], ...]) -> OutputSpec:
    for tensor, (batch, _) in zip(tensors, shapes, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or tensor.shape[0] != batch:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise PlanError(
                f"output {name!r} is {found} for {batch} rows; expected a tensor with a leading batch axis."
            )
    first, second = tensors
    assert first is not None and second is not None
    dtype = dtype_name(first.dtype, f"output {name!r}")
    per_token = first.ndim > 1 and (first.shape[1], second.shape[1]) == (shapes[0][1], shapes[1][1])
    rest = tuple(first.shape[1 + per_token :])
    if rest != tuple(second.shape[1 + per_token :]):
        raise PlanError(
            f"output {name!r} has the shapes {tuple(first.shape)} and {tuple(second.shape)} for batches of {shapes[0]} and "
            f"{shapes[1]}; only axis 0 may follow the batch and only axis 1 the sequence."
        )
    return OutputSpec(name, dtype, ("seq", *rest) if per_token else rest)
