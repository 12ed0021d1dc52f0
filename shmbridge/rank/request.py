"""What a rank may submit: token IDs and what travels beside them, as contiguous arrays once every limit was checked.

An ID outside the vocabulary would be a device-side assert that kills the teacher, so it is refused here, in the rank that
sent it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch

from shmbridge import log
from shmbridge.errors import RequestRefused
from shmbridge.output_spec import Extent, Offer
from shmbridge.plane import cuda_runtime
from shmbridge.shm.layout import IGNORED, NO_STEP
from shmbridge.shm.session import Shape

IntArray = np.ndarray[Any, np.dtype[Any]]

_UNSIGNED = {np.dtype(np.int64): np.uint64, np.dtype(np.int32): np.uint32}


class CheckedRequest(NamedTuple):
    """What a rank asks, once every limit was checked. The buffers are bytes and may lie in the caller's own tensors."""

    ids: memoryview
    extent: Extent
    arrays: Mapping[str, memoryview]  # by the names of layout.ARRAYS
    step: int | None = None

    def copied(self) -> CheckedRequest:
        """The same request in memory of its own, so that the caller may change its tensors."""
        arrays = {name: memoryview(bytes(array)) for name, array in self.arrays.items()}
        return self._replace(ids=memoryview(bytes(self.ids)), arrays=arrays)


def check_request(
    input_ids: torch.Tensor | IntArray,
    attention_mask: torch.Tensor | IntArray | None,
    extras: Extras,
    agreed: Offer,
    shape: Shape,
) -> CheckedRequest:
    """Check the arguments of `submit`. Raises RequestRefused."""
    if extras:
        check_names(extras)
    ids = check_ids(input_ids, agreed, shape, packed=extras.get("position_ids") is not None)
    extent, arrays = check_arrays(ids, attention_mask, extras, agreed, shape)
    step = extras.get("step")
    if step is not None and not (isinstance(step, int) and 0 <= step < NO_STEP):
        raise RequestRefused(f"step is {step!r}; expected an int that is not negative, or None.")
    return CheckedRequest(ids.data.cast("B"), extent, arrays, step)


def check_ids(input_ids: torch.Tensor | IntArray, agreed: Offer, shape: Shape, packed: bool = False) -> IntArray:
    """The IDs as a contiguous array, once every limit was checked; those of a `packed` row are checked with its position_ids.
    Raises RequestRefused."""
    ids = _to_array("input_ids", input_ids)
    unsigned = _UNSIGNED.get(ids.dtype)
    if unsigned is None:
        raise RequestRefused(f"input_ids has dtype {ids.dtype}; expected int32 or int64.")
    if ids.ndim != 2:
        raise RequestRefused(f"input_ids has shape {ids.shape}; expected (batch, seq).")
    if ids.size == 0:
        raise RequestRefused(f"input_ids is empty, shape {ids.shape}; skip the exchange for an empty batch.")
    batch, seq = ids.shape
    if ids.size > shape.max_tokens:
        raise RequestRefused(
            f"input_ids has {batch} x {seq} = {ids.size} tokens; a request takes {shape.max_tokens}. "
            f"Raise ring.max_tokens (it sizes the reply memory), or submit fewer rows at a time."
        )
    if batch > shape.max_batch:
        raise RequestRefused(f"input_ids has {batch} rows; a request takes {shape.max_batch}. Raise ring.max_batch.")
    if agreed.max_seq is not None and seq > agreed.max_seq and not packed:
        raise RequestRefused(
            f"input_ids is {seq} tokens long; the teacher {agreed.model!r} has {agreed.max_seq} positions. "
            f"Truncate to {agreed.max_seq} tokens, or take a teacher with more positions."
        )
    if not ids.flags.c_contiguous:
        ids = np.ascontiguousarray(ids)
    limit = agreed.vocab_size or 2**31
    if np.maximum.reduce(ids.view(unsigned), axis=None) >= limit:  # one pass: a negative ID is a huge unsigned one
        row, column = np.argwhere(ids.view(unsigned) >= limit)[0]
        raise RequestRefused(
            f"input_ids[{row}, {column}] is {ids[row, column]}; the teacher {agreed.model!r} takes 0 to {limit - 1}. "
            "Use the teacher's tokenizer, or mask positions such as -100 out before you submit."
        )
    return ids


