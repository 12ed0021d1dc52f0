"""The teacher's loop: it collects requests, runs forward(batch) -> named tensors with a leading batch axis, and answers.

Each round combines the collected requests into one forward, or into as few as teacher.max_batch_tokens and teacher.max_padding
allow, and gives every rank its own rows.

A forward that runs out of memory is halved and tried again. A forward that raises anything else is tried again request by request,
so that only the rank whose request causes the error gets it. Every request is answered or failed; none is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from shmbridge.errors import AttachError
from shmbridge.log import logger
from shmbridge.output_spec import Offer
from shmbridge.plane.cuda_slab import Slabs
from shmbridge.shm.participant_record import Phase
from shmbridge.shm.ring import Composition
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher.batch import Answer, Forward, combine, packed, select, tokens
from shmbridge.teacher.grouping import Piece, TokenLimit, by_request, compose, halve, padded_tokens
from shmbridge.teacher.payload import Encoder
from shmbridge.teacher.replies import Replies, Trouble
from shmbridge.teacher.scheduler import Collector


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
        self._device = device
        self._settings = session.settings.teacher
        self._with_targets = session.settings.payload.logprobs is not None
        self._limit = limit or TokenLimit(self._settings.max_batch_tokens)
        self._watch = _Stopwatch(device)
        self._forwards = self._tokens = self._padded_tokens = 0
        self._replies = Replies(session, encoder, agreed, device, {} if slabs is None else slabs)
        self._collector = Collector(session, self._replies)

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
        self._replies.publisher.close()
        self._settle()
        record.enter(Phase.CLOSED)
        padding = 1 - self._tokens / self._padded_tokens if self._padded_tokens else 0.0
        forwards = "1 forward" if self._forwards == 1 else f"{self._forwards} forwards"
        logger.info("answered this training group in %s; %.1f%% of their tokens were padding", forwards, 100 * padding)

    def _settle(self) -> None:
        """Wait until the ranks have what was published, for timeouts.shutdown_s at most."""
        self._session.wait(self._replies.settled, time.monotonic() + self._session.settings.timeouts.shutdown_s)

    def _answer(self, answers: Sequence[Answer]) -> None:
        """Answer a round. An error that ends the teacher is raised."""
        for answer in answers:
            request = answer.request
            self._session.record.at(request.step, request.sequence)
            self._replies.trace("collect", answer, None, request.submitted_ns)
        for kind in {packed(answer.request) for answer in answers}:
            alike = [answer for answer in answers if packed(answer.request) is kind]
            shapes = [answer.request.extent[:2] for answer in alike]
            todo = deque(compose(shapes, self._limit.tokens, self._settings.max_padding))
            while todo:
                pieces = todo.popleft()
                if padded_tokens(pieces) > self._limit.tokens and (halves := halve(pieces)):
                    todo.extendleft(reversed(halves))  # the limit fell since they were composed
                    continue
                trouble = self._run(alike, pieces)
                if trouble and (smaller := self._divided(pieces, trouble)):
                    todo.extendleft(reversed(smaller))
                    continue
                self._finish(alike, pieces, trouble)

    def _run(self, answers: Sequence[Answer], pieces: Sequence[Piece]) -> Trouble | None:
        """Run one forward. Returns what it raised; the exception, whose traceback keeps the forward's activations alive, is gone
        before the forward is tried again."""
        try:
            self._forward_and_write(answers, pieces)
        except AttachError:
            raise
        except Exception as error:
            return Trouble.of(error)
        if self._limit.succeeded(padded_tokens(pieces)):
            logger.info("forwards take %d tokens at most again", self._limit.tokens)
        return None

    def _divided(self, pieces: Sequence[Piece], trouble: Trouble) -> list[list[Piece]]:
        """The halves of a forward that ran out of memory, or any other request by request. Empty where nothing can be divided."""
        if trouble.out_of_memory and (halves := halve(pieces)):
            self._limit.failed(padded_tokens(pieces))
            logger.warning("the teacher ran out of memory; forwards now take %d tokens at most", self._limit.tokens)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return halves
        alone = by_request(pieces)
        if len(alone) == 1:
            return []
        logger.warning("a forward for several ranks raised %s; trying them one by one", trouble.summary)
        return alone

    def _forward_and_write(self, answers: Sequence[Answer], pieces: Sequence[Piece]) -> None:
        """Run one forward. Write its rows into the reply slots, or keep them where replies are streamed."""
        self._watch.start()
        requests = [answer.request for answer in answers]
        batch = combine(requests, pieces, self._settings.pad_id, self._device)
        rows, seq = batch.input_ids.shape
        streamed = self._replies.streamed
        whole = not streamed and not any("positions" in requests[piece.request].arrays for piece in pieces)
        tensors = self._encoder.prepare(self._forward(batch), rows, seq, whole)
        selections = []
        row = 0
        for piece in pieces:
            answer = answers[piece.request]
            selection = select(tensors, answer.request, piece, row, seq, self._device, self._with_targets)
            if streamed:
                selection = selection.kept()
            else:
                self._replies.write(answer, selection, piece.start)
            selections.append((answer, row, selection))
            row += piece.rows
        took, real = self._watch.stop(), tokens(requests, pieces)
        self._forwards += 1
        self._tokens += real
        self._padded_tokens += rows * seq
        for answer, row, selection in selections:  # not before: all of it may be tried again
            forward_ns = answer.composition.forward_ns + took
            answer.composition = Composition(self._forwards, row, rows, seq, real, forward_ns)
            answer.positions += selection.positions
            if streamed:
                answer.selections.append(selection)

    def _finish(self, answers: Sequence[Answer], pieces: Sequence[Piece], trouble: Trouble | None) -> None:
        """Count the pieces' rows as done, and finish every reply that has all of its rows."""
        for piece in pieces:
            answer = answers[piece.request]
            answer.rows += piece.rows
            if trouble and answer.error is None:
                self._replies.fail(answer, trouble)
            if answer.rows == answer.request.extent.batch:
                self._replies.finish(answer)


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
