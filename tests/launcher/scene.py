"""A session with real processes that stand where a test wants them: a teacher and ranks with heartbeats and stacks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from launcher.hang.report import Report, make, write
from shmbridge.rank.bridge import Bridge
from shmbridge.shm import process
from shmbridge.shm.heartbeat import Heartbeat
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.record import Phase
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher.batch import Forward
from shmbridge.teacher.main import serve
from tests.harness import Bench, Child, Echo, bench, until

IDS = torch.ones((1, 4), dtype=torch.int64)


class Scene:
    """A bench whose participants are as the launcher starts them."""

    def __init__(self, on: Bench, run: Path) -> None:
        self.bench = on
        self.owner = on.owner
        self.run = run
        run.mkdir(exist_ok=True)
        on.owner.describe(msgspec.structs.replace(on.settings, run_dir=str(run)))

    def teacher(self, forward: Forward | None = None) -> Child:
        """One that has opened the barrier."""
        self.bench._teach = lambda forward: self._teach(forward)  # type: ignore[method-assign]
        child = self.bench.teacher(forward or Echo())
        until(lambda: self.owner.control.teachers[0].ready, "the teacher")
        return child

    def _teach(self, forward: Forward) -> None:
        torch.set_num_threads(1)
        session = TeacherSession(self.bench.token)
        process.write_stacks_on_signal(self.run)
        Heartbeat(session.record)
        serve(session, forward, torch.device("cpu"))

    def rank(self, lane: int, body: Callable[[Bridge], Any]) -> Child:
        """One that is past the barrier when `body` begins."""
        return self.bench.start(lambda: self._train(lane, body))

    def _train(self, lane: int, body: Callable[[Bridge], Any]) -> None:
        session = RankSession(self.bench.token, lane)
        process.write_stacks_on_signal(self.run)
        Heartbeat(session.record)
        with Bridge(session) as bridge:
            bridge.wait_ready()
            body(bridge)

    def join_group(self, rank: int) -> None:
        """A training group over gloo."""
        store = f"file://{self.run}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(self.owner.lanes))

    def waits(self, rank: int) -> None:
        """Until `rank` waits for a reply."""
        record = self.owner.lanes[rank].records[0]
        until(lambda: record.phase is Phase.WAITING, f"rank {rank} in its wait")

    def gate(self) -> Gate:
        return Gate(self.run)

    def report(self, why: str = "a test asks") -> Report:
        return write(make(self.owner, self.run, why), self.run)

    def stands(self, kind: str) -> Report:
        """The report, once its first finding is of this kind: who has just moved stands still a little later."""
        made: list[Report] = []

        def is_so() -> bool:
            made[:] = [make(self.owner, self.run, "a test asks")]
            return made[0].verdict.kind == kind

        until(is_so, f"the finding {kind!r}")
        return made[0]


class Gate:
    """Whether a child has come to a place."""

    _numbers = itertools.count()

    def __init__(self, run: Path) -> None:
        self._path = run / f"gate-{next(self._numbers)}"

    def passed(self) -> None:
        self._path.touch()

    def wait(self) -> None:
        until(self._path.exists, "the gate")


@contextmanager
def scene(tmp_path: Path, lanes: int = 1, *overrides: str) -> Iterator[Scene]:
    with bench(lanes, *overrides) as on:
        yield Scene(on, tmp_path / "run")


def sleep() -> None:
    time.sleep(600)
