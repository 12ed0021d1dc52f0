"""Row 8 without a GPU: a teacher is killed at five points of a copy, over a stand-in for CUDA IPC, with real processes.

After the kill CUDA does one of three things: the event comes, it never comes, or every call raises. The stand-in's events come;
the last pair of cases has its calls raise once the teacher is dead.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

import torch

from shmbridge.errors import ShmbridgeError
from shmbridge.plane import cuda
from shmbridge.plane.cuda import TeacherCudaPlane
from shmbridge.shm import owner
from shmbridge.shm.ring import Ring
from tests.fake_cuda import FakeCuda, FakeStream
from tests.harness import bench, until

KILLED_AT = 3  # the reply, counted from 0
POINTS: dict[str, tuple[type, str, bool]] = {
    "before the write": (TeacherCudaPlane, "write", True),
    "before the stamp": (TeacherCudaPlane, "seal", True),
    "between stamp and publish": (TeacherCudaPlane, "seal", False),
    "before publish": (Ring, "publish_reply", True),
    "after publish": (Ring, "publish_reply", False),
}


def main() -> None:
    cuda.cuda_ipc = FakeCuda()  # type: ignore[assignment]
    for read in ("copy", "in_place"):
        for point, where in POINTS.items():
            print(f"{point}, read {read}: {kill(where, read)}", flush=True)
        print(f"an error of CUDA, read {read}: {kill(POINTS['after publish'], read, breaks=True)}", flush=True)


def kill(where: tuple[type, str, bool], read: str, breaks: bool = False) -> str:
    """What a rank got of a teacher that was killed there; `breaks`: CUDA cannot be used after it."""
    kind, name, before = where
    real, waits = getattr(kind, name), FakeStream.wait_event
    moment = mmap.mmap(-1, 8)
    setattr(kind, name, lethal(real, before, moment))
    right = torn = wrong = 0
    try:
        with bench(1, "plane=cuda_ipc", f"cuda.read={read}", "ring.depth=2") as it:
            it.teacher(lambda batch: {"rows": batch.input_ids.float()})
            bridge = it.bridge()
            ids = torch.arange(1, 7).view(1, 6)
            try:
                for turn in range(20):
                    pending = bridge.submit(ids + turn)
                    if breaks and turn == KILLED_AT:
                        until(lambda: moment[:8] != bytes(8))
                        FakeStream.wait_event = broken  # type: ignore[method-assign]
                    rows = pending.copy()["rows"]
                    right += torch.equal(rows, (ids + turn).float())
                    torn += bool(rows.isnan().any(-1).all())
                    wrong += turn + 1 - right - torn
                raised = "nothing"
            except ShmbridgeError as error:
                raised = type(error).__name__
            session = it.owner.session_id
            took_s = time.monotonic() - struct.unpack("d", moment)[0]
    finally:
        setattr(kind, name, real)
        FakeStream.wait_event = waits  # type: ignore[method-assign]
    assert not owner.objects(session), "objects are left"
    return f"{took_s:.3f} s, {right} right, {torn} torn, {wrong} wrong, {raised}"


def lethal(real: Callable[..., Any], before: bool, moment: mmap.mmap) -> Callable[..., Any]:
    """`real`, and the end of a teacher in the KILLED_AT-th call."""
    own, calls = os.getpid(), []

    def called(this: object, *arguments: object, **more: object) -> object:
        calls.append(1)
        mine = os.getpid() != own and len(calls) == KILLED_AT + 1
        if mine and before:
            die(moment)
        done = real(this, *arguments, **more)
        if mine:
            die(moment)
        return done

    return called


def broken(*_: object) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def die(moment: mmap.mmap) -> None:
    moment[:8] = struct.pack("d", time.monotonic())
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
