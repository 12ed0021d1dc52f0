"""The shim: a truthful end, and nothing that outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.process import elastic, shim
from tests.harness import until

SHIM = [sys.executable, "-I", "-S", shim.__file__]


def start(*command: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*SHIM, str(os.getpid()), *command], **options)  # type: ignore[call-overload]


def orphan(pid_file: Path) -> str:
    """A shell command that leaves a process in a session of its own and tells its pid."""
    return f"setsid sh -c 'echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 600' &"


def read_pid(path: Path) -> int:
    until(path.exists, f"{path}")
    return int(path.read_text())


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("code", [0, 7, 255])
def test_it_exits_with_the_code_of_its_child(code):
    assert start("sh", "-c", f"exit {code}").wait() == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_it_dies_by_the_signal_that_ended_its_child(number):
    assert start("sh", "-c", f"kill -{int(number)} $$").wait() == -number


def test_a_command_that_cannot_run_is_told(tmp_path):
    shim_process = start("/nonexistent", stderr=subprocess.PIPE)
    assert shim_process.communicate()[1] == b"cannot execute /nonexistent: No such file or directory\n"
    assert shim_process.returncode == 127


def test_what_the_child_leaves_is_killed_when_it_ends(tmp_path):
    path = tmp_path / "pid"
    shim_process = start("sh", "-c", f"{orphan(path)} while ! test -e {path}; do sleep 0.01; done; exit 3")
    assert shim_process.wait() == 3
    assert gone(read_pid(path))


def test_torchruns_process_knows_the_same_signals():
    assert {own: sent for sent, own in shim.STOP_SIGNALS.items()} == elastic.STOPS
    assert shim.HOLD_SIGNAL == elastic.HOLD


@pytest.mark.parametrize("number", [*shim.STOP_SIGNALS.values(), shim.HOLD_SIGNAL])
def test_a_stop_reaches_the_child_alone(tmp_path, number):
    child = f"""
import os, signal, subprocess, time
subprocess.Popen(["sleep", "600"])
signal.signal({int(number)}, lambda *_: os._exit(5))
open("{tmp_path}/up", "w").close()
time.sleep(600)
"""
    shim_process = start(sys.executable, "-c", child)
    until((tmp_path / "up").exists, "the handler")
    shim_process.send_signal(number)
    assert shim_process.wait() == 5


def test_the_kill_signal_kills_all_of_it(tmp_path):
    path = tmp_path / "pid"
    shim_process = start("sh", "-c", f"trap '' TERM; {orphan(path)} wait")
    pid = read_pid(path)
    shim_process.send_signal(shim.KILL_SIGNAL)
    assert shim_process.wait() == -signal.SIGKILL
    assert gone(pid)


def test_other_signals_do_nothing(tmp_path):
    path = tmp_path / "pid"
    shim_process = start("sh", "-c", f"{orphan(path)} wait")
    read_pid(path)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        shim_process.send_signal(number)
        os.kill(shim.descendants(shim_process.pid)[0], number)
    assert shim_process.poll() is None
    shim_process.send_signal(shim.KILL_SIGNAL)
    assert shim_process.wait() == -signal.SIGKILL


def test_the_death_of_the_parent_clears_grandchildren(tmp_path):
    path = tmp_path / "pid"
    parent = os.fork()
    if parent == 0:
        os.execv(sys.executable, [sys.executable, "-c", PARENT, shim.__file__, orphan(path)])
    pid = read_pid(path)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until(lambda: gone(pid), "the end of the grandchild")


PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-I", "-S", sys.argv[1], str(os.getpid()), "sh", "-c", sys.argv[2] + " wait"])
"""


def test_it_does_not_start_under_a_parent_that_is_gone():
    assert subprocess.run([*SHIM, "1", "true"]).returncode == 137
