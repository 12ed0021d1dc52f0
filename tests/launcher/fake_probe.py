"""A process of the CUDA trial without torch: `fake_probe.py SIDE MODE DEVICE...`, where SIDE is `export` or `import`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import msgspec

from shmbridge.plane.cuda_ipc_probe import Answer, Exported, Facts, encode, messages


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


def export(mode: str, devices: list[int]) -> None:
    meet(mode)
    exports = {device: msgspec.Raw(b'"of %s"' % mode.encode()) for device in devices}
    send(Exported("its allocator is cudaMallocAsync" if mode == "refuses" else None, Facts("2.9.0", 7, ()), exports))
    if mode == "crashes later":
        os.kill(os.getpid(), signal.SIGBUS)
    sys.stdin.buffer.read()
    if mode == "crashes at its end":
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == "hangs at its end":
        time.sleep(600)


def import_(mode: str) -> None:
    for message in messages(sys.stdin.buffer):
        exported = msgspec.json.decode(message, type=Exported)
        send(Answer(exported.refused))
        send(Answer("the teacher has another torch" if mode == "finds jobs unlike" else None))
        for place, (device, exports) in enumerate(exported.exports.items()):
            if place == 1:
                meet(mode)
            if mode == "tells":
                send(Answer(f"{device} {bytes(exports).decode()}"))
            else:
                send(Answer("no peer access" if mode == "fails all" or (mode == "fails one" and place == 1) else None))
        if mode == "hangs at its end":
            time.sleep(600)
        break


if __name__ == "__main__":
    side, told, *rest = sys.argv[1:]
    if side == "export":
        export(told, list(map(int, rest)))
    else:
        import_(told)