class Extras(TypedDict, total=False):
    """What may travel beside the IDs; see Bridge.submit."""

    positions: torch.Tensor | IntArray | None
    position_ids: torch.Tensor | IntArray | None
    targets: torch.Tensor | IntArray | None
    candidates: torch.Tensor | IntArray | None
    step: int | None


_EXTRAS = frozenset(Extras.__annotations__)


def check_names(extras: Extras) -> None:
    """Raise RequestRefused for an argument that submit does not have: misspelt, it would be left out without a word."""
    if extras.keys() <= _EXTRAS:
        return
    for name in extras.keys() - _EXTRAS:
        near = difflib.get_close_matches(name, Extras.__annotations__, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(Extras.__annotations__)}."
        raise RequestRefused(f"submit has no argument {name!r}; {hint}")


def check_arrays(
    ids: IntArray, attention_mask: torch.Tensor | IntArray | None, extras: Extras, agreed: Offer, shape: Shape
) -> tuple[Extent, dict[str, memoryview]]:
    """What travels beside checked IDs, as bytes by the names of layout.ARRAYS. Raises RequestRefused."""
    found: dict[str, IntArray] = {}
    if attention_mask is not None:
        found["mask"] = _to_mask("attention_mask", attention_mask, ids)
    chosen = None
    positions = extras.get("positions")
    if positions is not None:
        found["positions"] = _to_mask("positions", positions, ids)
        chosen = int(found["positions"].sum())
    if extras.get("position_ids") is not None:
        found["position_ids"] = _check_position_ids(extras["position_ids"], ids, agreed, found.get("mask"))
    if extras.get("targets") is not None or extras.get("candidates") is not None:
        found |= _check_words(extras, ids, agreed, shape)
    if extras.get("targets") is None:
        _check_next_tokens(ids, agreed)
    extent = Extent(ids.shape[0], ids.shape[1], chosen)
    if not shape.chunks and extent.positions > shape.max_positions:
        raise RequestRefused(
            f"the request asks for {extent.positions} positions; a reply holds {shape.max_positions}. Raise "
            "ring.max_positions (it sizes the reply memory), choose fewer (`positions`), or stream them (payload.stream)."
        )
    return extent, {name: array.data.cast("B") for name, array in found.items()}


def _check_position_ids(value: Any, ids: IntArray, agreed: Offer, mask: IntArray | None) -> IntArray:
    places = _to_int32("position_ids", value, ids.shape, 0, agreed.max_seq or 2**31)
    begins = np.diff(places, axis=1, prepend=-2) != 1  # a document does; a row's first token always
    padded = mask is not None and not mask.all()
    if mask is not None:
        begins[:, 1:] &= (mask[:, 1:] & mask[:, :-1]) != 0  # what stands in the padding is no document
    if not begins[:, 1:].any():
        if not padded:
            _check_beginnings(places, begins)
        return places
    if mask is not None:
        raise RequestRefused(
            "position_ids restart (packed documents) and there is an attention_mask too, under which a model lets "
            "documents see each other: leave attention_mask out."
        )
    if not agreed.packs:
        raise RequestRefused(
            f"position_ids restart (packed documents); the teacher {agreed.model} lets packed documents see each other. "
            "Send each document as a row of its own. (A teacher of one's own whose forward heeds batch.position_ids says so by "
            "an attribute `packs = True`.)"
        )
    _check_beginnings(places, begins)
    return places


def _check_beginnings(places: IntArray, begins: IntArray) -> None:
    """FlashAttention finds documents by their zeros; any other beginning would join two of them, or two rows."""
    wrong = begins & (places != 0)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise RequestRefused(
            f"position_ids[{row}, {column}] is {places[row, column]} where a document begins; expected 0."
        )


