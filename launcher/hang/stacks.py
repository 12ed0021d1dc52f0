"""Python stacks of other processes: asked of themselves by a signal, else read from outside.

A process that called shmbridge.shm.stacks.listen writes its stacks when stacks.SIGNAL arrives, also while it holds the GIL or
waits in native code, and goes on undisturbed. One that is stopped, or has not connected yet, cannot: there py-spy is asked,
where it is installed, and the kernel. What cannot be had is labelled with the reason. All processes together take
PATIENCE_S for the one and as long for the other.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from launcher.process import signals
from shmbridge.shm import process, stacks
from shmbridge.shm.process import Identity

PATIENCE_S = 2.0
_LOOK_EVERY_S = 0.02
_SETTLED = 3  # looks without growth
_LARGEST = 256 * 1024  # bytes read of one dump

_THREAD = re.compile(r"(?:Current thread|Thread) (0x[0-9a-f]+)(?: \[(.*)\])? \(most recent call first\):")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


class Frame(msgspec.Struct, frozen=True):
    """One line of a stack."""

    function: str
    file: str
    line: int
    code: str = ""  # the source line, where it was read


class Thread(msgspec.Struct, frozen=True):
    """One thread's frames, the innermost first."""

    name: str
    frames: tuple[Frame, ...]


class Stacks(msgspec.Struct, frozen=True):
    """All threads of a process, the main thread first; or why there are none."""

    threads: tuple[Thread, ...] = ()
    source: str = ""  # faulthandler or py-spy
    missing: str = ""  # why there are none
    kernel: str = ""  # where it is in the kernel, where that was asked


def collect(processes: Iterable[Identity], run: Path | None) -> dict[int, Stacks]:
    """Stacks by pid. `run` is the directory of the processes' run; None: they cannot write anywhere."""
    asked: list[_Asked] = []
    found: dict[int, Stacks] = {}
    outside: dict[int, str] = {}  # pid -> why it cannot answer by itself
    for who in processes:
        reason = _cannot_answer(who.pid, run)
        if process.identity(who.pid) != who or process.state(who.pid) in ("zombie", "gone"):
            found[who.pid] = Stacks(missing="the process has ended")
        elif reason or run is None:
            outside[who.pid] = reason
        else:
            asked += [one for one in [_Asked.ask(who, stacks.path(run, who.pid))] if one]
    readers = _start_readers(outside)
    for one in _await(asked):
        found[one.pid] = parse(one.text)
        if not found[one.pid].threads:
            outside[one.pid] = f"it did not answer the signal within {PATIENCE_S:g} s"
    readers |= _start_readers({pid: outside[pid] for pid in outside if pid not in readers})
    deadline = time.monotonic() + PATIENCE_S
    for pid, why in outside.items():
        found[pid] = _from_outside(pid, why, readers[pid], deadline)
    return found


def parse(text: str) -> Stacks:
    """What faulthandler wrote. It lists the threads from the latest to the main thread."""
    threads: list[tuple[str, list[Frame]]] = []
    for line in text.splitlines():
        head, frame = _THREAD.match(line), _FRAME.match(line)
        if head:
            threads.append((head[2] or f"thread {head[1]}", []))
        elif frame and threads:
            threads[-1][1].append(Frame(frame[3], frame[1], int(frame[2])))
    threads.reverse()
    return Stacks(tuple(_thread(name, frames, i == 0) for i, (name, frames) in enumerate(threads)), "faulthandler")


def parse_py_spy(text: bytes) -> Stacks:
    """The answer of `py-spy dump --json`; without threads where it is none."""
    try:
        dumped = msgspec.json.decode(text, type=list[_Dumped])
    except msgspec.DecodeError:
        return Stacks()
    dumped.sort(key=lambda one: one.os_thread_id != one.pid)
    return Stacks(
        tuple(
            _thread(
                one.thread_name or f"thread {one.os_thread_id}",
                [Frame(frame.name, frame.filename, frame.line) for frame in one.frames],
                i == 0,
            )
            for i, one in enumerate(dumped)
        ),
        "py-spy",
    )


class _DumpedFrame(msgspec.Struct):
    name: str
    filename: str
    line: int


class _Dumped(msgspec.Struct):
    pid: int
    frames: list[_DumpedFrame]
    thread_name: str | None = None
    os_thread_id: int | None = None


