"""Python stacks of other processes: asked of themselves by a signal, else read from outside; and where a stack stands.

A process that called shm.process.write_stacks_on_signal writes its stacks when STACKS_SIGNAL arrives, also while it holds
the GIL or waits in native code, and goes on undisturbed. A process that is stopped, or has not connected yet, cannot:
py-spy reads it where it is installed, and the kernel tells its innermost calls. A missing stack is labelled with the
reason. The processes have PATIENCE_S to answer, and after them py-spy has as long again.
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
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import msgspec

from launcher.process import signals
from shmbridge.shm import process
from shmbridge.shm.process import Identity

PATIENCE_S = 2.0
GONE = ("gone", "zombie")  # states of a process that has ended
COLLECTIVE, WAIT, CODE = "collective", "wait", "code"  # kinds of place: a wait for other ranks, for data or a GPU, none

_LOOK_EVERY_S = 0.02
_SETTLED = 3  # looks without growth
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


class Thread(msgspec.Struct, frozen=True):
    """One thread's frames, the innermost first."""

    name: str
    frames: tuple[Frame, ...]


class Place(NamedTuple):
    """Where a process stands: the kind, and words such as `at barrier() in save (checkpoint.py:41)`."""

    kind: str
    text: str


class Stacks(msgspec.Struct, frozen=True):
    """All threads of a process, the main thread first; or why there are none."""

    threads: tuple[Thread, ...] = ()
    source: str = ""  # faulthandler or py-spy
    missing: str = ""  # why there are none
    kernel: str = ""  # where it is in the kernel, where that was asked

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The main thread's."""
        return self.threads[0].frames if self.threads else ()

    @property
    def place(self) -> Place:
        """Where the main thread is, named by the innermost frame that is the user's own, or else by the innermost of all.
        Empty without stacks, and on the bridge, where the phase tells more."""
        if not self.frames or self.frames[0].ours:
            return Place("", "")
        inner = list(takewhile(lambda frame: frame.library, self.frames))
        user = self.frames[len(inner)] if len(inner) < len(self.frames) else self.frames[0]
        kind, doing = _doing(inner, self.frames[0])
        within = "" if user.function == "<module>" else f"in {user.function} "
        return Place(kind, f"{doing} {within}({Path(user.file).name}:{user.line})".strip())


def _doing(inner: Sequence[Frame], innermost: Frame) -> tuple[str, str]:
    """The kind of place and words for what a process waits for, by the library frames between the user's code and the
    kernel."""

    def within(folder: str) -> list[Frame]:
        return [frame for frame in inner if folder in frame.file]

    if distributed := within("/torch/distributed/"):
        of_fsdp = " of FSDP" if within("/torch/distributed/fsdp/") else ""
        return COLLECTIVE, f"at {_collective(distributed)}(){of_fsdp}"
    if within("/torch/utils/data/"):
        return WAIT, "waiting for its DataLoader"
    if any(frame.function == "synchronize" for frame in within("/torch/cuda/")):
        return WAIT, "at torch.cuda.synchronize(), which waits for the GPU,"
    if within("/torch/autograd/"):
        return COLLECTIVE, "at backward()"  # where DistributedDataParallel and FSDP wait for other ranks
    if not inner and _NATIVE_WAIT.search(innermost.code):
        return COLLECTIVE, "at wait()"
    if not inner and (call := _NATIVE_GPU.search(innermost.code)):
        return WAIT, f"at {call[1]}, which waits for the GPU,"
    return CODE, ""


def _collective(frames: Sequence[Frame]) -> str:
    """As the user, or FSDP, has called it: the outermost function of c10d, else the innermost public one."""
    called = [frame.function for frame in frames if frame.file.endswith("/distributed_c10d.py")]
    public = [frame.function for frame in frames if not frame.function.startswith("_") and frame.function != "wrapper"]
    return (called[-1:] or public or [frames[-1].function])[0]


def parse(text: str) -> Stacks:
    """What faulthandler wrote. It lists the threads from the latest to the main thread."""
    threads: list[tuple[str, list[Frame]]] = []
    linecache.checkcache()
    for line in text.splitlines():
        if head := _THREAD.match(line):
            threads.append((head[2] or f"thread {head[1]}", []))
        elif (frame := _FRAME.match(line)) and threads:
            threads[-1][1].append(_frame(frame[3], frame[1], int(frame[2])))
    return _stacks(threads[::-1], "faulthandler")


def _frame(function: str, file: str, line: int) -> Frame:
    return Frame(function, file, line, linecache.getline(file, line).strip()[:120])


def _stacks(threads: Sequence[tuple[str, list[Frame]]], source: str) -> Stacks:
    found = [Thread(name if i else "main thread", tuple(frames)) for i, (name, frames) in enumerate(threads)]
    return Stacks(tuple(found), source)


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
    for pid, text in _await(asked).items():
        found[pid] = parse(text)
        if not found[pid].threads:
            outside[pid] = f"it did not answer the signal within {PATIENCE_S:g} s"
    with ThreadPoolExecutor() as pool:
        seen = pool.map(_from_outside, outside, outside.values())
        return found | dict(zip(outside, seen, strict=True))


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
    return {pid: file.read_bytes()[before:].decode(errors="replace") for pid, (file, before) in asked.items()}


def _from_outside(pid: int, why: str) -> Stacks:
    """What py-spy tells of a process, and the innermost kernel functions; only root may see more than the first."""
    calls = re.findall(r"^\[<0>\] (\w+)", _read(pid, "stack"), re.M)[:4]
    kernel = " < ".join(calls) or _read(pid, "wchan").strip("0\n")
    tool = shutil.which("py-spy") or Path(sys.executable).with_name("py-spy")
    command = [tool, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return Stacks(missing=f"{why}; py-spy did not answer", kernel=kernel)
    except OSError:
        return Stacks(missing=f"{why}; py-spy is not installed", kernel=kernel)
    try:
        threads = [
            (
                thread["thread_name"] or f"thread {thread['os_thread_id']}",
                [
                    _frame(frame["name"].rpartition(".")[2], frame["filename"], frame["line"])
                    for frame in thread["frames"]
                ],
            )
            for thread in sorted(json.loads(ended.stdout), key=lambda thread: thread["os_thread_id"] != thread["pid"])
        ]
    except (ValueError, TypeError, KeyError):
        threads = []
    if threads:
        return msgspec.structs.replace(_stacks(threads, "py-spy"), kernel=kernel)
    last = (ended.stderr.decode(errors="replace").strip().splitlines() or ["no answer"])[-1]
    return Stacks(missing=f"{why}; py-spy: {last.strip()[:100]}", kernel=kernel)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
