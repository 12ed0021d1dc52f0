"""torchrun and its ranks without torch, for the launcher's tests: `fake_training.py MODE RECORD [RANK]`.

Like torchrun it starts each rank in a session of its own, ends the others when one fails, and, like elastic.py, writes
down the first failure and exits with its code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from shmbridge.errors import PeerLost
from shmbridge.offer import Extent
from shmbridge.session import SESSION_VARIABLE, Token, TrainerSession

RANKS = int(os.environ.get("FAKE_RANKS", "2"))


def torchrun(mode: str, record: Path) -> int:
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, mode, str(record), str(rank)],
            env=os.environ | {"LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(RANKS)
    ]
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif mode == "notes":  # as torchrun: SIGTERM goes on to the ranks, which have time
        signal.signal(signal.SIGTERM, lambda *_: [rank.terminate() for rank in ranks])
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    while any(rank.poll() is None for rank in ranks):
        for number, rank in enumerate(ranks):
            if rank.poll():
                return fail(record, ranks, number)
        time.sleep(0.02)
    return next((fail(record, ranks, i) for i, rank in enumerate(ranks) if rank.poll()), 0)


def fail(record: Path, ranks: list[subprocess.Popen[bytes]], number: int) -> int:
    code = ranks[number].returncode
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.wait()
    first = {"rank": number, "local_rank": number, "pid": ranks[number].pid, "exitcode": code}
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"first": first | {"traceback": "", "timestamp": int(time.time())}}))
    return code if code >= 0 else 128 - code


def train(mode: str, rank: int) -> None:
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "notes":
        signal.signal(signal.SIGTERM, lambda *_: print(f"rank {rank} takes note", flush=True))
    if mode == "usr1" and rank == 0:
        signal.signal(signal.SIGUSR1, lambda *_: print("rank 0 saved", flush=True))
    if mode == "workers":
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    if mode == "absent":
        print(f"rank {rank}, pid {os.getpid()}, is here without a connection", flush=True)
        time.sleep(600)
    session = TrainerSession(Token.parse(os.environ[SESSION_VARIABLE]), rank)
    try:
        session.wait_ready(60)
        session.record.at(41, 42)
        print(f"rank {rank} up", flush=True)
        end(mode, rank, session)
    except Exception as error:
        session.record.fail_with(error)
        raise


def end(mode: str, rank: int, session: TrainerSession) -> None:
    if mode in ("asks", "crashes once"):
        ask(session)
    if mode == "crashes once" and rank == 1 and session.token.generation == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "raise" and rank == 1:
        raise RuntimeError("boom")
    if mode == "exit7" and rank == 1:
        sys.exit(7)
    if mode == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "leaves" and rank == 1:
        Path(os.environ["FAKE_GATE"]).read_bytes()  # a fifo: opens when the test does
    if mode not in ("ok", "late", "leaves", "asks", "crashes once"):
        try:
            session.wait(lambda: None, time.monotonic() + 120)
        except PeerLost as error:
            if mode == "notes":
                print(f"rank {rank} saves: {error}", flush=True)
                return
            if mode != "stubborn":
                raise
            time.sleep(600)
    session.close()
    if mode == "late" and rank == 1:
        Path(os.environ["FAKE_GATE"]).read_bytes()


def ask(session: TrainerSession) -> None:
    """One request, and its reply."""
    sequence = session.ring.claim()
    session.ring.write_request(sequence, 0, Extent(1, 1), memoryview(bytes(8)))
    session.ring.publish_request(sequence)
    session.ring_teacher()
    assert session.wait(lambda: session.ring.answered(sequence), time.monotonic() + 60)
    session.ring.release(sequence)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(torchrun(sys.argv[1], Path(sys.argv[2])))
    train(sys.argv[1], int(sys.argv[3]))
