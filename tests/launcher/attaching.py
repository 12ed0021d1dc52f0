"""The command itself, but for torchrun: `attaching.py TRAINING_MODE ARGUMENTS...`, with fake_training.py in its place."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from launcher.cli.main import main
from launcher.plan.plan import JobSpec, Plan

HERE = Path(__file__).parent
MODE, ARGUMENTS = sys.argv[1], sys.argv[2:]
planned = Plan._train


def faked(self: Plan, run: Path, session: str) -> JobSpec:
    argv = (sys.executable, str(HERE / "fake_training.py"), MODE, str(run / "train" / "failures.json"))
    return dataclasses.replace(planned(self, run, session), argv=argv)


Plan._train = faked
sys.exit(main(ARGUMENTS))
