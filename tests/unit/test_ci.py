"""What CI runs is what the Makefile calls a test."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import yaml

WORKFLOW = Path(".github/workflows/ci.yml")


def commands(job: str) -> list[str]:
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"][job]["steps"]
    return [step["run"] for step in steps if "run" in step]


def test_ci_runs_make_test():
    (command,) = commands("test")
    assert os.access(command, os.X_OK)
    assert "make test\n" in Path(command).read_text()


def test_the_scheduled_job_runs_a_target_that_leaves_no_test_out():
    (command,) = commands("test-all")
    does = subprocess.run([*command.split(), "--dry-run"], capture_output=True, text=True, check=True).stdout
    assert [line.split("pytest ")[1] for line in does.splitlines() if "pytest " in line] == ["-n 2 --dist worksteal"]
