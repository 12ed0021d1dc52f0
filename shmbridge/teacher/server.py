"""The teacher's loop: it collects requests, runs forward(batch) -> named tensors with a leading batch axis, and publishes replies.

Each round combines the collected requests into one forward, or into as few as teacher.max_batch_tokens and teacher.max_padding
allow, and gives every rank its own rows.

A forward that runs out of memory is halved and tried again. A forward that raises anything else is tried again request by request,
so that only the rank whose request causes the error gets it. Every request is answered or failed; none is dropped.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from shmbridge.errors import AttachError
from shmbridge.log import Trace, logger
from shmbridge.output_spec import Extent, Offer, reply_bytes
from shmbridge.plane import cuda_runtime, select
from shmbridge.plane.base import TeacherPlane
from shmbridge.plane.cuda_slab import Slabs
from shmbridge.shm.record import Phase
from shmbridge.shm.ring import Composition
from shmbridge.shm.session import Lane
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher import payload
from shmbridge.teacher.batch import Answer, Forward, choice, combine, first_position, packed, tokens
from shmbridge.teacher.compose import Piece, TokenLimit, by_request, compose, halve, padded_tokens
from shmbridge.teacher.payload import Encoder, Rows
from shmbridge.teacher.scheduler import Collector
from shmbridge.teacher.stream import Publisher, Streams


class _Trouble(NamedTuple):
    """What a forward raised, as text: the exception itself would keep its frames, and their tensors, alive."""

    summary: str
    traceback: str
    out_of_memory: bool


class Server:
    """Serves the lanes of one teacher until every rank has closed."""

    def __init__(
        self,
        session: TeacherSession,
        forward: Forward,
        encoder: Encoder,
        agreed: Offer,
        device: torch.device,
        slabs: Slabs | None = None,
        limit: TokenLimit | None = None,
    ) -> None:
        """Map the reply memory, which the owner has created for `agreed`. `slabs` and `limit` are those of the process's earlier
        generations. Raises AttachError."""
        self._session = session
        self._forward = forward
        self._encoder = encoder
        self._outputs = agreed.outputs
        self._device = device
        self._settings = session.settings.teacher
        self._with_targets = session.settings.payload.logprobs is not None
        self._limit = limit or TokenLimit(self._settings.max_batch_tokens)
        self._watch = _Stopwatch(device)
        self._forwards = 0
        self._tokens = self._padded_tokens = 0
        shape = session.control.shape
        self._chunks = shape.chunks
        self._agreed = agreed
        self._slabs = {} if slabs is None else slabs
        self._planes = {lane.index: self._plane(lane) for lane in session.served}
        self._publisher = Publisher()
        self._streams = Streams(
            encoder,
            self._planes,
            self._publisher,
            shape.chunk_positions,
            self._sent_chunk,
            lambda answer, error: self._fail(answer, _trouble(error)),
            self._publish,
        )
        self._collector = Collector(session, self._streams, self._skip, self._adopt, self._publisher.check)
        self._trace = Trace.of("teacher", session.index)

    def serve(self) -> None:
        """Open the startup barrier and answer until every lane is closed, or training is done.

        Raises:
            PeerLost: the session has failed, or its launcher is gone.
        """
        self._session.open_barrier()
        record = self._session.record
        record.enter(Phase.COLLECTING)
        with torch.inference_mode():
            while answers := self._collector.collect():
                record.enter(Phase.FORWARD)
                self._answer(answers)
                self._collector.answered(answers)
                record.enter(Phase.COLLECTING)
        self._publisher.close()
        self._settle()
        record.enter(Phase.CLOSED)
        logger.info(self._summary())

    def close(self) -> None:
        """Nothing is served any more. Without what calls back into this, the generation's memory is unmapped with it."""
        del self._streams, self._collector

    def _settle(self) -> None:
        """Before this process goes, and its GPU memory with it: the ranks have what was published, within timeouts.shutdown_s."""
        self._session.wait(self._settled, time.monotonic() + self._session.settings.timeouts.shutdown_s)

    def _settled(self) -> bool | None:
        lanes = [lane for lane in self._session.served if not lane.ring.closed and not self._session.gone(lane)]
        return True if all(self._planes[lane.index].settled() for lane in lanes) else None

    # Answering

    def _answer(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            request = answer.request
            self._session.record.at(request.step, request.sequence)
            if self._trace:
                self._hand_over("collect", answer, len(request.ids), request.submitted_ns)
        for kind in {packed(answer.request) for answer in answers}:
            alike = [answer for answer in answers if packed(answer.request) is kind]
            shapes = [answer.request.extent[:2] for answer in alike]
            for pieces in compose(shapes, self._limit.tokens, self._settings.max_padding):
                self._run(alike, pieces)

    def _run(self, answers: Sequence[Answer], pieces: list[Piece]) -> None:
        """Run one forward; divide and retry it where it raises. An error that ends the teacher is raised.

        The retries run after the except clause: the exception's traceback would keep the failed forward's activations alive.
        """
        if padded_tokens(pieces) > self._limit.tokens:  # it fell since they were composed
            halves = halve(pieces)
            if len(halves) == 2:
                self._run_each(answers, halves)
                return
        trouble: _Trouble | None = None
        try:
            self._forward_and_write(answers, pieces)
        except AttachError:
            raise
        except Exception as error:
            trouble = _trouble(error)
        if trouble is None and self._limit.succeeded(padded_tokens(pieces)):
            logger.info("forwards take %d tokens at most again", self._limit.tokens)
        if trouble is None or not self._retry(answers, pieces, trouble):
            self._finish(answers, pieces, trouble)

    def _retry(self, answers: Sequence[Answer], pieces: list[Piece], trouble: _Trouble) -> bool:
        """Halve a forward that ran out of memory; run any other again request by request. False where nothing can be divided."""
        halves = halve(pieces)
        if trouble.out_of_memory and len(halves) == 2:
            self._limit.failed(padded_tokens(pieces))
            logger.warning("the teacher ran out of memory; forwards now take %d tokens at most", self._limit.tokens)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._run_each(answers, halves)
            return True
        alone = by_request(pieces)
        if len(alone) > 1:
            logger.warning("a forward for several ranks raised %s; trying them one by one", trouble.summary)
            self._run_each(answers, alone)
            return True
        return False

    def _run_each(self, answers: Sequence[Answer], forwards: Sequence[list[Piece]]) -> None:
        for pieces in forwards:
            self._run(answers, pieces)

    def _forward_and_write(self, answers: Sequence[Answer], pieces: Sequence[Piece]) -> None:
        """Run one forward. Write its rows into the reply slots, or keep them where replies are streamed."""
        self._watch.start()
        requests = [answer.request for answer in answers]
        batch = combine(requests, pieces, self._settings.pad_id, self._device)
        rows, seq = batch.input_ids.shape
        whole = not self._chunks and not any("positions" in requests[piece.request].arrays for piece in pieces)
        returned = self._encoder.prepare(self._forward(batch), rows, seq, whole)
        chosen = []
        row = 0
        for piece in pieces:
            wanted = choice(requests[piece.request], piece, row, self._device, self._with_targets)
            chosen.append(self._encoder.select(returned, wanted))
            row += piece.rows
        if not self._chunks:
            for piece, part in zip(pieces, chosen, strict=True):
                answer, request = answers[piece.request], requests[piece.request]
                position = first_position(request, piece)
                for start, outputs in self._encoder.encode(part):
                    plane = self._planes[answer.lane.index]
                    plane.write(request.sequence, request.extent, outputs, position + start, piece.start)
        self._note(answers, pieces, chosen, (rows, seq), self._watch.stop())

    def _note(
        self, answers: Sequence[Answer], pieces: Sequence[Piece], chosen: list[Rows], shape: tuple[int, int], took: int
    ) -> None:
        """Note in each answer the forward that computed it, and keep the rows that are still to be streamed."""
        real = tokens([answer.request for answer in answers], pieces)
        self._forwards += 1
        self._tokens += real
        self._padded_tokens += shape[0] * shape[1]
        row = 0
        for piece, part in zip(pieces, chosen, strict=True):
            answer = answers[piece.request]
            forward_ns = answer.composition.forward_ns + took
            answer.composition = Composition(self._forwards, row, *shape, real, forward_ns)
            if self._chunks:
                answer.parts.append(payload.kept(part))
            row += piece.rows

    def _finish(self, answers: Sequence[Answer], pieces: Sequence[Piece], trouble: _Trouble | None) -> None:
        """Count the pieces' rows as done, and publish every request that has all of its rows."""
        for piece in pieces:
            answer = answers[piece.request]
            answer.done += piece.rows
            if trouble and answer.error is None:
                self._fail(answer, trouble)
            if answer.done == answer.request.extent.batch:
                if self._chunks and answer.error is None:
                    self._streams.begin(answer)
                else:
                    self._publish(answer)

    def _adopt(self, lane: Lane) -> None:
        self._planes[lane.index] = self._plane(lane)

    def _plane(self, lane: Lane) -> TeacherPlane:
        return select.of_teacher(self._session, lane, self._agreed, self._device, self._slabs)

    def _fail(self, answer: Answer, trouble: _Trouble) -> None:
        answer.error = trouble.traceback
        logger.warning("rank %d's forward raised %s; the rank is told", answer.lane.index, trouble.summary)

    def _publish(self, answer: Answer) -> None:
        ring, sequence = answer.lane.ring, answer.request.sequence
        ring.write_reply(sequence, answer.composition, answer.error, answer.echo)
        whole = not self._chunks and answer.error is None
        self._seal(answer, self._planes[answer.lane.index].seal(sequence) if whole else None)

    def _skip(self, answer: Answer) -> None:
        """Publish an empty reply: the request was abandoned."""
        answer.lane.ring.skip_reply(answer.request.sequence)
        self._seal(answer, None, skipped=True)

    def _seal(self, answer: Answer, arrived: Callable[[], None] | None, *, skipped: bool = False) -> None:
        """The reply is written. Publish it when `arrived` has returned."""
        answer.lane.ring.seal_reply(answer.request.sequence)
        self._publisher.after(arrived, lambda: self._published(answer, skipped))

    def _published(self, answer: Answer, skipped: bool) -> None:
        answer.lane.ring.publish_reply(answer.request.sequence)
        self._session.ring_members(answer.lane)
        if self._trace and not skipped:
            nbytes = 0 if self._chunks or answer.error else reply_bytes(self._outputs, answer.request.extent)
            self._hand_over("reply", answer, nbytes, time.monotonic_ns() - answer.composition.forward_ns)

    # Streams

    def _sent_chunk(self, answer: Answer, count: int) -> None:
        self._session.ring_members(answer.lane)
        if self._trace:
            nbytes = reply_bytes(self._outputs, Extent(0, 0, count))
            self._hand_over("chunk", answer, nbytes, answer.request.submitted_ns)

    # Log

    def _summary(self) -> str:
        padding = 1 - self._tokens / self._padded_tokens if self._padded_tokens else 0.0
        forwards = "1 forward" if self._forwards == 1 else f"{self._forwards} forwards"
        return f"answered this training group in {forwards}; {padding:.1%} of their tokens were padding"

    def _hand_over(self, event: str, answer: Answer, nbytes: int, since_ns: int) -> None:
        assert self._trace
        request = answer.request
        self._trace.hand_over(
            event,
            lane=answer.lane.index,
            step=request.step,
            sequence=request.sequence,
            slot=request.sequence % answer.lane.ring.depth,
            shape=(request.extent.batch, request.extent.seq),
            nbytes=nbytes,
            since_ns=since_ns,
        )


def _trouble(error: Exception) -> _Trouble:
    """What a forward raised. Raises it where no later call of CUDA can succeed."""
    if cuda_runtime.is_sticky(error):
        raise error
    return _Trouble(repr(error), "".join(traceback.format_exception(error)), cuda_runtime.is_out_of_memory(error))


class _Stopwatch:
    """How long the device takes for a forward, without its host waiting for it.

    On the CPU a forward that has returned is complete. On a GPU it has only been launched, so `stop` gives the time of the latest
    forward that is complete.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._latest_ns = 0

    def start(self) -> None:
        """A forward begins."""
        self._began = self._event() if self._gpu else None
        self._began_ns = time.monotonic_ns()

    def stop(self) -> int:
        """A forward has returned. Returns nanoseconds."""
        if self._began is None:
            return time.monotonic_ns() - self._began_ns
        self._running.append((self._began, self._event()))
        while self._running and self._running[0][1].query():
            began, ended = self._running.popleft()
            self._latest_ns = round(began.elapsed_time(ended) * 1e6)
        return self._latest_ns

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event
