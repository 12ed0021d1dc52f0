"""A process of the CUDA trial without torch: `fake_probe.py export N MODE` or `fake_probe.py import MODE`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import msgspec

from shmbridge.plane.probe import Exported, Facts, Task, Tried, encode, messages

FACTS = Facts("2.9.0", 7, ("GPU-a", "GPU-b"))


def send(message: object) -> None:
    os.write(1, encode(message))


def meet(mode: str) -> None:
    """An end or a noise that either side may have."""
    if mode == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == "exits":
        sys.exit("Traceback\n  no module named shmbridge\n\n")
    if mode == "hangs":
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    if mode == "garbles":
        os.write(1, encode("nonsense"))
        time.sleep(600)
    if mode == "leaves":
        sys.exit(0)
    if mode == "chatters":
        os.write(1, b"a warning without an end of line" + b"x" * 100_000)


def export(count: int, mode: str) -> None:
    meet(mode)
    if mode == "refuses":
        send(Exported("its allocator is cudaMallocAsync", FACTS))
    else:
        count -= mode == "exports less"
        send(Exported(None, FACTS, tuple(msgspec.Raw(b'{"number":%d}' % i) for i in range(count))))
    if mode == "crashes later":
        os.kill(os.getpid(), signal.SIGBUS)
    sys.stdin.buffer.read()
    if mode == "crashes at its end":
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == "hangs at its end":
        time.sleep(600)


def import_(mode: str) -> None:
    tasks = msgspec.json.decode(next(iter(messages(sys.stdin.buffer))), type=list[Task])
    print(*(f"{task.device}{task.facts.torch}{bytes(task.export).decode()}" for task in tasks), file=sys.stderr)
    for i, _ in enumerate(tasks):
        if i == 1:
            meet(mode)
        if mode == "finds jobs unlike":
            send(Tried("the teacher has another torch", of_jobs=True))
            time.sleep(600)
        send(Tried("no peer access" if mode == "fails all" or (mode == "fails one" and i == 1) else None))
    if mode == "tells":
        sys.stdin.buffer.read()
        sys.exit(1)


if __name__ == "__main__":
    side, *rest = sys.argv[1:]
    if side == "export":
        export(int(rest[0]), rest[1])
    else:
        import_(rest[0])
