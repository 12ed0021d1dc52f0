"""A teacher without torch, for the launcher's tests: `fake_teacher.py MODE INDEX`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from shmbridge.errors import PeerLost
from shmbridge.output_spec import Offer, OutputSpec
from shmbridge.shm.layout import ControlWord
from shmbridge.shm.participant_record import Phase
from shmbridge.shm.ring import Composition
from shmbridge.shm.session import SESSION_VARIABLE, Lane, Token
from shmbridge.shm.teacher_session import TeacherSession


def load(session: TeacherSession, mode: str) -> None:
    session.record.enter(Phase.LOADING)
    session.record.progress(1, 4)
    if mode == "raises after training":
        session.wait(lambda: session.control.words[ControlWord.TRAINING_DONE] or None, None)
    if mode == "killed":
        print(f"{time.monotonic():.6f} killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "loading":
        print("teacher loading", flush=True)
        time.sleep(600)
    if "gated" in mode:
        Path(os.environ["FAKE_GATE"]).read_bytes()  # a fifo: opens when the test does
    if "raise" in mode and mode != "raises late":
        raise ValueError("no such weights")
    print("loaded the weights", flush=True)


def serve(session: TeacherSession, mode: str) -> None:
    """One generation: an empty reply to every request."""
    session.open_barrier()
    session.record.enter(Phase.COLLECTING)
    print("teacher up", flush=True)
    while mode != "early" and not over(session):
        session.wait(lambda: any(map(pending, session.served)) or over(session) or None, None)
        for lane in filter(pending, session.served):
            answer(session, lane)
    if "FAKE_DRAINED" in os.environ:
        Path(os.environ["FAKE_DRAINED"]).read_bytes()  # a fifo: the teacher has then finished with the generation


def over(session: TeacherSession) -> bool:
    return session.training_done or all(lane.ring.closed and not pending(lane) for lane in session.served)


def pending(lane: Lane) -> bool:
    return lane.ring.next_request() is not None


def answer(session: TeacherSession, lane: Lane) -> None:
    sequence = lane.ring.next_request()
    assert sequence is not None
    lane.ring.write_reply(sequence, Composition(1, 0, 1, 1, 1, 1))
    lane.ring.seal_reply(sequence)
    lane.ring.publish_reply(sequence)
    session.ring_members(lane)


def end(mode: str) -> None:
    if mode in ("lingering", "stubborn"):
        time.sleep(600)
    if mode == "crashes late":
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == "raises late":
        raise RuntimeError("CUDA error: driver shutting down")


def main(mode: str, index: int) -> int:
    session = TeacherSession(Token.parse(os.environ[SESSION_VARIABLE]), index)
    stays = session.settings.teacher.keep or session.settings.train.restarts > 0
    try:
        load(session, mode)
        vocab = {"huge": 2**40, "wide": 5}.get(mode, 4)
        session.publish(Offer((OutputSpec("logits", "float32", ("seq", vocab)),), "fake"))
        while session.next_generation():
            serve(session, mode)
            session.leave()
            if not stays:
                break
        end(mode)
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
