"""Who runs where, as it is told before anything starts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from launcher import replicas
from launcher.gpus import Gpu
from launcher.plan import Plan
from launcher.text import listed, table


def make(planned: Plan, session: str, run: Path) -> str:
    """The lines of a run in directory `run`; `session` is empty where the bridge is off."""
    rows = [("run", str(run))]
    if planned.teachers:
        rows += [("session", session), ("teacher", f"{planned.config.teacher.model}{_teachers(planned)}")]
    where = _place([planned.train_gpus], planned.threads[1], planned.ranks)
    ranks = f"{planned.ranks} rank{'s' if planned.ranks > 1 else ''}"
    rows.append(("training", f"{ranks} on {where}: {shlex.join(planned.script)}"))
    uneven = replicas.imbalance(planned.ranks, len(planned.teachers))
    if uneven:
        rows.append(("lanes", uneven))
    return table(rows, indent="")


def _teachers(planned: Plan) -> str:
    count = len(planned.teachers)
    several = f", {count} replicas" if count > 1 else ""
    return f"{several} on {_place(planned.teachers, planned.threads[0], count)}"


def _place(shares: Sequence[Sequence[Gpu]], threads: int | None, processes: int) -> str:
    """GPUs, or the CPU, of `processes` processes with `threads` threads each."""
    gpus = listed([",".join(str(gpu.number) for gpu in own) for own in shares if own])
    where = f"GPU {gpus}" if gpus else "the CPU"
    if threads is None:
        return where
    return f"{where}, {threads} thread{'s' if threads > 1 else ''}{' each' if processes > 1 else ''}"
