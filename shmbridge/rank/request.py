"""One request: the arguments of `submit`, checked against every limit, as the fields of its descriptor and the arrays behind it.

An ID outside the vocabulary would be a device-side assert that kills the teacher, so it is refused here, in the rank that
sent it.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch

from shmbridge import log
from shmbridge.errors import RequestRefused
from shmbridge.output_spec import Extent, Offer
from shmbridge.plane import cuda_runtime
from shmbridge.shm.layout import IGNORED, NO_STEP
from shmbridge.shm.session import Shape

if TYPE_CHECKING:
    from shmbridge.rank.prefetch import SendQueue

IntArray = np.ndarray[Any, np.dtype[Any]]
Given = torch.Tensor | IntArray

UNSENT = -1  # the sequence of a request that is not in the ring

_NOTHING = memoryview(b"")
_NO_LIMIT = 2**31
_UNSIGNED = {np.dtype(np.int64): np.uint64, np.dtype(np.int32): np.uint32}


class Request:
    """What is asked, and where it stands: it waits in a queue, is in the ring, was withdrawn from it and waits again, or is
    `missing`."""

    __slots__ = ("__weakref__", "arrays", "extent", "ids", "missing", "queue", "sequence", "step")

    def __init__(self, ids: memoryview, extent: Extent, arrays: dict[str, memoryview], step: int | None = None) -> None:
        """`ids` and `arrays`, by the names of layout.ARRAYS, are bytes and may lie in the caller's own tensors."""
        self.ids = ids
        self.extent = extent
        self.arrays = arrays
        self.step = step
        self.sequence = UNSENT
        self.missing = False  # there will be no reply
        self.queue: SendQueue | None = None  # until it is waited for or cancelled

    def own_buffers(self) -> None:
        """Copy the buffers, so that the caller may change its tensors."""
        self.ids = memoryview(bytes(self.ids))
        self.arrays = {name: memoryview(bytes(array)) for name, array in self.arrays.items()}

    def drop_buffers(self) -> None:
        """It is not sent again."""
        self.ids = _NOTHING
        self.arrays = dict.fromkeys(self.arrays, _NOTHING)


class Extras(TypedDict, total=False):
    """What may travel beside the IDs; see Bridge.submit."""

    positions: Given | None
    position_ids: Given | None
    targets: Given | None
    candidates: Given | None
    step: int | None


def check_request(
    input_ids: Given, attention_mask: Given | None, extras: Extras, offer: Offer, shape: Shape
) -> Request:
    """The arguments of `Bridge.submit` as a request. Raises RequestRefused."""
    for name in (
        extras.keys() - Extras.__annotations__.keys()
    ):  # left out, a misspelt name would change the reply unseen
        near = difflib.get_close_matches(name, Extras.__annotations__, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(Extras.__annotations__)}."
        raise RequestRefused(f"submit has no argument {name!r}; {hint}")
    step, position_ids, positions = extras.get("step"), extras.get("position_ids"), extras.get("positions")
    if step is not None and not (isinstance(step, int) and 0 <= step < NO_STEP):
        raise RequestRefused(f"step is {step!r}; expected an int that is not negative, or None.")
    ids = _check_ids(input_ids, offer, shape, packed=position_ids is not None)
    arrays: dict[str, IntArray] = {}
    chosen = None
    if attention_mask is not None:
        arrays["mask"] = _to_mask("attention_mask", attention_mask, ids.shape)
    if positions is not None:
        arrays["positions"] = _to_mask("positions", positions, ids.shape)
        chosen = int(arrays["positions"].sum())
    if position_ids is not None:
        arrays["position_ids"] = _check_position_ids(position_ids, ids, offer, arrays.get("mask"))
    arrays |= _check_words(extras, ids, offer, shape)
    extent = Extent(ids.shape[0], ids.shape[1], chosen)
    if not shape.chunks and extent.positions > shape.max_positions:
        raise RequestRefused(
            f"the request asks for {extent.positions} positions; a reply holds {shape.max_positions}. Raise "
            "ring.max_positions (it sizes the reply memory), choose fewer (`positions`), or stream them (payload.stream)."
        )
    return Request(_bytes(ids), extent, {name: _bytes(array) for name, array in arrays.items()}, step)


def _check_ids(input_ids: Given, offer: Offer, shape: Shape, packed: bool) -> IntArray:
    """The IDs as a contiguous array. The length of a `packed` row is checked with its position_ids."""
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
    if offer.max_seq is not None and seq > offer.max_seq and not packed:
        raise RequestRefused(
            f"input_ids is {seq} tokens long; the teacher {offer.model!r} has {offer.max_seq} positions. "
            f"Truncate to {offer.max_seq} tokens, or take a teacher with more positions."
        )
    ids = np.ascontiguousarray(ids)
    limit = offer.vocab_size or _NO_LIMIT
    if np.maximum.reduce(ids.view(unsigned), axis=None) >= limit:  # one pass: a negative ID is a huge unsigned one
        row, column = _first(ids.view(unsigned) >= limit)
        raise RequestRefused(
            f"input_ids[{row}, {column}] is {ids[row, column]}; the teacher {offer.model!r} takes 0 to {limit - 1}. "
            "Use the teacher's tokenizer, or mask positions such as -100 out before you submit."
        )
    return ids


