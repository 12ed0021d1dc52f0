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
from shmbridge.teacher.grouping import Piece
from shmbridge.teacher.payload import Selection, Tensors

_ID_TYPES = {4: np.int32, 8: np.int64}


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

    __slots__ = ("composition", "echo", "error", "lane", "positions", "request", "rows", "selections")

    def __init__(self, lane: Lane, request: Request) -> None:
        self.lane = lane
        self.request = request
        self.rows = 0  # that are computed, or have failed
        self.positions = 0  # that are computed
        self.composition = Composition(0, 0, 0, 0, 0, 0)
        self.selections: list[Selection] = []  # what is still to be streamed
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
    seq = max(piece.seq for piece in pieces)

    def padded(name: str, fill: int = 0) -> np.ndarray:
        """(rows, seq) int64."""
        found = np.full((sum(piece.rows for piece in pieces), seq), fill, np.int64)
        row = 0
        for request, piece in zip(chosen, pieces, strict=True):
            found[row : row + piece.rows, : piece.seq] = _array(request, piece, name)
            row += piece.rows
        return found

    mask = position_ids = None
    if any("position_ids" in request.arrays for request in chosen):
        position_ids = _to_device(padded("position_ids"), device)
    one_length = all(piece.seq == seq for piece in pieces)
    if not packed(chosen[0]) and not (one_length and all("mask" not in request.arrays for request in chosen)):
        real = padded("mask")
        mask = None if real.all() else _to_device(real, device)
    return Batch(_to_device(padded("ids", pad_id), device), mask, position_ids)


def tokens(requests: Sequence[Request], pieces: Sequence[Piece]) -> int:
    """Tokens of `pieces` without padding, the teacher's or the rank's."""
    found = 0
    for piece in pieces:
        request = requests[piece.request]
        found += int(_array(request, piece, "mask").sum()) if "mask" in request.arrays else piece.rows * piece.seq
    return found


def select(
    tensors: Tensors, request: Request, piece: Piece, row: int, seq: int, device: torch.device, with_targets: bool
) -> Selection:
    """What `request` wants of a forward with rows of `seq` tokens, which holds its `piece` from row `row` on."""
    rows, chosen = slice(row, row + piece.rows), None
    found = Selection(tensors, rows, piece.rows * piece.seq, row * seq)
    if "positions" in request.arrays or piece.seq < seq:
        chosen = np.nonzero(_array(request, piece, "positions"))
        places = _to_device((row + chosen[0]) * seq + chosen[1], device)
        found = Selection(tensors, rows, len(chosen[0]), places)
    if not with_targets:
        return found

    def at_positions(name: str) -> torch.Tensor:
        """(positions, ...) int64."""
        array = _array(request, piece, name)
        return _to_device(array.reshape(-1, *array.shape[2:]) if chosen is None else array[chosen], device)

    candidates = at_positions("candidates") if "candidates" in request.arrays else None
    return found._replace(targets=at_positions("targets"), candidates=candidates)


def next_tokens(ids: np.ndarray) -> np.ndarray:
    """Of (rows, seq) IDs, the token after each; IGNORED after the last."""
    targets = np.full(ids.shape, IGNORED, np.int64)
    targets[:, :-1] = ids[:, 1:]
    return targets


def echo(request: Request) -> int:
    """CRC-32 of the request's IDs as int64."""
    ids = np.frombuffer(request.ids, _ID_TYPES[request.itemsize])
    return zlib.crc32(ids.astype(np.int64).tobytes())


def _array(request: Request, piece: Piece, name: str) -> np.ndarray:
    """`ids` or another array of a piece: (rows, seq), or (rows, seq, c) for candidates. In the slot's memory, or what is meant
    where the rank sent no such array."""
    batch, seq, _ = request.extent
    if name == "ids":
        array = np.frombuffer(request.ids, _ID_TYPES[request.itemsize])
    elif name in request.arrays:
        array = np.frombuffer(request.arrays[name], np.uint8 if name in ("mask", "positions") else np.int32)
    elif name == "targets":
        return next_tokens(_array(request, piece, "ids"))
    elif name == "position_ids":
        return np.broadcast_to(np.arange(seq), (piece.rows, seq))
    else:  # mask and positions: all
        return np.ones((piece.rows, seq), np.uint8)
    shape = (batch, seq, -1) if name == "candidates" else (batch, seq)
    return array.reshape(shape)[piece.start : piece.stop]


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array`, which is no view of a slot unless it is int32, as an int64 tensor."""
    tensor = torch.from_numpy(array.astype(np.int64, copy=False))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the host would wait for the GPU
