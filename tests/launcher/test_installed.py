"""What an installation has: one name in site-packages, whatever the user's own modules are called."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.running import launched
from tests.launcher.test_cli import TEACHER, TRAIN, flags

ROOT = Path(__file__).parent.parent.parent
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, unpacked as an installer does it."""
    pytest.importorskip("shtab")
    source, installed = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("shmbridge", "launcher", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (made,) = (source / "dist").glob("shmbridge-*.whl")
    zipfile.ZipFile(made).extractall(installed)
    return installed


ENTRY = """
import sys
from importlib.metadata import distribution
(command,) = [point for point in distribution("shmbridge").entry_points if point.name == "shmbridge-launch"]
sys.exit(command.load()())
"""


def of_wheel(wheel: Path, directory: Path, *arguments: str) -> Any:
    """The command of the wheel, beside modules of the user's own."""
    hostile(directory, "package")
    hostile(directory / "more", "module")
    path = f"{directory / 'more'}:{wheel}"
    return launched([sys.executable, "-c", ENTRY, *arguments], directory, PYTHONPATH=path)


def test_a_wheel_has_one_name_and_what_belongs_to_it(wheel):
    assert {path.name.split("-")[0] for path in wheel.iterdir()} == {"shmbridge"}
    names = {str(path.relative_to(wheel / "shmbridge")) for path in (wheel / "shmbridge").rglob("*")}
    modules = {str(path.relative_to(ROOT / "shmbridge")) for path in (ROOT / "shmbridge").rglob("*.py")}
    modules |= {str(path.relative_to(ROOT)) for path in (ROOT / "launcher").rglob("*.py")}
    assert modules <= names, f"packages of pyproject.toml lacks the folders of {modules - names}"
    assert {"configs/eight-gpus.yaml", "py.typed"} <= names
    assert {"completions/bash", "completions/zsh", "completions/fish"} <= names


@pytest.mark.slow
def test_a_wheel_runs_from_any_directory_with_a_ready_configuration(wheel, tmp_path):
    (tmp_path / "toy.py").write_text(TEACHER)
    (tmp_path / "train.py").write_text(TRAIN)
    with of_wheel(wheel, tmp_path, "--config", "cpu", *flags("payload={logits: {}}"), "--", "train.py", "ok") as run:
        assert run.wait() == 0, run.text  # in the launcher, the teacher and the ranks
        assert "rank 1 has a reply: True" in run.text
        assert str(ROOT) not in run.text


def test_the_completion_of_a_wheel_knows_commands_and_flags(wheel, tmp_path):
    with of_wheel(wheel, tmp_path, "completion", "bash") as run:
        assert run.wait() == 0
    script = f"""
source {run.output}
complete_line() {{
    COMP_WORDS=(shmbridge-launch "$@"); COMP_CWORD=$#; COMPREPLY=()
    $(complete -p shmbridge-launch | sed 's/.*-F \\([^ ]*\\).*/\\1/') shmbridge-launch "${{COMP_WORDS[COMP_CWORD]}}"
    echo "${{COMPREPLY[@]}}"
}}
complete_line comp
complete_line --teacher-g
complete_line teacher start big --for
complete_line status --w
complete_line --cpu 2 -- comp 2>/dev/null # a training script's name: the shell completes files
"""
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.split("\n")[:5] == ["completion", "--teacher-gpu", "--foreground", "--watch", ""], told.stderr
