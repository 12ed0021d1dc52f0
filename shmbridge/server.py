"""The teacher's loop over one protocol: forward(batch) -> named tensors with a leading batch axis.

Each round takes the oldest request of every lane that has one, combines them into one forward (or as few as
teacher.max_batch_tokens allows), and gives every rank its own rows. A lane's second request waits for the next round, so
that ranks with requests in flight meet in the same forward.

A forward that raises is tried again lane by lane, so only the culprit's rank gets the error; one that runs out of memory is
halved and tried again. Every request is answered or failed; none is dropped.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from shmbridge import batching, payload
from shmbridge.batching import Piece
from shmbridge.board import Phase
from shmbridge.errors import AttachError
from shmbridge.host_plane import HostPlane
from shmbridge.offer import Offer
from shmbridge.payload import Batch, Forward
from shmbridge.ring import Composition, Request
from shmbridge.session import Lane, TeacherSession
from shmbridge.trace import Trace, logger

__all__ = ["Batch", "Forward", "Server"]

_ID_TYPES = {4: np.int32, 8: np.int64}


class _Job:
    """One request on its way through a round."""

    __slots__ = ("composition", "done", "error", "lane", "request")

    def __init__(self, lane: Lane, request: Request) -> None:
        self.lane = lane
        self.request = request
        self.done = 0  # rows answered
        self.composition = _NOWHERE
        self.error: str | None = None


class _Trouble(NamedTuple):
    """What a forward raised, as text: the exception itself would keep its frames alive."""

    summary: str
    traceback: str
    out_of_memory: bool


_NOWHERE = Composition(0, 0, 0, 0)


class Server:
    """Serves the lanes of one teacher until every rank has closed."""

    def __init__(self, session: TeacherSession, forward: Forward, agreed: Offer, device: torch.device) -> None:
        """Map the reply memory, which the owner has created for `agreed`. Raises AttachError."""
        self._session = session
        self._forward = forward
        self._agreed = agreed
        self._device = device
        self._settings = session.settings.teacher
        self._max_tokens = self._settings.max_batch_tokens
        self._forwards = 0
        self._stopping = False
        self._last: dict[int, int] | None = None  # by lane, once stopping: sequences below it are still answered
        self._lanes = list(session.lanes)
        shape = session.control.shape
        self._planes = {lane.index: HostPlane(session.token, shape, lane.index, agreed) for lane in self._lanes}
        self._trace = Trace.of("teacher", session.index)

    def stop(self) -> None:
        """Answer what has been submitted, then end. Safe in a signal handler."""
        self._stopping = True

    def serve(self) -> None:
        """Open the startup barrier and answer until every lane is closed, training is done, or `stop` was called.

        Raises:
            PeerLost: the session has failed, or its launcher is gone.
        """
        self._session.open_barrier()
        record = self._session.record
        record.enter(Phase.COLLECTING)
        with torch.inference_mode():
            while jobs := self._collect():
                record.enter(Phase.FORWARD)
                self._answer(jobs)
                record.enter(Phase.COLLECTING)
        record.enter(Phase.CLOSED)

    # Collecting

    def _collect(self) -> list[_Job]:
        """The oldest request of each lane that has one; empty when there will be none."""
        wait = self._session.wait
        while jobs := wait(self._take_or_end, None, self._check):
            if len(jobs) == len(self._lanes):
                return jobs
            if self._settings.collect == "lockstep":
                wait(self._everyone, None, self._check)
            elif self._settings.linger_ms:
                wait(self._everyone, time.monotonic() + self._settings.linger_ms / 1000, self._check)
            else:
                return jobs
            jobs = self._take()  # again: more may have come since, and who had asked may be gone
            if jobs:
                return jobs
        return []

    def _take(self) -> list[_Job]:
        if self._stopping and self._last is None:
            self._last = {lane.index: lane.ring.requested for lane in self._lanes}
            self._session.record.enter(Phase.DRAINING)
        jobs = []
        for lane in self._lanes:
            sequence = lane.ring.next_request()
            if sequence is not None and (self._last is None or sequence < self._last[lane.index]):
                jobs.append(_Job(lane, lane.ring.read_request(sequence)))
        return jobs

    def _take_or_end(self) -> list[_Job] | None:
        return self._take() or ([] if self._ended() else None)

    def _everyone(self) -> bool | None:
        """True when no open lane is still to submit."""
        if self._ended():
            return True
        greedy = self._settings.collect == "greedy"
        for lane in self._lanes:
            ring = lane.ring
            if ring.next_request() is None and not ring.closed and (lane.records[0].identity or not greedy):
                return None
        return True

    def _ended(self) -> bool:
        return self._stopping or self._session.training_done or all(lane.ring.closed for lane in self._lanes)

    def _check(self) -> None:
        """Once a slice of each wait: who is gone will neither submit nor read."""
        self._session.check()
        for lane in [lane for lane in self._lanes if self._session.gone(lane)]:
            if not lane.ring.closed:
                logger.warning("rank %d is gone without closing; its lane is no longer served", lane.index)
            self._lanes.remove(lane)

    # Answering

    def _answer(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            request = job.request
            self._session.record.at(request.step, request.sequence)
            if self._trace:
                self._hand_over("collect", job, request.submitted_ns)
        for pieces in batching.compose([(job.request.batch, job.request.seq) for job in jobs], self._max_tokens):
            self._run(jobs, pieces)

    def _run(self, jobs: Sequence[_Job], pieces: list[Piece]) -> None:
        """One forward, and what to do when it raises.

        The retries run when the exception is gone: its traceback would keep the failed forward's activations alive.
        """
        started = time.monotonic_ns()
        trouble = self._try(jobs, pieces)
        halves = batching.halve(pieces) if trouble and trouble.out_of_memory else []
        if trouble and len(halves) == 2:
            self._max_tokens = min(self._max_tokens, max(1, batching.padded_tokens(pieces) // 2))
            logger.warning("the teacher ran out of memory; forwards now take %d tokens at most", self._max_tokens)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            for half in halves:
                self._run(jobs, half)
        elif trouble and len({piece.request for piece in pieces}) > 1:
            logger.warning("a forward for several ranks raised %s; trying them one by one", trouble.summary)
            for alone in batching.by_request(pieces):
                self._run(jobs, alone)
        else:
            self._finish(jobs, pieces, started, trouble)

    def _try(self, jobs: Sequence[_Job], pieces: list[Piece]) -> _Trouble | None:
        """One forward; what it raised, or None. An error that ends the teacher is raised."""
        try:
            self._forward_and_write(jobs, pieces)
        except AttachError:
            raise
        except Exception as error:
            if _poisons_the_device(error):
                raise
            return _Trouble(repr(error), "".join(traceback.format_exception(error)), _is_out_of_memory(error))
        return None

    def _forward_and_write(self, jobs: Sequence[_Job], pieces: Sequence[Piece]) -> None:
        batch = self._combine(jobs, pieces)
        rows, padded = batch.input_ids.shape
        outputs = self._forward(batch)
        payload.check_outputs(self._agreed.outputs, outputs, rows, padded)
        self._forwards += 1
        row = 0
        for piece in pieces:
            job = jobs[piece.request]
            request = job.request
            plane = self._planes[job.lane.index]
            take = slice(row, row + piece.rows)
            plane.write(request.sequence, request.batch, request.seq, piece.start, outputs, take)
            job.composition = Composition(self._forwards, row, rows, padded)
            row = take.stop

    def _combine(self, jobs: Sequence[_Job], pieces: Sequence[Piece]) -> Batch:
        """The rows of `pieces` as one batch of the teacher's own memory, padded where lengths differ.

        Always a copy: the slots' memory must not outlive the requests in the teacher's hands.
        """
        parts = [_rows(jobs[piece.request].request, piece) for piece in pieces]
        if _alike(parts):
            return Batch(self._to_device(np.concatenate([ids for ids, _ in parts])), None)
        rows, seq = sum(piece.rows for piece in pieces), max(piece.seq for piece in pieces)
        input_ids = np.full((rows, seq), self._settings.pad_id, np.int64)
        attention_mask = np.zeros((rows, seq), np.int64)
        row = 0
        for ids, mask in parts:
            place = (slice(row, row + ids.shape[0]), slice(0, ids.shape[1]))
            input_ids[place] = ids
            attention_mask[place] = 1 if mask is None else mask
            row += ids.shape[0]
        return Batch(self._to_device(input_ids), self._to_device(attention_mask))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """`array` as int64 on the teacher's device."""
        tensor = torch.from_numpy(array if array.dtype == np.int64 else array.astype(np.int64))
        return tensor if self._device.type == "cpu" else tensor.to(self._device)

    def _finish(self, jobs: Sequence[_Job], pieces: Sequence[Piece], started_ns: int, trouble: _Trouble | None) -> None:
        """Count the pieces' rows as done, and publish every request that has all of its rows."""
        for piece in pieces:
            job = jobs[piece.request]
            job.done += piece.rows
            if trouble and job.error is None:
                job.error = trouble.traceback
                logger.warning("rank %d's forward raised %s; the rank is told", job.lane.index, trouble.summary)
            if job.done == job.request.batch:
                self._publish(job, started_ns)

    def _publish(self, job: _Job, started_ns: int) -> None:
        ring, sequence = job.lane.ring, job.request.sequence
        ring.write_reply(sequence, job.composition, job.error)
        ring.publish_reply(sequence)
        self._session.ring_readers(job.lane)
        if self._trace:
            self._hand_over("reply", job, started_ns)

    def _hand_over(self, event: str, job: _Job, since_ns: int) -> None:
        assert self._trace
        request = job.request
        nbytes = len(request.ids)
        if event == "reply" and job.error is None:
            views = self._planes[job.lane.index].views(request.sequence, request.batch, request.seq)
            nbytes = sum(tensor.nbytes for tensor in views.values())
        self._trace.hand_over(
            event,
            lane=job.lane.index,
            step=request.step,
            sequence=request.sequence,
            slot=request.sequence % job.lane.ring.depth,
            shape=(request.batch, request.seq),
            nbytes=nbytes,
            since_ns=since_ns,
        )


def _alike(parts: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> bool:
    """No mask, and rows of one length."""
    seq = parts[0][0].shape[1]
    return all(mask is None and ids.shape[1] == seq for ids, mask in parts)


def _rows(request: Request, piece: Piece) -> tuple[np.ndarray, np.ndarray | None]:
    """The IDs and the mask of a piece, in the slot's memory."""
    shape = (request.batch, request.seq)
    ids = np.frombuffer(request.ids, _ID_TYPES[request.itemsize]).reshape(shape)
    if request.mask is None:
        return ids[piece.start : piece.stop], None
    return ids[piece.start : piece.stop], np.frombuffer(request.mask, np.uint8).reshape(shape)[piece.start : piece.stop]


def _is_out_of_memory(error: Exception) -> bool:
    """A GPU's or the CPU allocator's; the latter is a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _poisons_the_device(error: Exception) -> bool:
    """A CUDA error other than out of memory: no later forward of this process can succeed."""
    return not _is_out_of_memory(error) and ("CUDA error" in str(error) or type(error).__name__ == "AcceleratorError")
