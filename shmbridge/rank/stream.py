"""A reply in chunks, as its rank reads it: each chunk is given back when the next is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from shmbridge.errors import AttachError, RequestRefused
from shmbridge.output_spec import Extent
from shmbridge.plane.tensors import DTYPES
from shmbridge.rank.in_flight import Request, Requests
from shmbridge.rank.reply import Lent, Reply
from shmbridge.shm.ring import Chunk

Pieces = Iterable[tuple[slice, Reply]]
"""Rows of the request's positions (batch x seq, or those it chose) in row-major order, and their chunk."""


class Stream:
    """One streamed reply. Replies are streamed in the order of their requests."""

    def __init__(self, requests: Requests, request: Request, timeout: float | None) -> None:
        """`timeout` in seconds for each chunk; None: timeouts.request_s of the config."""
        self._requests = requests
        self._request = request
        self._timeout = timeout
        self._session = requests.life.session

    def begin(self) -> bool:
        """Sleep until the first chunk is there. False where nobody answers. Raises RequestRefused unless it is this reply's turn."""
        requests, sequence = self._requests, self._request.sequence
        requests.free_unwanted(wait=False)
        first = requests.first_wanted()
        if sequence != first:
            raise RequestRefused(
                f"sequence {first} is to be read before sequence {sequence}: replies are streamed in the order of their "
                "requests. Read or cancel it first."
            )
        return self._await_chunk()

    def chunks(self) -> Iterator[tuple[slice, Reply]]:
        """Every chunk, and one without tensors for what the teacher leaves out. What is not read is cancelled."""
        requests, request, ring = self._requests, self._request, self._session.ring
        replies, taken, positions = requests.replies, 0, request.extent.positions
        lends, keeps, lent = replies.plane.lends, replies.plane.keeps, Lent(request.sequence, request.step)
        try:
            while taken < positions:
                if not self._await_chunk():
                    yield slice(taken, positions), request.missing_reply()
                    return
                chunk = self._next_chunk(taken)
                tensors = request.wanted(replies.read(chunk.number, Extent(0, 0, chunk.positions), lent))
                reply = Reply(tensors, request.sequence, request.step, None, lent=lends)
                if not keeps:
                    self._consume(chunk)
                try:
                    yield slice(chunk.start, chunk.start + chunk.positions), reply
                finally:
                    reply.forget()
                    if requests.life.usable:
                        replies.take_back(chunk.number)
                        if keeps:
                            self._consume(chunk)
                taken += chunk.positions
            if requests.await_reply(lambda: ring.answered(request.sequence), request, self._timeout):
                requests.head(request)
        finally:
            requests.cancel(request.sequence)

    def _await_chunk(self) -> bool:
        """Sleep until there is a chunk, or the reply is over. False where nobody answers."""
        session, sequence = self._requests.life.session, self._request.sequence
        ring = session.ring

        def ready() -> bool | None:
            before = ring.consumed
            found = ring.next_chunk(sequence) is not None or ring.answered(sequence)
            if ring.consumed != before:  # chunks of a cancelled reply: there is room again
                session.ring_teacher()
            return found

        return ready() or self._requests.await_reply(ready, self._request, self._timeout)

    def _next_chunk(self, taken: int) -> Chunk:
        """The next chunk, which begins at position `taken`. Raises AttachError where it is garbled, TeacherError where there is none."""
        session, request = self._session, self._request
        chunk = session.ring.next_chunk(request.sequence)
        if chunk is None:  # answered, and no chunk was published before that
            self._requests.head(request)
            raise AttachError(f"the reply to sequence {request.sequence} ends before its last chunk: refused.")
        most = min(session.control.shape.chunk_positions, request.extent.positions - taken)
        if chunk.start != taken or not 0 < chunk.positions <= most:
            raise AttachError(
                f"chunk {chunk.number} of sequence {request.sequence} tells {chunk.positions} positions from {chunk.start} on, "
                f"expected 1 to {most} from {taken} on: refused."
            )
        return chunk

    def _consume(self, chunk: Chunk) -> None:
        self._session.ring.consume(chunk.number)
        self._session.ring_teacher()


def as_chunk(requests: Requests, request: Request, reply: Reply) -> Reply:
    """A whole reply in the shape of a chunk: its positions in one axis."""
    names = [spec.name for spec in requests.replies.outputs if spec.per_token and spec.name in reply]
    flat = {name: _flat(reply[name], request.extent) for name in names}
    return Reply(flat, reply.sequence, reply.step, reply.composition, lent=requests.replies.plane.lends)


def assemble(requests: Requests, request: Request, pieces: Pieces) -> Reply:
    """A streamed reply in tensors that the caller owns, shaped as a whole one: (batch, seq, ...), or (positions, ...)."""
    replies, extent = requests.replies, request.extent
    tensors = request.wanted(
        {
            spec.name: torch.empty(spec.dims(extent), dtype=DTYPES[spec.dtype], device=replies.device)
            for spec in replies.outputs
        }
    )
    for rows, chunk in pieces:
        if chunk.missing:
            return chunk
        for name, tensor in tensors.items():
            _flat(tensor, extent)[rows] = chunk[name]
    composition = None if request.missing else requests.last_head.composition
    return Reply(tensors, request.sequence, request.step, composition)


def _flat(tensor: torch.Tensor, extent: Extent) -> torch.Tensor:
    """The axes (batch, seq) of a tensor as one."""
    return tensor.flatten(0, 1) if extent.chosen is None else tensor
