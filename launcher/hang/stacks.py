"""Python stacks of other processes: asked of themselves by a signal, else read from outside; and where a stack stands.

A process that called shm.process.write_stacks_on_signal writes its stacks when STACKS_SIGNAL arrives, also while it holds
the GIL or waits in native code, and goes on undisturbed. A process that is stopped, or has not connected yet, cannot:
py-spy reads it where it is installed, and the kernel tells its innermost calls. A missing stack is labelled with the
reason. The processes have PATIENCE_S to answer, and py-spy has as long again.
"""

from __future__ import annotations

import json
import linecache
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import msgspec

from launcher.process import signals
from shmbridge.shm import process
from shmbridge.shm.process import Identity

PATIENCE_S = 2.0
GONE = ("gone", "zombie")  # states of a process that has ended
COLLECTIVE, WAIT, CODE = "collective", "wait", "code"  # kinds of place: a wait for other ranks, for data or a GPU, none

_LOOK_EVERY_S = 0.02
_SETTLED = 3  # looks without growth
_LARGEST = 256 * 1024  # bytes read of one dump
_THREAD = re.compile(r"(?:Current thread|Thread) (0x[0-9a-f]+)(?: \[(.*)\])? \(most recent call first\):")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
# Calls into native code leave no frame: the source line of the innermost frame tells.
_NATIVE_WAIT = re.compile(r"\.wait\(")
_NATIVE_GPU = re.compile(r"(\.(?:item|tolist|cpu|numpy|synchronize)\(\))")
OURS = str(Path(process.__file__).parents[1])
_LIBRARIES = re.compile(
    r"^<|/(?:site|dist)-packages/|/lib/python3[.\d]*/|/torch/(?:distributed|utils|cuda|nn|autograd)/"
)


class Frame(msgspec.Struct, frozen=True):
    """One line of a stack."""

    function: str
    file: str
    line: int
    code: str = ""  # the source line, where it was read

    @property
    def ours(self) -> bool:
        """In shmbridge."""
        return self.file.startswith(OURS + "/") or "/site-packages/shmbridge/" in self.file

    @property
    def library(self) -> bool:
        """Not the user's own code."""
        return self.ours or bool(_LIBRARIES.search(self.file))

    @property
    def name(self) -> str:
        """The function without the class that py-spy tells."""
        return self.function.rpartition(".")[2]


class Thread(msgspec.Struct, frozen=True):
    """One thread's frames, the innermost first."""

    name: str
    frames: tuple[Frame, ...]


class Place(msgspec.Struct, frozen=True):
    """`at barrier() in save (checkpoint.py:41)`."""

    kind: str
    doing: str  # empty for the user's own code
    function: str  # the innermost that is the user's own; where there is none, the innermost of all
    file: str
    line: int

    def __str__(self) -> str:
        at = f"({Path(self.file).name}:{self.line})"
        return f"{self.doing} {at if self.function == '<module>' else f'in {self.function} {at}'}".strip()


class Stacks(msgspec.Struct, frozen=True):
    """All threads of a process, the main thread first; or why there are none."""

    threads: tuple[Thread, ...] = ()
    source: str = ""  # faulthandler or py-spy
    missing: str = ""  # why there are none
    kernel: str = ""  # where it is in the kernel, where that was asked

    @property
    def place(self) -> Place | None:
        """Where the main thread is; None without stacks, and on the bridge, where the phase tells more."""
        frames = self.threads[0].frames if self.threads else ()
        if not frames or frames[0].ours:
            return None
        inner = list(takewhile(lambda frame: frame.library, frames))
        user = frames[len(inner)] if len(inner) < len(frames) else frames[0]
        return Place(*_doing(inner, frames[0]), user.function, user.file, user.line)


def _doing(inner: Sequence[Frame], innermost: Frame) -> tuple[str, str]:
    """What a process waits for, by the library frames between the user's code and the kernel: the kind of place, and
    words."""

    def within(folder: str, name: str = "") -> list[Frame]:
        return [frame for frame in inner if folder in frame.file and (not name or frame.name == name)]

    distributed = within("/torch/distributed/")
    gpu = None if inner else _NATIVE_GPU.search(innermost.code)
    if distributed:
        of_fsdp = " of FSDP" if within("/torch/distributed/fsdp/") else ""
        return COLLECTIVE, f"at {_collective(distributed)}(){of_fsdp}"
    if within("/torch/utils/data/"):
        return WAIT, "waiting for its DataLoader"
    if within("/torch/cuda/", "synchronize"):
        return WAIT, "at torch.cuda.synchronize(), which waits for the GPU,"
    if within("/torch/autograd/"):
        return COLLECTIVE, "at backward()"  # where DistributedDataParallel and FSDP wait for other ranks
    if not inner and _NATIVE_WAIT.search(innermost.code):
        return COLLECTIVE, "at wait()"
    return (WAIT, f"at {gpu[1]}, which waits for the GPU,") if gpu else (CODE, "")


def _collective(frames: Sequence[Frame]) -> str:
    """As the user, or FSDP, has called it: the outermost function of c10d, else the innermost public one."""
    called = [frame.name for frame in frames if frame.file.endswith("/distributed_c10d.py")]
    public = [frame.name for frame in frames if not frame.name.startswith("_") and frame.name != "wrapper"]
    return (called[-1:] or public or [frames[-1].name])[0]


