"""What an installation has: one name in site-packages, whatever the user's own modules are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.running import launch
from tests.launcher.test_cli import TEACHER, TRAIN, flags

VERSION = "shmbridge 0.2.0"


def hostile(directory: Path, form: str) -> None:
    """A user's module that is named as the launcher's package is."""
    file = directory / "launcher.py" if form == "module" else directory / "launcher" / "__init__.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("raise SystemExit('the user\\'s own launcher was imported')\n")


@pytest.mark.parametrize("form", ["module", "package"])
@pytest.mark.parametrize("place", ["working directory", "PYTHONPATH"])
def test_a_module_of_the_users_that_is_named_launcher_is_left_alone(tmp_path, form, place):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    hostile(tmp_path, form)
    cwd, path = (tmp_path, "") if place == "working directory" else (elsewhere, str(tmp_path))
    command = [sys.executable, "-m", "shmbridge.launch", "--version"]
    ran = subprocess.run(command, cwd=cwd, env={"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr, ran.returncode) == (f"{VERSION}\n", "", 0)


def test_a_whole_run_beside_it(tmp_path):
    """In the launcher, the teacher and the ranks."""
    hostile(tmp_path, "package")
    hostile(tmp_path / "more", "module")
    (tmp_path / "toy.py").write_text(TEACHER)
    (tmp_path / "train.py").write_text(TRAIN)
    with launch(tmp_path, *flags(), "--", "train.py", "ok", PYTHONPATH=str(tmp_path / "more")) as run:
        assert run.wait() == 0, run.text
        assert "rank 1 has a reply: True" in run.text