def _check_next_tokens(ids: IntArray, agreed: Offer) -> None:
    """Without targets they are a row's next tokens, so the teacher's distribution must have these words."""
    words = agreed.words
    if (
        words is None
        or words >= (agreed.vocab_size or 2**31)
        or all(spec.name != "logprobs" for spec in agreed.outputs)
    ):
        return
    wrong = ids[:, 1:] >= words
    if wrong.any():
        row, column = np.argwhere(wrong)[0] + (0, 1)
        raise RequestRefused(
            f"input_ids[{row}, {column}] is {ids[row, column]}; the teacher's distribution has {words} words, so it gives no "
            "log-probability of this next token. Submit `targets` with -100 there."
        )


def _check_words(extras: Extras, ids: IntArray, agreed: Offer, shape: Shape) -> dict[str, IntArray]:
    names = {spec.name for spec in agreed.outputs}
    words = agreed.words or 2**31
    found = {}
    targets, candidates = extras.get("targets"), extras.get("candidates")
    if "logprobs" not in names:
        raise RequestRefused("targets and candidates need the payload logprobs; set payload.logprobs={}.")
    if targets is not None:
        found["targets"] = _to_int32("targets", targets, ids.shape, 0, words, or_ignored=True)
    if candidates is not None:
        if not shape.candidates:
            raise RequestRefused(
                "candidates were not planned for; set payload.logprobs.candidates to how many there are."
            )
        found["candidates"] = _to_int32("candidates", candidates, (*ids.shape, shape.candidates), 0, words)
    return found


def _to_mask(name: str, value: torch.Tensor | IntArray, ids: IntArray) -> IntArray:
    mask = _to_array(name, value)
    if mask.shape != ids.shape:
        raise RequestRefused(f"{name} has shape {mask.shape}; expected that of input_ids, {ids.shape}.")
    if mask.dtype != bool and not ((mask == 0) | (mask == 1)).all():
        raise RequestRefused(f"{name} holds values other than 0 and 1; expected 1 where a token counts.")
    return np.ascontiguousarray(mask, dtype=np.uint8)


def _to_int32(
    name: str, value: torch.Tensor | IntArray, shape: tuple[int, ...], low: int, high: int, or_ignored: bool = False
) -> IntArray:
    array = _to_array(name, value)
    if array.dtype not in (np.int32, np.int64):
        raise RequestRefused(f"{name} has dtype {array.dtype}; expected int32 or int64.")
    if array.shape != shape:
        raise RequestRefused(f"{name} has shape {array.shape}; expected {shape}.")
    wrong = (array < low) | (array >= high)
    if or_ignored:
        wrong &= array != IGNORED
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0].tolist())
        also = f", or {IGNORED} where there is none" if or_ignored else ""
        raise RequestRefused(f"{name}{list(at)} is {array[at]}; expected {low} to {high - 1}{also}.")
    return np.ascontiguousarray(array, dtype=np.int32)


def _to_array(name: str, value: torch.Tensor | IntArray) -> IntArray:
    if isinstance(value, torch.Tensor):
        if value.device.type == "cuda":
            _warn_of_gpu_copy(name, value.device)
            value = cuda_runtime.to_host(value.detach())
        elif value.device.type != "cpu":
            raise RequestRefused(f"{name} is on {value.device}; expected a tensor on the CPU, or on a CUDA device.")
        try:
            return value.detach().numpy() if value.requires_grad else value.numpy()
        except (TypeError, RuntimeError) as error:
            raise RequestRefused(f"{name} is a tensor of {value.dtype}, {value.layout}: {error}.") from None
    if isinstance(value, np.ndarray):
        return value
    raise RequestRefused(f"{name} is a {type(value).__name__}; expected a torch.Tensor or a NumPy array.")


_gpu_copy_told = False


def _warn_of_gpu_copy(name: str, device: torch.device) -> None:
    """Once in a process."""
    global _gpu_copy_told
    if not _gpu_copy_told:
        _gpu_copy_told = True
        log.logger.warning(
            "%s is on %s and is copied to the host: this call waits until the GPU has computed everything that it was given before, "
            "and the teacher begins only then. To avoid it submit the CPU tensor that the loader gave, before .to(device) "
            "(accelerate: prepare_data_loader(loader, device_placement=False); DistillationTrainer does so by itself). Told once.",
            name,
            device,
        )