def parse(text: str) -> Stacks:
    """What faulthandler wrote. It lists the threads from the latest to the main thread."""
    threads: list[tuple[str, list[Frame]]] = []
    for line in text.splitlines():
        if head := _THREAD.match(line):
            threads.append((head[2] or f"thread {head[1]}", []))
        elif (frame := _FRAME.match(line)) and threads:
            threads[-1][1].append(Frame(frame[3], frame[1], int(frame[2])))
    return _stacks(threads[::-1], "faulthandler")


def _parse_py_spy(text: bytes) -> Stacks:
    """The answer of `py-spy dump --json`; without threads where it is none."""
    try:
        dumped = sorted(json.loads(text), key=lambda thread: bool(thread["os_thread_id"] != thread["pid"]))
        threads = [
            (
                thread["thread_name"] or f"thread {thread['os_thread_id']}",
                [Frame(frame["name"], frame["filename"], frame["line"]) for frame in thread["frames"]],
            )
            for thread in dumped
        ]
    except (ValueError, TypeError, KeyError):
        return Stacks()
    return _stacks(threads, "py-spy")


def _stacks(threads: Sequence[tuple[str, list[Frame]]], source: str) -> Stacks:
    """The frames of the first, the main thread, get their source lines."""
    linecache.checkcache()
    found = [Thread(name, tuple(frames)) for name, frames in threads]
    for _, frames in threads[:1]:
        lines = (linecache.getline(frame.file, frame.line).strip()[:120] for frame in frames)
        with_code = (msgspec.structs.replace(frame, code=code) for frame, code in zip(frames, lines, strict=True))
        found[0] = Thread("main thread", tuple(with_code))
    return Stacks(tuple(found), source)


# Asked of the process itself


def collect(processes: Iterable[Identity], run: Path | None) -> dict[int, Stacks]:
    """Stacks by pid. `run` is the directory of the processes' run; None: they cannot write anywhere."""
    found: dict[int, Stacks] = {}
    asked: dict[int, tuple[Path, int]] = {}  # pid -> the file that it answers in, and how long that was
    outside: dict[int, str] = {}  # pid -> why it cannot answer by itself
    for who in processes:
        if process.state_of(who) in GONE:
            found[who.pid] = Stacks(missing="the process has ended")
        elif reason := _cannot_answer(who.pid, run):
            outside[who.pid] = reason
        elif run:
            file = process.stacks_path(run, who.pid)
            asked[who.pid] = (file, file.stat().st_size)
            process.send(who, process.STACKS_SIGNAL)
    readers = {pid: _start_py_spy(pid) for pid in outside}
    for pid, text in _await(asked).items():
        found[pid] = parse(text)
        if not found[pid].threads:
            outside[pid] = f"it did not answer the signal within {PATIENCE_S:g} s"
            readers[pid] = _start_py_spy(pid)
    deadline = time.monotonic() + PATIENCE_S
    return found | {pid: _from_outside(pid, why, readers[pid], deadline) for pid, why in outside.items()}


def _cannot_answer(pid: int, run: Path | None) -> str:
    """Why a process cannot write its own stacks; empty where it can."""
    if process.state(pid) == "stopped":
        tracer = re.search(r"^TracerPid:\s*([1-9]\d*)", _read(pid, "status"), re.M)
        return f"held by a debugger, pid {tracer[1]}" if tracer else "stopped: its interpreter cannot answer"
    if run is None or not process.stacks_path(run, pid).exists() or not signals.handles(pid, process.STACKS_SIGNAL):
        return "it has not connected to the bridge, and does not listen for the signal"
    return ""


def _await(asked: dict[int, tuple[Path, int]]) -> dict[int, str]:
    """What each process has written, once all write no more, or PATIENCE_S has passed."""
    deadline = time.monotonic() + PATIENCE_S
    sizes = {pid: before for pid, (_, before) in asked.items()}
    quiet = dict.fromkeys(asked, 0)  # looks
    while min(quiet.values(), default=_SETTLED) < _SETTLED and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
        for pid, (file, before) in asked.items():
            size = file.stat().st_size
            quiet[pid] = quiet[pid] + 1 if size == sizes[pid] > before else 0
            sizes[pid] = size
    return {pid: _tail(file, before) for pid, (file, before) in asked.items()}


def _tail(file: Path, start: int) -> str:
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(_LARGEST).decode(errors="replace")


# Read from outside


def _start_py_spy(pid: int) -> subprocess.Popen[bytes] | None:
    """None where it is not installed."""
    command = shutil.which("py-spy") or Path(sys.executable).with_name("py-spy")
    arguments = [command, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError:
        return None


def _from_outside(pid: int, why: str, reader: subprocess.Popen[bytes] | None, deadline: float) -> Stacks:
    """What py-spy tells of a process, and the innermost kernel functions; only root may see more than the first."""
    calls = re.findall(r"^\[<0>\] (\w+)", _read(pid, "stack"), re.M)[:4]
    kernel = " < ".join(calls) or _read(pid, "wchan").strip("0\n")
    if reader is None:
        return Stacks(missing=f"{why}; py-spy is not installed", kernel=kernel)
    with reader:
        try:
            answer, complaint = reader.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            reader.kill()
            return Stacks(missing=f"{why}; py-spy did not answer", kernel=kernel)
    found = _parse_py_spy(answer)
    if found.threads:
        return msgspec.structs.replace(found, kernel=kernel)
    last = (complaint.decode(errors="replace").strip().splitlines() or ["no answer"])[-1]
    return Stacks(missing=f"{why}; py-spy: {last.strip()[:100]}", kernel=kernel)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
