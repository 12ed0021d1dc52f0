"""CPU time of a run in which nothing happens: who uses how much, against the target."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import tables
from tests.launcher.running import Launched, launch

TARGET = 0.001  # of one core: teacher, ranks and launcher, each
_SETTLES_S = 2.0
_TEACHER = """
import os, torch
def build(settings):
    print("the teacher is process", os.getpid(), flush=True)
    return lambda batch: {"logits": torch.zeros(*batch.input_ids.shape, 8)}
"""
_TRAIN = """
import os, time, torch, shmbridge
torch.set_num_threads(1)
with shmbridge.connect() as bridge:
    bridge.wait_ready()
    for step in range(3):
        bridge.exchange(torch.ones(2, 4, dtype=torch.int64), step=step)
    print(f"rank {bridge.rank} is process {os.getpid()}", flush=True)
    if bridge.rank == 0:
        bridge.exchange(torch.ones(2, 4, dtype=torch.int64), step=3)
    time.sleep(600)
"""


@dataclass(frozen=True)
class Idle:
    """One process."""

    who: str
    seconds: float  # of CPU time
    over_s: float
    ours: bool  # torchrun's own polling is torch's

    @property
    def share(self) -> float:
        return self.seconds / self.over_s


def measure(over_s: float) -> list[Idle]:
    """Over so many seconds of a run whose teacher is idle, whose rank 0 waits for a reply and whose rank 1 sleeps."""
    flags = ["--teacher", "toy:build", "--cpu", "2", "ring.max_tokens=64", "teacher.collect=lockstep"]
    with TemporaryDirectory() as directory:
        Path(directory, "toy.py").write_text(_TEACHER)
        Path(directory, "train.py").write_text(_TRAIN)
        with launch(Path(directory), *flags, "--", "train.py") as run:
            return _measured(run, over_s)


def _measured(run: Launched, over_s: float) -> list[Idle]:
    names = {"teacher": "the teacher", "rank 0, waits": "rank 0", "rank 1, sleeps": "rank 1"}
    who = {"launcher": run.process.pid, **{name: run.pid_of(actor) for name, actor in names.items()}}
    shims = run.processes("shim.py")
    (torchrun,) = [pid for pid in run.processes("elastic.py") if pid not in shims]
    who |= {f"shim {number}": pid for number, pid in enumerate(shims)} | {"torchrun": torchrun}
    time.sleep(_SETTLES_S)  # the launcher's loop slows down
    before, began = {name: _cpu_s(pid) for name, pid in who.items()}, time.monotonic()
    time.sleep(over_s)
    over_s = time.monotonic() - began
    return [Idle(name, _cpu_s(pid) - before[name], over_s, name != "torchrun") for name, pid in who.items()]


def reached(found: Sequence[Idle]) -> bool:
    return all(one.share <= TARGET for one in found if one.ours)


def table(found: Sequence[Idle]) -> Any:
    made = tables.table(texts=["idle process"], numbers=["CPU time", "of a core"])
    for one in found:
        made.add_row(one.who, f"{one.seconds * 1e3:.1f} ms in {one.over_s:.0f} s", f"{one.share:.3%}")
    return made


def told(found: Sequence[Idle]) -> str:
    ours = [one for one in found if one.ours]
    most = max(ours, key=lambda one: one.share)
    verdict = "reached" if reached(found) else "MISSED"
    return f"target {TARGET:.1%} of a core each: {verdict}; the most takes {most.who}, {most.share:.3%}; all of ours {sum(one.share for one in ours):.3%}"


def _cpu_s(pid: int) -> float:
    """Of all its threads, to the nanosecond where the kernel tells."""
    total = 0
    for name in os.listdir(f"/proc/{pid}/task"):
        try:
            total += int(Path(f"/proc/{pid}/task/{name}/schedstat").read_text().split()[0])
        except FileNotFoundError:
            continue
    return total / 1e9
