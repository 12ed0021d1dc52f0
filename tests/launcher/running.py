"""Launchers as processes of a test, and bounded waits on what they print."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shmbridge.shm import layout, owner
from shmbridge.shm.segment import Segment
from shmbridge.shm.session import Control, Lane, Names, Token
from tests.harness import PATIENCE_S, until

HERE = Path(__file__).parent
_MARK = "SHMBRIDGE_TEST_MARK"


class Launched:
    """A launcher with its output in a file, and a mark in the environment by which all of its processes are found."""

    def __init__(self, command: Sequence[str], directory: Path, variables: Mapping[str, str]) -> None:
        self.directory = directory
        self.mark = uuid.uuid4().hex
        self.output = directory / f"output-{self.mark[:8]}"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=directory, env={**os.environ, **variables, _MARK: self.mark}
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def says(self, text: str, times: int = 1) -> float:
        """Wait until the output has a text; when that was (monotonic seconds)."""
        until(lambda: self.text.count(text) >= times or self.process.poll() is not None, f"{text!r} in the output")
        assert self.text.count(text) >= times, self.text
        return time.monotonic()

    def moments(self, text: str, times: int = 1) -> list[float]:
        """When processes of the run, each with a line `SECONDS text`, say that they did something (monotonic seconds)."""
        self.says(f" {text}\n", times)
        return [float(at) for at in re.findall(rf"(\d+\.\d+) {text}\n", self.text)]

    def pid_of(self, who: str) -> int:
        """Of a process that printed `WHO is process PID`; the last one that did."""
        self.says(f"{who} is process ")
        return int(re.findall(rf"{who} is process (\d+)", self.text)[-1])

    def signal(self, number: int) -> float:
        """Send a signal to the launcher; when that was (monotonic seconds)."""
        at = time.monotonic()
        self.process.send_signal(number)
        return at

    def wait(self) -> int:
        """The exit code, once it has ended and nothing of it is left."""
        code = self.process.wait(PATIENCE_S)
        assert self.processes() == [], self.text
        assert not self.session or self.session not in owner.objects(), self.text
        return code

    def below_shim(self, script: str) -> int:
        """A job's own process, whose parent is a shim."""
        shims = set(self.processes("shim.py"))
        return next(pid for pid in self.processes(script) if parent(pid) in shims and pid not in shims)

    @property
    def path(self) -> Path:
        """Its run directory: the newest one."""
        return max(self.directory.glob("run*/**/torchrun.log"), key=os.path.getmtime).parent

    def cause(self, code: int) -> dict[str, Any]:
        """The one root cause of a run that ends with `code`, as its report has it. Nothing of the run is left."""
        assert self.wait() == code, self.text
        assert self.text.count("The run failed after") == 1
        assert self.report["action"] and self.report["path"]
        cause: dict[str, Any] = self.report["cause"]
        assert cause["pid"]
        return cause

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "report.json").read_text())
        return found

    @property
    def session(self) -> str | None:
        found = re.search(r"session +([0-9a-f]{32})", self.text)
        return found[1] if found else None

    @property
    def objects(self) -> list[str]:
        """Of its session, in /dev/shm."""
        return owner.objects().get(self.session or "", [])

    @property
    def ranks_signed_in(self) -> bool:
        if not self.session or not self.processes("fake_training.py"):
            return False
        token = Token(self.session, 1)
        control = Control(Segment.attach(Names(self.session).control, layout.CONTROL, self.session))
        lanes = [Lane.attach(token, control.shape, i) for i in range(control.shape.lanes)]
        return all(lane.records[0].identity for lane in lanes)

    def processes(self, containing: str = "") -> list[int]:
        """Live processes of this run, but for the launcher itself, whose command line contains a text."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes()
                command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if f"{_MARK}={self.mark}".encode() in environment and containing in command:
                found.append(int(name))
        return [pid for pid in found if pid != self.process.pid]


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


@contextmanager
def launched(command: Sequence[str], directory: Path, **variables: str) -> Iterator[Launched]:
    run = Launched(command, directory, variables)
    try:
        yield run
    finally:
        for pid in [run.process.pid] if run.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        run.process.wait(PATIENCE_S)
        if run.session:
            with owner.lock_if_dead(run.session) as dead:  # a launcher that the test killed could not remove it
                if dead:
                    owner.unlink_session(run.session)


def faked(
    directory: Path,
    teacher: str = "ok",
    training: str = "ok",
    grace_s: float = 5.0,
    more: Sequence[str] = (),
    **variables: str,
) -> Any:
    """The command over a fake teacher for each mode in `teacher`, with commas between, and a fake torchrun with two ranks. `more`:
    flags and settings."""
    settings = [f"teacher.replicas={len(teacher.split(','))}", "ring.max_tokens=64", f"timeouts.shutdown_s={grace_s}"]
    arguments = ["--teacher", "fake:build", "--cpu", "2", *settings, *more, "--", "-m", "this"]
    return launched([sys.executable, str(HERE / "faked.py"), teacher, training, *arguments], directory, **variables)


def launch(directory: Path, *arguments: str, **variables: str) -> Any:
    """The command itself."""
    return launched([sys.executable, "-m", "shmbridge.launch", *arguments], directory, **variables)


def told(cause: dict[str, Any]) -> str:
    """Of a report's cause: who, why, in which phase, and at which step and sequence where there is one."""
    place = [cause["phase"], *(f"{name} {cause[name]}" for name in ("step", "sequence") if cause[name] is not None)]
    reason = cause["reason"].splitlines()[0].removeprefix("shmbridge.errors.")
    return f"{cause['who']}: {textwrap.shorten(reason, 110, placeholder=' ...')} ({', '.join(place)})"
