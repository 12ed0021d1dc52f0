"""The ranks of the training group, as the launcher watches them from outside."""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Iterable, Sequence

from launcher.hang.snapshot import ranks_among
from launcher.process import signals
from launcher.process.job import Job
from shmbridge.shm import process
from shmbridge.shm.process import Peer
from shmbridge.shm.session import Lane


class Ranks:
    """The ranks of one generation: who has signed in, and when which of them ended."""

    def __init__(self, lanes: Sequence[Lane], count: int, until_closed: bool = True) -> None:
        """Without `lanes` the bridge is off. `until_closed`: a rank that has closed its bridge does not come back."""
        self.count = count
        self.ended_ns: dict[int, int] = {}  # by rank, CLOCK_MONOTONIC
        self._lanes = lanes
        self._until_closed = until_closed
        self._alive: dict[int, Peer] = {}  # by rank: who has signed in and was not seen to end

    @property
    def absent(self) -> list[int]:
        """Those that have not connected to the bridge; empty where it is off."""
        return [lane.index for lane in self._lanes if not lane.records[0].identity]

    @property
    def with_save_hook(self) -> list[int]:
        """Those that are to save before they stop, and have not ended."""
        saving = [lane for lane in self._lanes if lane.records[0].saves and not lane.ring.closed]
        return [lane.index for lane in saving if lane.index not in self.ended_ns]

    def finished(self, ranks: Iterable[int]) -> bool:
        """Their teacher has nobody left to serve: each of `ranks` has ended, or has closed its bridge and does not come back
        (teacher.serve_until)."""
        return all(
            rank in self.ended_ns or (self._lanes[rank].ring.closed and (self._until_closed or self._is_gone(rank)))
            for rank in ranks
        )

    def _is_gone(self, rank: int) -> bool:
        """Looked up now: its teacher, which ends right after it, may be seen first."""
        who = self._lanes[rank].records[0].identity
        return who is None or process.state_of(who) in ("gone", "zombie")

    def failed(self, ranks: Iterable[int]) -> bool:
        """One of `ranks` has written a failure, be it one that follows from another's."""
        return any(self._lanes[rank].records[0].failure for rank in ranks)

    def watch(self) -> list[tuple[int, int]]:
        """File descriptors that become readable when a rank ends."""
        return [(peer.fd, select.POLLIN) for peer in self._alive.values() if peer.fd is not None]

    def update(self) -> None:
        """Take note of the ranks that have signed in, and of those that have ended."""
        for lane in self._lanes:
            who = lane.records[0].identity
            if who and lane.index not in self._alive and lane.index not in self.ended_ns:
                self._alive[lane.index] = Peer(who)
        for rank in [rank for rank, peer in self._alive.items() if not peer.alive()]:
            self.ended_ns[rank] = time.monotonic_ns()
            del self._alive[rank]

    def forward(self, number: signal.Signals, training: Job | None) -> str:
        """Send a user's signal to each rank that handles it, past torchrun. Says what was done.

        The ranks are those of the records, else torchrun's children, which tell their LOCAL_RANK.
        """
        found = ranks_among(training.children() if training else ())
        found |= {lane.index: who for lane in self._lanes if (who := lane.records[0].identity)}
        handling = [rank for rank in sorted(found) if signals.handles(found[rank].pid, number)]
        # At once: a rank that the first one tells to end would meet the signal when Python has taken its handler down.
        sent = [rank for rank in handling if process.send(found[rank], number)]
        spared = ", ".join(str(rank) for rank in sorted(found) if rank not in sent)
        if not sent:
            return f"{number.name} was sent to no rank: none has a handler for it"
        rest = f"; not to {spared}, without a handler" if spared else ""
        return f"{number.name} was sent to rank {', '.join(map(str, sent))}{rest}"