def _check_position_ids(value: Given, ids: IntArray, offer: Offer, mask: IntArray | None) -> IntArray:
    places = _to_int32("position_ids", value, ids.shape, offer.max_seq or _NO_LIMIT)
    begins = np.diff(places, axis=1, prepend=-2) != 1  # a document does; a row's first token always
    if mask is not None:
        begins[:, 1:] &= (mask[:, 1:] & mask[:, :-1]) != 0  # what stands in the padding is no document
    if begins[:, 1:].any():
        if mask is not None:
            raise RequestRefused(
                "position_ids restart (packed documents) and there is an attention_mask too, under which a model lets "
                "documents see each other: leave attention_mask out."
            )
        if not offer.packs:
            raise RequestRefused(
                f"position_ids restart (packed documents); the teacher {offer.model} lets packed documents see each other. "
                "Send each document as a row of its own. (A teacher of one's own whose forward heeds batch.position_ids says "
                "so by an attribute `packs = True`.)"
            )
    elif mask is not None and not mask.all():
        return places
    wrong = begins & (places != 0)  # FlashAttention finds documents by their zeros; another beginning would join two
    if wrong.any():
        row, column = _first(wrong)
        raise RequestRefused(
            f"position_ids[{row}, {column}] is {places[row, column]} where a document begins; expected 0."
        )
    return places


def _check_words(extras: Extras, ids: IntArray, offer: Offer, shape: Shape) -> dict[str, IntArray]:
    """The words whose log-probabilities are asked for. Without targets they are the next tokens of each row, for which the
    teacher's distribution must have words."""
    targets, candidates = extras.get("targets"), extras.get("candidates")
    words = offer.words or _NO_LIMIT
    found: dict[str, IntArray] = {}
    if all(spec.name != "logprobs" for spec in offer.outputs):
        if targets is not None or candidates is not None:
            raise RequestRefused("targets and candidates need the payload logprobs; set payload.logprobs={}.")
        return found
    if targets is not None:
        found["targets"] = _to_int32("targets", targets, ids.shape, words, or_ignored=True)
    elif words < (offer.vocab_size or _NO_LIMIT) and (wrong := ids[:, 1:] >= words).any():
        row, column = _first(wrong)
        raise RequestRefused(
            f"input_ids[{row}, {column + 1}] is {ids[row, column + 1]}; the teacher's distribution has {words} words, so it "
            "gives no log-probability of this next token. Submit `targets` with -100 there."
        )
    if candidates is not None:
        if not shape.candidates:
            raise RequestRefused(
                "candidates were not planned for; set payload.logprobs.candidates to how many there are."
            )
        found["candidates"] = _to_int32("candidates", candidates, (*ids.shape, shape.candidates), words)
    return found


def _to_mask(name: str, value: Given, shape: tuple[int, ...]) -> IntArray:
    mask = _to_array(name, value)
    if mask.shape != shape:
        raise RequestRefused(f"{name} has shape {mask.shape}; expected that of input_ids, {shape}.")
    if mask.dtype != bool and not ((mask == 0) | (mask == 1)).all():
        raise RequestRefused(f"{name} holds values other than 0 and 1; expected 1 where a token counts.")
    return np.ascontiguousarray(mask, dtype=np.uint8)


def _to_int32(name: str, value: Given, shape: tuple[int, ...], limit: int, or_ignored: bool = False) -> IntArray:
    """`value` of `shape` as int32; each number is below `limit` and not negative, or IGNORED where that is allowed."""
    array = _to_array(name, value)
    if array.dtype not in (np.int32, np.int64):
        raise RequestRefused(f"{name} has dtype {array.dtype}; expected int32 or int64.")
    if array.shape != shape:
        raise RequestRefused(f"{name} has shape {array.shape}; expected {shape}.")
    wrong = (array < 0) | (array >= limit)
    if or_ignored:
        wrong &= array != IGNORED
    if wrong.any():
        at = _first(wrong)
        also = f", or {IGNORED} where there is none" if or_ignored else ""
        raise RequestRefused(f"{name}{list(at)} is {array[at]}; expected 0 to {limit - 1}{also}.")
    return np.ascontiguousarray(array, dtype=np.int32)


_gpu_copy_told = False


def _to_array(name: str, value: Given) -> IntArray:
    global _gpu_copy_told
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, torch.Tensor):
        raise RequestRefused(f"{name} is a {type(value).__name__}; expected a torch.Tensor or a NumPy array.")
    if value.device.type not in ("cpu", "cuda"):
        raise RequestRefused(f"{name} is on {value.device}; expected a tensor on the CPU, or on a CUDA device.")
    if value.device.type == "cuda":
        if not _gpu_copy_told:
            _gpu_copy_told = True
            log.logger.warning(
                "%s is on %s and is copied to the host: this call waits until the GPU has computed everything that it was "
                "given before, and the teacher begins only then. To avoid it submit the CPU tensor that the loader gave, "
                "before .to(device) (accelerate: prepare_data_loader(loader, device_placement=False); DistillationTrainer "
                "does so by itself). Told once.",
                name,
                value.device,
            )
        value = cuda_runtime.to_host(value.detach())
    try:
        return value.detach().numpy() if value.requires_grad else value.numpy()
    except (TypeError, RuntimeError) as error:
        raise RequestRefused(f"{name} is a tensor of {value.dtype}, {value.layout}: {error}.") from None


def _first(wrong: IntArray) -> tuple[int, ...]:
    """The first place where `wrong` is true."""
    return tuple(np.argwhere(wrong)[0].tolist())


def _bytes(array: IntArray) -> memoryview:
    return array.data.cast("B")
