"""A teacher without torch, for the launcher's tests: `fake_teacher.py MODE INDEX`."""

from __future__ import annotations

import os
import signal
import sys
import time

from shmbridge.errors import PeerLost
from shmbridge.output_spec import Offer, OutputSpec
from shmbridge.shm.layout import ControlWord
from shmbridge.shm.session import SESSION_VARIABLE, TeacherSession, Token
from shmbridge.shm.status import Phase


def serve(session: TeacherSession, mode: str) -> None:
    session.record.enter(Phase.LOADING)
    session.record.progress(1, 4)
    if mode == "raises after training":
        session.wait(lambda: session.control.words[ControlWord.TRAINING_DONE] or None, None)
    if mode in ("raise", "raises after training"):
        raise ValueError("no such weights")
    if mode == "killed":
        print(f"{time.monotonic():.6f} killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "loading":
        print("teacher loading", flush=True)
        time.sleep(600)
    vocab = {"huge": 2**40, "wide": 5}.get(mode, 4)
    session.publish(Offer((OutputSpec("logits", "float32", ("seq", vocab)),), "fake"))
    if not session.next_generation():
        return
    session.open_barrier()
    print("teacher up", flush=True)
    if mode == "early":
        return
    session.wait(lambda: True if session.training_done or closed(session) else None, None)
    if mode in ("lingering", "stubborn"):
        time.sleep(600)
    if mode == "crashes late":
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == "raises late":
        raise RuntimeError("CUDA error: driver shutting down")


def closed(session: TeacherSession) -> bool:
    return all(lane.ring.closed for lane in session.lanes)


def main(mode: str, index: int) -> int:
    session = TeacherSession(Token.parse(os.environ[SESSION_VARIABLE]), index)
    try:
        serve(session, mode)
    except PeerLost as error:
        session.record.fail_with(error)
        if mode == "stubborn":
            time.sleep(600)
        return 1
    except Exception as error:
        session.record.fail_with(error)
        raise
    session.record.enter(Phase.CLOSED)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
