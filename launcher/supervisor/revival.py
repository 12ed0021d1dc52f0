"""What becomes of a run whose teacher has died: a new one is started, training goes on without, or the run ends.

A teacher that was ready once is started again teacher.restarts times. Its ranks wait, or are served by the other replicas
meanwhile: the lanes of a dead teacher are given to living ones, and asked back for the new one once it is ready. What was
submitted and not answered is in the ring; whoever serves the lane next answers it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, MutableMapping
from typing import Protocol

from launcher.console.terminal import Console
from launcher.console.text import seconds
from launcher.plan import replicas
from launcher.plan.plan import JobSpec
from launcher.process.job import Job
from launcher.supervisor.cause import Cause
from shmbridge.config import Config
from shmbridge.output_spec import Offer
from shmbridge.shm.owner import Owner
from shmbridge.shm.status import Phase

_LONGEST_PAUSE_S = 60.0


class Start(Protocol):
    def __call__(self, spec: JobSpec) -> Job:
        """Start a job."""


class Revival:
    """Of the teachers of one run."""

    def __init__(self, config: Config, owner: Owner, start: Start, console: Console) -> None:
        self.lost: set[int] = set()  # replicas that no new one follows; training goes on without them
        self._config = config
        self._owner = owner
        self._start = start
        self._console = console
        self._ready: set[int] = set()  # replicas that have been ready
        self._agreed: Offer | None = None
        self._started = 0
        self._died: dict[int, float] = {}  # replicas that are not ready again: since when, monotonic seconds
        self._due: dict[int, float] = {}  # those that are still to be started: when

    @property
    def excused(self) -> set[int]:
        """Replicas whose death ends no run: they are lost, or a new one is coming."""
        return self.lost | set(self._due)

    def note_ready(self, offered: Offer | None) -> None:
        """Take note of the replicas that are ready, and, the first time, of what they offer."""
        self._agreed = self._agreed or offered
        generation = max(1, self._owner.generation)
        for index, record in enumerate(self._owner.control.teachers):
            if (record.ready == generation or record.phase is Phase.IDLE) and index not in self.excused:
                self._ready.add(index)
                if index in self._died:
                    self._is_back(index)

    def survives(self, found: Cause, job: Job) -> bool:
        """Whether the run goes on although this teacher has died; what is needed for it is begun."""
        replica, now = found.rank, time.monotonic()
        if replica not in self._ready:
            return False  # it never loaded: the next one would not either
        pause_s = self._pause_s(now - self._died.get(replica, now))
        if pause_s is None and self._config.on_teacher_lost != "continue":
            return False
        job.kill()
        self._died.setdefault(replica, now)
        if pause_s is None:
            self.lost.add(replica)
            self._console.say(f"{found.sentence}; no new one follows, and training goes on (on_teacher_lost=continue)")
            return True
        self._started += 1
        self._due[replica] = now + pause_s
        allowed = self._config.teacher.restarts
        often = f"restart {self._started} of {allowed}" if self._started <= allowed else "on_teacher_lost=wait"
        self._console.say(f"{found.sentence}; training waits for a new one ({often})")
        return True

    def _pause_s(self, gone_s: float) -> float | None:
        """How long to wait before the next start; None: there is none."""
        if self._started < self._config.teacher.restarts:
            return 0.0 if self._started == 0 else min(2.0 ** (self._started - 1), _LONGEST_PAUSE_S)
        if self._config.on_teacher_lost == "wait" and gone_s < self._config.timeouts.request_s:
            beyond = self._started - self._config.teacher.restarts
            return min(2.0**beyond, _LONGEST_PAUSE_S)
        return None

    def advance(self, jobs: MutableMapping[str, Job]) -> None:
        """Give the lanes of the dead to the living, and start the new ones that are due."""
        self._give_lanes_away(jobs)
        for replica, at in list(self._due.items()):
            name, old = _job_of(jobs, replica)
            if old.exit and time.monotonic() >= at:
                del self._due[replica]
                self._owner.control.teachers[replica].clear()
                jobs[name] = self._start(old.spec)

    def differing(self) -> str:
        """How the offer of a new teacher differs from the first one's; empty where none does."""
        for replica in self._died:
            text = self._owner.control.teachers[replica].offer
            if text is not None and self._agreed:
                found = Offer.decode(text).differs(self._agreed)
                if found:
                    who = replicas.called(replica, len(self._owner.control.teachers))
                    return f"the new {who} offers something else than the first one: {found}. Did the model change on the disk?"
        return ""

    def _is_back(self, replica: int) -> None:
        took = time.monotonic() - self._died.pop(replica)
        count = len(self._owner.control.teachers)
        self._console.say(f"{replicas.called(replica, count)} is back after {seconds(took)}")
        for lane in self._owner.lanes:
            if replicas.home(lane.index, count) == replica != lane.teacher:
                self._owner.ask_to_hand_over(lane.index, replica)

    def _give_lanes_away(self, jobs: Mapping[str, Job]) -> None:
        """Lanes of replicas that have no process: to their own replica where it lives, else to the living in turn."""
        ended = {job.spec.replica for job in jobs.values() if job.exit}
        living = self._living(ended)
        for lane in self._owner.lanes:
            home = replicas.home(lane.index, len(self._owner.control.teachers))
            if lane.teacher in ended and living and (lane.teacher in self.excused or lane.teacher != home):
                heir = home if home in living else living[lane.index % len(living)]
                self._owner.hand_over(lane.index, heir)
            elif lane.wanted_teacher in ended & self.excused and lane.teacher not in ended:
                self._owner.ask_to_hand_over(lane.index, lane.teacher)  # it stays where it is
        for replica in self.lost & ended:
            record = self._owner.control.teachers[replica]
            if not record.lost:
                record.set_lost()
                self._owner.ring_all()

    def _living(self, ended: Collection[int | None]) -> list[int]:
        """Replicas that serve."""
        generation = self._owner.generation
        return [
            index
            for index, record in enumerate(self._owner.control.teachers)
            if index not in self._died
            and index not in ended
            and record.ready == generation
            and record.phase is not Phase.CLOSED
        ]


def _job_of(jobs: Mapping[str, Job], replica: int) -> tuple[str, Job]:
    return next((name, job) for name, job in jobs.items() if job.spec.replica == replica)
