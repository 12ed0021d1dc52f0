"""When a round of the teacher begins, and which requests are in it.

A round takes the oldest request of every lane that has one. A lane's second request waits for the next round, so that ranks
with requests in flight meet in the same forward. So do ranks that come a little apart: greedy collecting waits for every
lane for teacher.linger_ms, and for those of the last round up to half as long as that round took. Lockstep waits for all.

Lanes that are closed, whose rank has ended, or whose last reply is still being streamed are not waited for (lockstep waits
for the stream). While it waits, streams go on.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from shmbridge.log import logger
from shmbridge.shm.session import Lane
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher.batch import Answer
from shmbridge.teacher.replies import Replies


class Collector:
    """Collects the requests of one teacher's lanes into rounds."""

    def __init__(self, session: TeacherSession, replies: Replies) -> None:
        self._session = session
        self._replies = replies
        self._lockstep = session.settings.teacher.collect == "lockstep"
        self._until_exit = session.settings.teacher.serve_until == "exited"
        self._linger_s = session.settings.teacher.linger_ms / 1000
        self._lanes = list(session.served)
        self._gone: set[int] = set()  # own lanes whose rank has ended
        self._last_round: set[int] = set()  # its lanes
        self._last_round_s = 0.0

    def answered(self, answers: Sequence[Answer]) -> None:
        """Take note of a round that is over; on a GPU, that has been launched."""
        self._last_round = {answer.lane.index for answer in answers}
        self._last_round_s = max(answer.composition.forward_ns for answer in answers) / 1e9

    def collect(self) -> list[Answer]:
        """The next round; empty when there will be none.

        Raises:
            PeerLost: the session has failed, or its launcher is gone.
        """
        wait = self._session.wait
        self._exchange_lanes()  # a teacher that always finds a request never comes to a slice's end
        while answers := wait(self._take_or_end, None, self._check):
            if len(answers) == len(self._lanes):
                return answers
            began = time.monotonic()
            if self._lockstep:
                wait(self._all_submitted, None, self._check)
            elif self._linger_s and not wait(self._all_submitted, began + self._linger_s, self._check):
                # A rank that is a little late costs a second forward if it is left behind, half of one at most if it is not.
                wait(lambda: self._all_submitted(self._last_round), began + self._last_round_s / 2, self._check)
            answers = self._take()  # again: more may have come since, and who had asked may be gone
            if answers:
                return answers
        return []

    def _take_or_end(self) -> list[Answer] | None:
        self._advance_streams()
        ended = self._ended()  # first: then a request that a rank made before it closed is seen below
        answers = self._take()
        if answers:
            return answers
        return [] if ended and not self._replies.streams else None

    def _take(self) -> list[Answer]:
        answers = []
        for lane in self._lanes:
            sequence = None if lane.index in self._replies.streams else self._next_wanted(lane)
            if sequence is not None:
                answers.append(Answer(lane, lane.ring.read_request(sequence)))
        return answers

    def _next_wanted(self, lane: Lane) -> int | None:
        """The lane's oldest request that was not abandoned. Those before it are skipped."""
        ring = lane.ring
        while (sequence := ring.next_request()) is not None and sequence < ring.abandoned:
            self._replies.skip(Answer(lane, ring.read_request(sequence)))
        return sequence

    def _all_submitted(self, among: Collection[int] | None = None) -> bool | None:
        """True when every open lane has submitted, or every one whose index is in `among`; else None."""
        self._advance_streams()
        lanes = [lane for lane in self._lanes if among is None or lane.index in among]
        return True if self._ended() or not any(self._is_awaited(lane) for lane in lanes) else None

    def _is_awaited(self, lane: Lane) -> bool:
        """Whether the lane has not submitted yet, or in lockstep has not read its streamed reply."""
        if lane.index in self._replies.streams:
            return self._lockstep
        submits = not lane.ring.closed and (self._lockstep or lane.records[0].identity is not None)
        return submits and self._next_wanted(lane) is None

    def _advance_streams(self) -> None:
        """Send one chunk of each lane. Where more might be sent, the next wait returns at once."""
        if self._replies.advance():
            self._session.bell.ring()

    def _exchange_lanes(self) -> None:
        """Take lanes over from a teacher that is gone, and give them back to the one that replaces it."""
        for lane in self._session.adopt():
            logger.info("lane %d is served by this teacher now", lane.index)
            self._replies.adopt(lane)
            self._lanes.append(lane)
        for lane in [lane for lane in self._lanes if lane.wanted_teacher != self._session.index]:
            if lane.ring.settled and lane.index not in self._replies.streams:
                self._lanes.remove(lane)
                self._session.yield_lane(lane)

    def _ended(self) -> bool:
        if self._session.training_done:
            return True
        lanes = (*self._session.own, *self._lanes)
        return all(lane.index in self._gone or (lane.ring.closed and not self._until_exit) for lane in lanes)

    def _check(self) -> None:
        """Once in each slice of a wait: a rank that is gone will neither submit nor read."""
        self._session.check()
        self._replies.publisher.check()
        self._exchange_lanes()
        for lane in [lane for lane in self._lanes if self._session.gone(lane)]:
            if not lane.ring.closed:
                logger.warning("rank %d is gone without closing; its lane is no longer served", lane.index)
            self._lanes.remove(lane)
            self._replies.streams.pop(lane.index, None)
        self._gone.update(lane.index for lane in self._session.own if self._session.gone(lane))
