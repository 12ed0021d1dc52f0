"""Requests as batches: the tensors of one forward, and which rows and positions of it belong to which request."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from shmbridge.shm.layout import IGNORED
from shmbridge.shm.ring import Composition, Request
from shmbridge.shm.session import Lane
from shmbridge.teacher.compose import Piece
from shmbridge.teacher.payload import Choice, Rows

_ID_TYPES = {4: np.int32, 8: np.int64}
_NOWHERE = Composition(0, 0, 0, 0, 0, 0)


class Batch(NamedTuple):
    """The input of one forward: rows of one or several requests, on the teacher's device."""

    input_ids: torch.Tensor
    """(rows, seq) int64, padded on the right with teacher.pad_id."""

    attention_mask: torch.Tensor | None
    """(rows, seq) int64, 1 where a token is real. None where the causal mask is enough: all tokens are real."""

    position_ids: torch.Tensor | None = None
    """(rows, seq) int64, from 0 again at each packed document."""


Forward = Callable[[Batch], Mapping[str, torch.Tensor]]
"""A later call must not write to the tensors that an earlier one returned: on a GPU they may still be copied to the ranks."""


class Answer:
    """One request, and how much of its reply is made."""

    __slots__ = ("composition", "done", "echo", "error", "lane", "parts", "request")

    def __init__(self, lane: Lane, request: Request) -> None:
        self.lane = lane
        self.request = request
        self.done = 0  # rows
        self.composition = _NOWHERE
        self.parts: list[Rows] = []  # what is still to be streamed
        self.echo = echo(request) if request.probe else 0
        self.error: str | None = None


def packed(request: Request) -> bool:
    """Whether documents are packed into the request's rows. With a mask, models do not see where a document ends, so such a request
    shares no forward with requests that have a mask."""
    return "position_ids" in request.arrays and "mask" not in request.arrays


def combine(requests: Sequence[Request], pieces: Sequence[Piece], pad_id: int, device: torch.device) -> Batch:
    """The rows of `pieces` as one batch of the teacher's own memory, padded on the right where lengths differ.

    Always a copy: the slots' memory must not outlive the requests in the teacher's hands.
    """
    chosen = [requests[piece.request] for piece in pieces]
    parts = [_rows(request, piece) for request, piece in zip(chosen, pieces, strict=True)]
    seq = max(piece.seq for piece in pieces)
    if not any(request.arrays for request in chosen) and all(piece.seq == seq for piece in pieces):
        return Batch(_to_device(np.concatenate(parts), device), None)
    input_ids = _padded(parts, seq, pad_id)
    if packed(chosen[0]):
        positions = [_array(request, piece, "position_ids") for request, piece in zip(chosen, pieces, strict=True)]
        return Batch(_to_device(input_ids, device), None, _to_device(_padded(positions, seq, 0), device))
    masks = [_mask(request, piece) for request, piece in zip(chosen, pieces, strict=True)]
    attention_mask = _padded(masks, seq, 0)
    return Batch(
        _to_device(input_ids, device),
        None if attention_mask.all() else _to_device(attention_mask, device),
        _position_ids(chosen, pieces, seq, device),
    )


def tokens(requests: Sequence[Request], pieces: Sequence[Piece]) -> int:
    """Tokens of `pieces` without padding, the teacher's or the rank's."""
    found = 0
    for piece in pieces:
        request = requests[piece.request]
        found += int(_mask(request, piece).sum()) if "mask" in request.arrays else piece.rows * piece.seq
    return found


def choice(request: Request, piece: Piece, row: int, device: torch.device, with_targets: bool) -> Choice:
    """What `request` wants of rows `row` and on of a forward, which hold its `piece`."""
    rows = slice(row, row + piece.rows)
    arrays = request.arrays
    chosen = None
    if "positions" in arrays:
        chosen = np.flatnonzero(_array(request, piece, "positions"))
    places = None if chosen is None else _to_device(chosen, device)
    if not with_targets:
        return Choice(rows, piece.seq, places)
    targets = _array(request, piece, "targets") if "targets" in arrays else next_tokens(_rows(request, piece))
    candidates = _array(request, piece, "candidates") if "candidates" in arrays else None
    return Choice(
        rows,
        piece.seq,
        places,
        _of_positions(targets, chosen, device),
        None if candidates is None else _of_positions(candidates, chosen, device),
    )


def first_position(request: Request, piece: Piece) -> int:
    """How many of the request's chosen positions lie before `piece`."""
    if "positions" not in request.arrays:
        return piece.start * piece.seq
    before = Piece(piece.request, 0, piece.start, piece.seq)
    return int(_array(request, before, "positions").sum())


def next_tokens(ids: np.ndarray) -> np.ndarray:
    """Of (rows, seq) IDs, the token after each; IGNORED after the last."""
    targets = np.full(ids.shape, IGNORED, np.int64)
    targets[:, :-1] = ids[:, 1:]
    return targets


def echo(request: Request) -> int:
    """CRC-32 of the request's IDs as int64."""
    ids = np.frombuffer(request.ids, _ID_TYPES[request.itemsize])
    return zlib.crc32(ids.astype(np.int64).tobytes())


def _rows(request: Request, piece: Piece) -> np.ndarray:
    """The IDs of a piece, in the slot's memory."""
    ids = np.frombuffer(request.ids, _ID_TYPES[request.itemsize]).reshape(request.extent.batch, request.extent.seq)
    return ids[piece.start : piece.stop]


def _array(request: Request, piece: Piece, name: str) -> np.ndarray:
    """One of the request's arrays for a piece, in the slot's memory: (rows, seq), or (rows, seq, c)."""
    kind = np.uint8 if name in ("mask", "positions") else np.int32
    array = np.frombuffer(request.arrays[name], kind)
    shape = (request.extent.batch, request.extent.seq, *((-1,) if name == "candidates" else ()))
    return array.reshape(shape)[piece.start : piece.stop]


def _mask(request: Request, piece: Piece) -> np.ndarray:
    if "mask" in request.arrays:
        return _array(request, piece, "mask")
    return np.ones((piece.rows, piece.seq), np.uint8)


def _position_ids(
    requests: Sequence[Request], pieces: Sequence[Piece], seq: int, device: torch.device
) -> torch.Tensor | None:
    """Where a rank gave position_ids beside its mask; the others count from 0."""
    if not any("position_ids" in request.arrays for request in requests):
        return None
    parts = [
        _array(request, piece, "position_ids")
        if "position_ids" in request.arrays
        else np.broadcast_to(np.arange(piece.seq), (piece.rows, piece.seq))
        for request, piece in zip(requests, pieces, strict=True)
    ]
    return _to_device(_padded(parts, seq, 0), device)


def _padded(parts: Sequence[np.ndarray], seq: int, fill: int) -> np.ndarray:
    """(rows, seq) int64, each part on the left."""
    padded = np.full((sum(len(part) for part in parts), seq), fill, np.int64)
    row = 0
    for part in parts:
        padded[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    return padded


def _of_positions(array: np.ndarray, chosen: np.ndarray | None, device: torch.device) -> torch.Tensor:
    """(rows, seq, ...) as (positions, ...) int64 on `device`."""
    flat = array.reshape(-1, *array.shape[2:])
    return _to_device(flat if chosen is None else flat[chosen], device)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array`, which is no view of a slot unless it is int32, as an int64 tensor."""
    tensor = torch.from_numpy(array.astype(np.int64, copy=False))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the host would wait for the GPU
