"""The command itself, but for teachers and torchrun: `faked.py TEACHER_MODES TRAINING_MODE ARGUMENTS...`.

TEACHER_MODES is a mode of fake_teacher.py for each replica, with commas between; TRAINING_MODE is one of fake_training.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

from launcher.cli.main import main
from launcher.planning import machine
from launcher.planning.jobs import JobSpec, Plan

HERE = Path(__file__).parent
TEACHERS, TRAINING, ARGUMENTS = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
OOM_KILLS = os.environ.get("FAKE_OOM_KILLS", "0")  # how many processes the kernel "has killed" in the run; "unreadable"

planned_teacher, planned_train = Plan._teacher, Plan._train


def executing(planned: JobSpec, script: str, *words: str) -> JobSpec:
    """The job as planned, but for what it executes."""
    return dataclasses.replace(planned, argv=(sys.executable, str(HERE / script), *words))


def teacher(self: Plan, replica: int, run: Path, session: str) -> JobSpec:
    return executing(planned_teacher(self, replica, run, session), "fake_teacher.py", TEACHERS[replica], str(replica))


def train(self: Plan, run: Path, session: str) -> JobSpec:
    record = run / "train" / "failures.json"
    return executing(planned_train(self, run, session), "fake_training.py", TRAINING, str(record))


Plan._teacher, Plan._train = teacher, train
counts = itertools.chain([5], itertools.repeat(None if OOM_KILLS == "unreadable" else 5 + int(OOM_KILLS)))
machine.oom_kills = lambda: next(counts)
sys.exit(main(ARGUMENTS))
