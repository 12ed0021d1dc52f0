"""What a user is shown of a plan: the header of a run, printed before anything starts, and the whole plan."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.console.text import listed, table
from launcher.planning import placement
from launcher.planning.gpus import Gpu
from launcher.planning.jobs import JobSpec, Plan


def header(planned: Plan, session: str, run: Path, base: Mapping[str, str]) -> str:
    """The header of a run in directory `run`. `session` is empty if the bridge is off; `base` is the launcher's
    environment."""
    teachers, ranks = len(planned.teachers), planned.ranks
    rows = {"run": str(run), "session": session}
    if teachers:
        several = f", {teachers} replicas" if teachers > 1 else ""
        where = _place(planned.teachers, planned.threads[0], teachers)
        rows["teacher"] = f"{planned.config.teacher.model}{several} on {where}"
    where = _place([planned.train_gpus], planned.threads[1], ranks)
    rows["training"] = f"{ranks} rank{'s' if ranks > 1 else ''} on {where}: {shlex.join(planned.script)}"
    rows["plane"] = str(planned.plane or "")
    stripped = planned.jobs(run, session)[0].strips(base)
    if stripped:
        options = listed([f"{' and '.join(options)} of {name}" for name, options in stripped.items()])
        rows["allocator"] = f"the teacher runs without {options}, under which ranks cannot open its memory"
    rows["sharing"] = _sharing(planned)
    rows["lanes"] = placement.imbalance(ranks, teachers)
    return table([(name, text) for name, text in rows.items() if text], indent="")


def describe(plan: Plan, jobs: Sequence[JobSpec], base: Mapping[str, str]) -> str:
    """The command lines, the variables that are set or removed, and the memory plan."""
    parts = []
    for job in jobs:
        rows = [(f"{name}={shlex.quote(value)}",) for name, value in job.set.items()]
        removed = job.removes(base)
        if removed:
            rows.append((f"without {' '.join(removed)}",))
        rows += [(f"without {' '.join(options)} in {name}",) for name, options in job.strips(base).items()]
        parts.append(f"{job.name}\n  {shlex.join(job.argv)}\n\n{table(rows)}\n\n  log {job.log}")
    if plan.plane:
        parts.append(f"plane\n  {plan.plane}")
    if plan.memory:
        parts.append(f"memory\n{plan.memory}")
    uneven = placement.imbalance(plan.ranks, len(plan.teachers))
    if uneven:
        parts.append(f"lanes\n  {uneven}")
    return "\n\n".join(parts) + "\n"


def _place(shares: Sequence[Sequence[Gpu]], threads: int | None, processes: int) -> str:
    """`GPU 0,1, 4 threads each`, or `the CPU, 2 threads`."""
    gpus = listed([",".join(str(gpu.number) for gpu in own) for own in shares if own])
    where = f"GPU {gpus}" if gpus else "the CPU"
    if threads is None:
        return where
    return f"{where}, {threads} thread{'s' if threads > 1 else ''}{' each' if processes > 1 else ''}"


def _sharing(planned: Plan) -> str:
    """A remark about processes that share a GPU."""
    cards = list(dict.fromkeys(planned.train_gpus))
    both = [gpu.number for own in planned.teachers for gpu in own if gpu in cards]
    lines = [f"{placement.gpu_names(both)}: the teacher's and training's"] if both else []
    if len(cards) < len(planned.train_gpus):
        lines.append(
            f"{planned.ranks} ranks on {placement.gpu_names([gpu.number for gpu in cards])}: they need "
            f"torch.cuda.set_device(LOCAL_RANK % {len(cards)}) and the gloo backend, because NCCL refuses two ranks on one GPU"
        )
    return "; ".join(lines)
