"""CPU time of a run in which nothing happens: who uses how much, against the target."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables

from faultlines.rows import staged

TARGET = 0.001  # of one core: teacher, ranks and launcher, each
_SETTLES_S = 2.0


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
    with staged() as stage:
        run = stage.launch("idle", "teacher.collect=lockstep")
        ranks = [int(run.note(f"idle-{rank}")[1]) for rank in (0, 1)]
        shims = run.processes("shim.py")
        (torchrun,) = [pid for pid in run.processes("elastic.py") if pid not in shims]
        (teacher,) = [pid for pid in run.processes("shmbridge.teacher.main") if pid not in shims]
        who = {"launcher": run.process.pid, "teacher": teacher, "rank 0, waits": ranks[0], "rank 1, sleeps": ranks[1]}
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