def _thread(name: str, frames: list[Frame], is_main: bool) -> Thread:
    """With the source line of the frame that says what a call into native code was, and of the user's own."""
    lines = [msgspec.structs.replace(frame, code=_source(frame)) for frame in frames] if is_main else frames
    return Thread("main thread" if is_main else name, tuple(lines))


def _source(frame: Frame) -> str:
    if not frame.file.endswith(".py"):
        return ""
    try:
        with open(frame.file, errors="replace") as file:
            for number, line in enumerate(file, 1):
                if number == frame.line:
                    return line.strip()[:120]
    except OSError:
        pass
    return ""


# Asked of the process itself


def _cannot_answer(pid: int, run: Path | None) -> str:
    """Why a process cannot write its own stacks; empty where it can."""
    if process.state(pid) == "stopped":
        tracer = _status(pid, "TracerPid")
        return (
            f"held by a debugger, pid {tracer}" if tracer not in ("", "0") else "stopped: its interpreter cannot answer"
        )
    if run is None or not stacks.path(run, pid).exists() or not signals.handles(pid, stacks.SIGNAL):
        return "it has not connected to the bridge, and does not listen for the signal"
    return ""


class _Asked:
    """A process that was sent the signal, and the file that it answers in."""

    def __init__(self, pid: int, path: Path, size: int) -> None:
        self.pid = pid
        self._path = path
        self._before = self._size = size
        self._looks = 0

    @classmethod
    def ask(cls, who: Identity, path: Path) -> _Asked | None:
        """None where the process has ended meanwhile."""
        one = cls(who.pid, path, path.stat().st_size)
        try:
            fd = os.pidfd_open(who.pid)
        except ProcessLookupError:
            return None
        try:
            if process.identity(who.pid) != who:
                return None
            signal.pidfd_send_signal(fd, stacks.SIGNAL)
        except ProcessLookupError:
            return None
        finally:
            os.close(fd)
        return one

    def settled(self) -> bool:
        """It has answered, and writes no more."""
        size = self._path.stat().st_size
        self._looks = self._looks + 1 if size == self._size > self._before else 0
        self._size = size
        return self._looks >= _SETTLED

    @property
    def text(self) -> str:
        with self._path.open("rb") as file:
            file.seek(self._before)
            return file.read(_LARGEST).decode(errors="replace")


def _await(asked: list[_Asked]) -> list[_Asked]:
    """`asked`, once all have answered, or PATIENCE_S has passed."""
    deadline = time.monotonic() + PATIENCE_S
    waiting = asked
    while waiting and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
        waiting = [one for one in waiting if not one.settled()]
    return asked


# Read from outside


def _start_readers(pids: Iterable[int]) -> dict[int, subprocess.Popen[bytes] | None]:
    """py-spy for each process, at once; None where it is not installed."""
    beside = Path(sys.executable).with_name("py-spy")
    command = shutil.which("py-spy") or (str(beside) if beside.exists() else None)
    return {pid: _start_reader(command, pid) if command else None for pid in pids}


def _start_reader(command: str, pid: int) -> subprocess.Popen[bytes] | None:
    arguments = [command, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError:
        return None


def _from_outside(pid: int, why: str, reader: subprocess.Popen[bytes] | None, deadline: float) -> Stacks:
    kernel = _kernel(pid)
    if reader is None:
        return Stacks(missing=f"{why}; py-spy is not installed", kernel=kernel)
    with reader:
        try:
            answer, complaint = reader.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            reader.kill()
            return Stacks(missing=f"{why}; py-spy did not answer", kernel=kernel)
    found = parse_py_spy(answer)
    if found.threads:
        return msgspec.structs.replace(found, kernel=kernel)
    said = complaint.decode(errors="replace").strip().splitlines()
    return Stacks(missing=f"{why}; py-spy: {said[-1].strip()[:100] if said else 'no answer'}", kernel=kernel)


def _kernel(pid: int) -> str:
    """`do_signal_stop < get_signal`: the innermost kernel functions, root alone may see more than the first."""
    calls = re.findall(r"^\[<0>\] (\w+)", _read(pid, "stack"), re.M)[:4]
    return " < ".join(calls) or _read(pid, "wchan").strip("0\n")


def _status(pid: int, key: str) -> str:
    found = re.search(rf"^{key}:\s*(\S+)", _read(pid, "status"), re.M)
    return found[1] if found else ""


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
