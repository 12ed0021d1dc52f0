"""Real processes for tests: an owner in the test, forked teachers and ranks, and bounded waits on conditions."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shmbridge import config
from shmbridge.output_spec import Offer
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.owner import Owner
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.session import Token
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher.batch import Batch, Forward
from shmbridge.teacher.main import serve

PATIENCE_S = 60.0
PLANE: list[str] = []  # overrides that choose the plane of every bench; see tests/process/conftest.py


def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Poll `condition` until it is true; fail loudly after a minute."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError(f"{what} did not come true within {PATIENCE_S:.0f} s")


def switches(pid: int) -> int:
    """How often a process has gone to sleep."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))


class Child:
    """A forked process that runs one function and exits 0 unless it raised."""

    def __init__(self, body: Callable[[], Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                body()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code, minus the signal's number for a signal, or None while it lives."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def join(self) -> int:
        until(lambda: self.poll() is not None, f"the end of process {self.pid}")
        assert self._status is not None
        return self._status

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGCONT)
            self.kill()
            self.join()


class Bench:
    """One session of the test's own, with its processes."""

    def __init__(self, lanes: int = 1, *overrides: str, teachers: int = 1) -> None:
        defaults = ["teacher.model=tests:teacher", "ring.max_tokens=256", "parity=false"]
        self.settings = config.load(overrides=[*defaults, *PLANE, *overrides])
        self.owner = Owner(self.settings, lanes, teachers)
        self.token: Token = self.owner.start_generation()
        self.children: list[Child] = []

    def start(self, body: Callable[[], Any]) -> Child:
        child = Child(body)
        self.children.append(child)
        return child

    def teacher(self, forward: Forward) -> Child:
        """A teacher process around `forward`, up to and past the startup barrier."""
        child = self.start(lambda: self._teach(forward))
        record = self.owner.control.teachers[0]
        until(lambda: record.offer or child.poll() is not None, "the teacher's offer")
        assert record.offer, "the teacher ended before its offer"
        self.owner.create_replies(Offer.decode(record.offer))
        return child

    def _teach(self, forward: Forward) -> None:
        torch.set_num_threads(1)
        serve(TeacherSession(self.token), forward, torch.device("cpu"))

    def rank(self, lane: int, body: Callable[[Bridge], Any]) -> Child:
        """A rank process that runs `body` with its bridge."""
        return self.start(lambda: self._train(lane, body))

    def _train(self, lane: int, body: Callable[[Bridge], Any]) -> None:
        with self.bridge(lane) as bridge:
            body(bridge)

    def bridge(self, lane: int = 0) -> Bridge:
        """A rank in the test's own process."""
        return Bridge(RankSession(self.token, lane))

    def close(self) -> None:
        for child in self.children:
            child.end()
        self.owner.close()


@contextmanager
def bench(lanes: int = 1, *overrides: str) -> Iterator[Bench]:
    it = Bench(lanes, *overrides)
    try:
        yield it
    finally:
        it.close()


class Echo:
    """A teacher whose outputs tell which rows it was given: the IDs, their mask, and the batch's shape."""

    vocab_size = 1000

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        rows, seq = batch.input_ids.shape
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        return {
            "ids": batch.input_ids.clone(),
            "mask": mask,
            "shape": torch.tensor([[rows, seq]]).repeat(rows, 1),
        }
