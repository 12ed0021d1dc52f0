"""Training scripts as hosts write them, under the real launcher and the real torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import until

SCRIPTS = Path(__file__).parents[1] / "scripts"


def launch(run_dir: Path, *arguments: str, **options) -> subprocess.Popen:
    """shmbridge-launch with two CPU ranks, in the directory of the test scripts."""
    command = [sys.executable, "-m", "launcher", "--cpu", "2", "--run-dir", str(run_dir), *arguments]
    return subprocess.Popen(
        command,
        cwd=SCRIPTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def logs(run_dir: Path) -> str:
    return "\n".join(file.read_text(errors="replace") for file in sorted(run_dir.rglob("*.log")))


@pytest.mark.slow
def test_collectives_of_the_default_group_never_wait_for_the_teacher(tmp_path):
    job = launch(
        tmp_path,
        "--teacher",
        "teachers:build_gated",
        f"teacher.args={{directory: {tmp_path}}}",
        "teacher.collect=lockstep",  # one round a step, so that the teacher's gates are the steps
        "--",
        "default_group.py",
        str(tmp_path),
    )
    output, _ = job.communicate(timeout=150)
    assert job.returncode == 0, output
    assert logs(tmp_path).count("every collective returned") == 2
    moments = {"loading", "closing", "after", *(f"{m}-{i}" for m in ("waiting", "computing") for i in range(3))}
    assert moments <= set(os.listdir(tmp_path))


@pytest.mark.slow
def test_a_loop_like_linguas_with_usr2_and_a_root_logger_at_notset(tmp_path):
    """SIGUSR2 to the launcher reaches the ranks alone; they save and end; no debug line of ours is printed."""
    job = launch(tmp_path, "--teacher", "teachers:build", "--", "host_loop.py", str(tmp_path), "1000000")
    until(lambda: len(set(re.findall(r"step 3 ", logs(tmp_path)))) and logs(tmp_path).count("step 3 ") >= 2, "step 3")
    job.send_signal(signal.SIGUSR2)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    saved = json.loads((tmp_path / "checkpoint.json").read_text())
    assert saved["preempted"] and saved["step"] >= 3 and saved["position"] == 2 * saved["step"]
    assert "DEBUG" not in logs(tmp_path)


@pytest.mark.slow
def test_the_same_script_runs_without_a_teacher_and_with_debug_logs(tmp_path):
    off = launch(tmp_path / "off", "--no-teacher", "--", "host_loop.py", str(tmp_path), "2")
    output, _ = off.communicate(timeout=60)
    assert off.returncode == 0, output
    assert "teacher False" in logs(tmp_path / "off")
    on = launch(
        tmp_path / "on", "--teacher", "teachers:build", "log.level=debug", "--", "host_loop.py", str(tmp_path), "2"
    )
    output, _ = on.communicate(timeout=60)
    assert on.returncode == 0, output
    text = logs(tmp_path / "on")
    assert "teacher True" in text
    for event in ("submit", "lease", "release"):
        assert re.search(rf"trainer 1 {event} +lane=1 step=1 sequence=3 slot=1 shape=\S* bytes=\d+ us=\d", text), event
    for event in ("collect", "reply"):
        assert re.search(rf"teacher 0 {event} +lane=0 step=0 sequence=0 slot=0 shape=2x8 bytes=\d+ us=\d", text), event
