"""A run of the real supervisor over fake jobs: `supervised.py RUN_DIR TEACHER_MODE TRAINING_MODE GRACE_S`."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

from launcher import cgroup
from launcher.console import Console
from launcher.machine import Machine
from launcher.plan import OF_A_RANK, TEACHER, TRAIN, JobSpec, make
from launcher.signals import Signals
from launcher.supervise import Supervisor
from shmbridge import config
from shmbridge.errors import ShmbridgeError
from shmbridge.owner import Owner
from shmbridge.session import SESSION_VARIABLE

HERE = Path(__file__).parent
OOM_VARIABLE = "FAKE_OOM_KILLS"  # how many processes the kernel "has killed" since the start; "unreadable"


def main(run: Path, teacher: str, training: str, grace_s: str) -> int:
    count_oom_kills(os.environ.get(OOM_VARIABLE, "0"))
    overrides = [
        "teacher.model=fake:build",
        "train.cpu_ranks=2",
        "ring.max_tokens=64",
        f"timeouts.shutdown_s={grace_s}",
    ]
    settings = config.load(overrides=overrides)
    plan = make(settings, ["-m", "anything"], Machine(cores=2, shm_free=2**30, ram_free=2**30))
    with Signals() as signals, Owner(settings, lanes=2) as owner:
        token = {SESSION_VARIABLE: str(owner.start_generation())}
        record = str(run / "train" / "failures.json")
        specs = (
            spec(TEACHER, ["fake_teacher.py", teacher], token, run / "teacher.log"),
            spec(TRAIN, ["fake_training.py", training, record], token, run / "torchrun.log"),
        )
        print("session", owner.session_id, flush=True)
        return Supervisor(plan, specs, os.environ, owner, run, Console(), signals).run()


def count_oom_kills(text: str) -> None:
    """Stand in for the kernel's counter: 5 when the run begins."""
    counts = itertools.chain([5], itertools.repeat(None if text == "unreadable" else 5 + int(text)))
    cgroup.oom_kills = lambda: next(counts)


def spec(name: str, command: list[str], variables: dict[str, str], log: Path) -> JobSpec:
    argv = (sys.executable, str(HERE / command[0]), *command[1:])
    return JobSpec(name, argv, variables, OF_A_RANK if name == TEACHER else (), log)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
    except ShmbridgeError as error:
        sys.exit(str(error))
