"""Whether training that has crashed is started again: as often as train.restarts says, and only while it gets on."""

from __future__ import annotations

from collections.abc import Iterable

from shmbridge.shm.session import Lane


class Restarts:
    """Counts the restarts of one run's training."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.count = 0
        self._furthest = -1  # step of all generations so far

    def refused(self, lanes: Iterable[Lane]) -> str:
        """Why training is not started again after the generation with these lanes; empty where it is, and counted.

        A generation has got on if a rank came to a later step than any before it; where the script tells no steps, if a rank
        got a reply.
        """
        if not self.allowed:
            return "train.restarts is 0"
        if self.count == self.allowed:
            return f"all {self.allowed} restarts (train.restarts) are used up"
        lanes = list(lanes)
        steps = [step for lane in lanes for record in lane.records if (step := record.step) is not None]
        furthest = max(steps, default=-1)
        if self._furthest >= 0 and furthest <= self._furthest:
            return f"it came no further than step {self._furthest} again"
        if not any(lane.ring.replied for lane in lanes):
            return "it got no reply before it crashed"
        self._furthest = max(furthest, self._furthest)
        self.count += 1
        return ""
