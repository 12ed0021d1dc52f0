"""Training scripts as hosts write them, under the real launcher and the real torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import until

SCRIPTS = Path(__file__).parents[1] / "scripts"
HIDDEN = ("--teacher", "teachers:build_hidden", "payload.hidden={}")


@contextmanager
def launch(run_dir: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """shmbridge-launch with two CPU ranks, in the directory of the test scripts; killed if the test gives up."""
    command = [sys.executable, "-m", "shmbridge.launch", "--cpu", "2", "--run-dir", str(run_dir), *arguments]
    job = subprocess.Popen(
        command, cwd=SCRIPTS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield job
    finally:
        job.kill()
        job.communicate()


def finish(run_dir: Path, *arguments: str) -> None:
    """Launch, wait, and expect a good end."""
    with launch(run_dir, *arguments) as job:
        output, _ = job.communicate(timeout=120)
        assert job.returncode == 0, output


def logs(run_dir: Path) -> str:
    """Every log once: the short names of the ranks' logs are links."""
    files = sorted(file for file in run_dir.rglob("*.log") if not file.is_symlink())
    return "\n".join(file.read_text(errors="replace") for file in files)


def test_collectives_of_the_default_group_never_wait_for_the_teacher(tmp_path):
    finish(
        tmp_path,
        "--teacher",
        "teachers:build_gated",
        f"teacher.args={{directory: {tmp_path}}}",
        "teacher.collect=lockstep",  # one round a step, so that the teacher's gates are the steps
        "parity=false",  # the gates count forwards
        "log.level=debug",
        "--",
        "default_group.py",
        str(tmp_path),
    )
    text = logs(tmp_path)
    assert text.count("every collective returned") == 2
    moments = {"loading", "closing", "after", *(f"{m}-{i}" for m in ("waiting", "computing") for i in range(3))}
    assert moments <= set(os.listdir(tmp_path))
    for event in ("submit", "lease", "release"):
        assert re.search(rf"trainer 1 {event} +lane=1 step=1 sequence=1 slot=1 shape=\S* bytes=\d+ us=\d", text), event
    for event in ("collect", "reply"):
        assert re.search(rf"teacher 0 {event} +lane=0 step=1 sequence=1 slot=1 shape=2x5 bytes=\d+ us=\d", text), event


def test_a_loop_like_linguas_with_usr2_and_a_root_logger_at_notset(tmp_path):
    """SIGUSR2 to the launcher reaches the ranks alone; they save and end; no debug line of ours is printed."""
    with launch(tmp_path, *HIDDEN, "--", "host_loop.py", str(tmp_path), "1000000") as job:
        until(lambda: logs(tmp_path).count("step 3 ") == 2, "step 3 of both ranks")
        job.send_signal(signal.SIGUSR2)
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    saved = json.loads((tmp_path / "checkpoint.json").read_text())
    assert saved["preempted"]
    assert saved["step"] >= 3
    assert saved["position"] == 2 * saved["step"]
    assert "DEBUG" not in logs(tmp_path)


@pytest.mark.slow
def test_each_test_of_a_pytest_run_connects_for_itself(tmp_path):
    tests = tmp_path / "test_of_the_user.py"
    tests.write_text(
        """
import pytest, torch, shmbridge

@pytest.mark.parametrize("closes", [True, False, True])
def test_reply(closes):
    bridge = shmbridge.connect()
    assert bridge.exchange(torch.ones(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 128)
    if closes:
        bridge.close()
"""
    )
    teacher = ["--cpu", "1", "--teacher", "teachers:build", "teacher.serve_until=exited"]
    finish(tmp_path / "run", *teacher, "--", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests))
    assert "3 passed" in logs(tmp_path / "run")
