"""The ranks of the training group, as the launcher watches them from outside."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable, Sequence

from launcher.hang.snapshot import ranks_among
from launcher.process import signals
from launcher.process.job import Job
from shmbridge.shm import process
from shmbridge.shm.process import Identity
from shmbridge.shm.session import Lane


class Ranks:
    """The ranks of one generation: who has signed in, and when which of them ended."""

    def __init__(self, lanes: Sequence[Lane], count: int, until_closed: bool = True) -> None:
        """Without `lanes` the bridge is off. `until_closed`: a rank that has closed its bridge does not come back."""
        self.count = count
        self.ended_ns: dict[int, int] = {}  # by rank, CLOCK_MONOTONIC
        self._lanes = lanes
        self._until_closed = until_closed
        self._watched: dict[int, int] = {}  # rank -> pidfd

    def identity(self, rank: int) -> Identity | None:
        """None until the rank has signed in."""
        return self._lanes[rank].records[0].identity if self._lanes else None

    @property
    def all_signed_in(self) -> bool:
        return bool(self._lanes) and not self.absent

    @property
    def absent(self) -> list[int]:
        """Those that have not connected to the bridge; empty where it is off."""
        return [lane.index for lane in self._lanes if not lane.records[0].identity]

    def finished(self, ranks: Iterable[int]) -> bool:
        """Their teacher has nobody left to serve: each of `ranks` has ended, or has closed its bridge and does not come back
        (teacher.serve_until)."""
        return all(
            rank in self.ended_ns or (self._lanes[rank].ring.closed and (self._until_closed or self._is_gone(rank)))
            for rank in ranks
        )

    def _is_gone(self, rank: int) -> bool:
        """Looked up now: its teacher, which ends right after it, may be seen first."""
        who = self.identity(rank)
        return who is None or process.state_of(who) in ("gone", "zombie")

    @property
    def with_save_hook(self) -> list[int]:
        """Those that are to save before they stop, and have not ended."""
        return [
            lane.index
            for lane in self._lanes
            if lane.records[0].saves and not lane.ring.closed and lane.index not in self.ended_ns
        ]

    def failed(self, ranks: Iterable[int]) -> bool:
        """One of `ranks` has written a failure, be it one that follows from another's."""
        return any(self._lanes[rank].records[0].failure for rank in ranks)

    def watch(self) -> list[tuple[int, int]]:
        """File descriptors that become readable when a rank ends."""
        return [(fd, select.POLLIN) for fd in self._watched.values()]

    def update(self) -> None:
        """Take note of the ranks that have signed in, and of those that have ended."""
        poll = select.poll()
        for lane in self._lanes:
            who = lane.records[0].identity
            if who and lane.index not in self._watched and lane.index not in self.ended_ns:
                fd = process.open_pidfd(who)
                if fd is None:
                    self.ended_ns[lane.index] = time.monotonic_ns()
                else:
                    self._watched[lane.index] = fd
        for fd in self._watched.values():
            poll.register(fd, select.POLLIN)
        ended = {fd for fd, _ in poll.poll(0)}
        for rank in [rank for rank, fd in self._watched.items() if fd in ended]:
            self.ended_ns[rank] = time.monotonic_ns()
            os.close(self._watched.pop(rank))

    def forward(self, number: signal.Signals, training: Job | None) -> str:
        """Send a user's signal to each rank that handles it, past torchrun. Says what was done."""
        found = sorted(self._processes(training).items())
        handling = {rank for rank, who in found if signals.handles(who.pid, number)}
        # At once: a rank that the first one tells to end would meet the signal when Python has taken its handler down.
        sent = [str(rank) for rank, who in found if rank in handling and process.send(who, number)]
        spared = [str(rank) for rank, _ in found if str(rank) not in sent]
        if not sent:
            return f"{number.name} was sent to no rank: none has a handler for it"
        rest = f"; not to {', '.join(spared)}, without a handler" if spared else ""
        return f"{number.name} was sent to rank {', '.join(sent)}{rest}"

    def _processes(self, training: Job | None) -> dict[int, Identity]:
        """By rank: from the records, else torchrun's children, which tell their LOCAL_RANK."""
        found = ranks_among(training.children() if training else ())
        found |= {lane.index: who for lane in self._lanes if (who := lane.records[0].identity)}
        return found

    def close(self) -> None:
        for fd in self._watched.values():
            os.close(fd)
        self._watched = {}
