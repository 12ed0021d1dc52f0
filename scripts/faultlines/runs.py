"""Launchers as processes: what they print and when, which processes and objects are theirs, what their report tells."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shmbridge.shm import owner

PATIENCE_S = 45.0
ROOT = Path(__file__).parents[2]
_MARK = "SHMBRIDGE_FAULTS_MARK"
_FRAGILE = ("SHMBRIDGE_SESSION", "XDG_RUNTIME_DIR", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


class Overdue(Exception):
    """A row waited for something that did not come."""


def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Poll `condition` until it is true. Raises Overdue."""
    deadline = time.monotonic() + patience_s
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise Overdue(f"{what} did not come within {patience_s:.0f} s")
        time.sleep(0.005)


class Run:
    """A command whose processes carry a mark, and whose lines are noted with their time (monotonic seconds)."""

    def __init__(self, command: Sequence[str], directory: Path, variables: Mapping[str, str]) -> None:
        self.directory = directory
        self.lines: list[tuple[float, str]] = []
        self.ended_at: float | None = None
        self._mark = uuid.uuid4().hex
        kept = {name: value for name, value in os.environ.items() if name not in _FRAGILE}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**kept, "PYTHONPATH": paths, **variables, _MARK: self._mark}
        self.began_at = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=directory, env=environment
        )
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as output:
            for line in output:
                self.lines.append((time.monotonic(), line.decode(errors="replace").rstrip("\n")))

    def _watch(self) -> None:
        self.process.wait()
        self.ended_at = time.monotonic()

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in list(self.lines))

    @property
    def session(self) -> str:
        """Its id, once the launcher has told it."""
        found = re.search(r"session +([0-9a-f]{32})", self.text)
        return found[1] if found else ""

    @property
    def objects(self) -> list[str]:
        """Of its session, in /dev/shm."""
        return owner.objects(self.session).get(self.session, []) if self.session else []

    def says(self, pattern: str, times: int = 1) -> float:
        """When the launcher printed a line with `pattern`, a regular expression, for the n-th time. Raises Overdue."""

        def found() -> list[float]:
            matching = [at for at, line in list(self.lines) if re.search(pattern, line)]
            if len(matching) < times and self.ended_at is not None and self.ended_at < time.monotonic() - 1:
                raise Overdue(f"{pattern!r} was not printed; the launcher ended: {self.last_words}")
            return matching[times - 1 : times]

        return until(found, repr(pattern))[0]

    @property
    def last_words(self) -> str:
        found = [line for _, line in self.lines if "The run failed" in line or "shmbridge-launch:" in line]
        return (found or [line for _, line in self.lines[-1:]] or ["no output"])[0].strip()

    def signal(self, number: int) -> float:
        """Send a signal to the launcher; when."""
        at = time.monotonic()
        self.process.send_signal(number)
        return at

    def end(self) -> float:
        """When the launcher has ended. Raises Overdue."""
        return until(lambda: self.ended_at, "the end of the launcher")

    @property
    def code(self) -> int:
        """As a shell tells it."""
        self.end()
        found = self.process.returncode
        return found if found >= 0 else 128 - found

    def processes(self, containing: str = "") -> list[int]:
        """Of this run that live, but for the launcher itself, with a text in the command line."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes()
                command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"{_MARK}={self._mark}".encode() in environment and containing in command:
                found.append(int(name))
        return [pid for pid in found if pid != self.process.pid]

    @property
    def path(self) -> Path:
        """The newest run directory."""
        return max((self.directory / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)

    @property
    def report(self) -> dict[str, Any]:
        """report.json; empty where there is none."""
        try:
            found: dict[str, Any] = json.loads((self.path / "report.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def note(self, name: str) -> tuple[float, str]:
        """When an actor wrote a note of that name, and its text. Raises Overdue."""
        path = self.directory / f"note-{name}"

        def found() -> list[str]:
            if not path.exists() and self.ended_at is not None and self.ended_at < time.monotonic() - 1:
                raise Overdue(f"no {name!r} came; the launcher ended: {self.last_words}")
            return path.read_text().split("\n", 1) if path.exists() else []

        at, text = until(found, f"the note {name!r}")
        return int(at) / 1e9, text

    def clear(self) -> None:
        """Leave nothing of it, whatever state it is in."""
        if self.ended_at is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(PATIENCE_S)
        try:
            until(lambda: not self.processes(), "the end of its processes", 5.0)
        except Overdue:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
        if self.session:
            with owner.lock_if_dead(self.session) as dead:
                if dead:
                    owner.unlink_session(self.session)


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
