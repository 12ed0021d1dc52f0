"""A run of the real supervisor over fake jobs: `supervised.py RUN_DIR TEACHER_MODES TRAINING_MODE GRACE_S`.

TEACHER_MODES is one mode for each replica, with commas between.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

from launcher.console.terminal import Console
from launcher.plan import cgroup
from launcher.plan.machine import Machine
from launcher.plan.plan import JobSpec, make
from launcher.process.signals import Signals
from launcher.supervisor.supervise import Supervisor
from shmbridge import config
from shmbridge.errors import ShmbridgeError
from shmbridge.shm.owner import Owner

HERE = Path(__file__).parent
OOM_VARIABLE = "FAKE_OOM_KILLS"  # how many processes the kernel "has killed" since the start; "unreadable"


def main(run: Path, teachers: str, training: str, grace_s: str) -> int:
    count_oom_kills(os.environ.get(OOM_VARIABLE, "0"))
    overrides = [
        "teacher.model=fake:build",
        "train.cpu_ranks=2",
        f"teacher.replicas={len(teachers.split(','))}",
        "ring.max_tokens=64",
        f"timeouts.shutdown_s={grace_s}",
    ]
    settings = config.load(overrides=overrides)
    plan = make(settings, ["-m", "anything"], Machine(cores=2, shm_free=2**30, ram_free=2**30))
    with Signals() as signals, Owner(settings, lanes=2, teachers=len(plan.teachers)) as owner:
        jobs = plan.jobs(run, str(owner.start_generation()))
        specs = tuple(faked(spec, teachers.split(","), training, run / "train" / "failures.json") for spec in jobs)
        print("session", owner.session_id, flush=True)
        return Supervisor(plan, specs, os.environ, owner, run, Console(), signals).run()


def count_oom_kills(text: str) -> None:
    """Stand in for the kernel's counter: 5 when the run begins."""
    counts = itertools.chain([5], itertools.repeat(None if text == "unreadable" else 5 + int(text)))
    cgroup.oom_kills = lambda: next(counts)


def faked(spec: JobSpec, teachers: list[str], training: str, record: Path) -> JobSpec:
    """The job as planned, but for what it executes."""
    if spec.replica is None:
        command = ["fake_training.py", training, str(record)]
    else:
        command = ["fake_teacher.py", teachers[spec.replica], str(spec.replica)]
    return dataclasses.replace(spec, argv=(sys.executable, str(HERE / command[0]), *command[1:]))


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
    except ShmbridgeError as error:
        sys.exit(str(error))
