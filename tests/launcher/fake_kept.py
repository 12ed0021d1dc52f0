"""A kept teacher without torch, in place of teacher.python: what it is asked to run, it plays. FAKE_KEPT: how it loads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shmbridge.errors import PeerLost
from shmbridge.output_spec import Offer, OutputSpec
from shmbridge.shm.ring import Composition
from shmbridge.shm.session import SESSION_VARIABLE, Lane, TeacherSession, Token
from shmbridge.shm.status import Phase


def load(session: TeacherSession, how: str) -> None:
    session.record.enter(Phase.LOADING)
    session.record.progress(3, 14)
    if how == "gated":
        Path(os.environ["FAKE_GATE"]).read_bytes()  # a fifo: opens when the test does
    if how == "raise":
        raise ValueError("no such weights")
    print("loaded the weights", flush=True)


def serve(session: TeacherSession) -> None:
    """One generation."""
    session.open_barrier()
    session.record.enter(Phase.COLLECTING)
    while not over(session):
        session.wait(lambda: True if any(map(pending, session.lanes)) or over(session) else None, None)
        for lane in filter(pending, session.lanes):
            answer(session, lane)


def over(session: TeacherSession) -> bool:
    return session.training_done or all(lane.ring.closed and not pending(lane) for lane in session.lanes)


def pending(lane: Lane) -> bool:
    return lane.ring.next_request() is not None


def answer(session: TeacherSession, lane: Lane) -> None:
    sequence = lane.ring.next_request()
    assert sequence is not None
    lane.ring.write_reply(sequence, Composition(1, 0, 1, 1, 1, 1))
    lane.ring.seal_reply(sequence)
    lane.ring.publish_reply(sequence)
    session.ring_members(lane)


def main(index: int) -> int:
    session = TeacherSession(Token.parse(os.environ[SESSION_VARIABLE]), index)
    try:
        load(session, os.environ.get("FAKE_KEPT", ""))
        session.publish(Offer((OutputSpec("logits", "float32", ("seq", 4)),), "fake"))
        while session.next_generation():
            serve(session)
            session.leave()
    except PeerLost as error:
        session.record.fail_with(error)
        return 1
    except Exception as error:
        session.record.fail_with(error)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[sys.argv.index("--teacher-index") + 1])))
