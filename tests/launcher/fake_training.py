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

from launcher.process import shim
from shmbridge.errors import ParityError, PeerLost
from shmbridge.output_spec import Extent
from shmbridge.shm import process
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.session import SESSION_VARIABLE, Token

RANKS = int(os.environ.get("FAKE_RANKS", "2"))


def torchrun(mode: str, record: Path) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the shim has them ignored, which the ranks would inherit
        signal.signal(number, lambda *_: None)
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, mode, str(record), str(rank)],
            env=os.environ | {"LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(RANKS)
    ]
    stopped: list[int] = []

    def stop(number: int) -> None:
        stopped.append(number)
        for rank in ranks:
            rank.send_signal(number)

    signal.signal(shim.HOLD_SIGNAL, lambda *_: stopped.append(0))  # as elastic.py
    for sent, own in shim.STOP_SIGNALS.items():
        signal.signal(own, lambda *_, sent=sent: stop(sent))
    while any(rank.poll() is None for rank in ranks):
        for number, rank in enumerate(ranks):
            if rank.poll() and not stopped:
                return fail(record, ranks, number)
        time.sleep(0.02)
    if stopped:
        return 128 + stopped[-1]
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
    for number in (signal.SIGINT, signal.SIGTERM):
        if mode == "stubborn":
            signal.signal(number, signal.SIG_IGN)
        if mode in ("notes", "waits"):
            signal.signal(number, lambda number, _: take_note(rank, number))
    if mode == "usr1" and rank == 0:
        signal.signal(signal.SIGUSR1, lambda *_: print("rank 0 saved", flush=True))
    if mode == "workers":
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    if mode == "absent":
        print(f"rank {rank}, pid {os.getpid()}, is here without a connection", flush=True)
        time.sleep(600)
    if mode == "alone" or (mode == "half" and rank == 1):
        return
    session = RankSession(Token.parse(os.environ[SESSION_VARIABLE]), rank)
    try:
        session.wait_ready(60)
        session.record.at(41, 42)
        print(f"rank {rank} is up.", flush=True)
        end(mode, rank, session)
    except Exception as error:
        session.record.fail_with(error)
        raise


noted: list[int] = []


def take_note(rank: int, number: int) -> None:
    noted.append(number)
    print(f"rank {rank} takes note of {number}", flush=True)


def end(mode: str, rank: int, session: RankSession) -> None:
    if mode in ("asks", "crashes once"):
        ask(session)
    if mode == "crashes once" and rank == 1 and session.token.generation == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "raise" and rank == 1:
        raise RuntimeError("boom")
    if mode == "parity":
        raise ParityError("parity check, vocabulary: the teacher's distribution has 8 words, the student's 9.")
    if mode == "exit7" and rank == 1:
        sys.exit(7)
    if mode == "killed" and rank == 1:
        did("killed")
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "leaves" and rank == 1:
        Path(os.environ["FAKE_GATE"]).read_bytes()  # a fifo: opens when the test does
    if mode == "notes":
        assert session.wait(lambda: True if noted else None, time.monotonic() + 120)
        gate = Path(os.environ["FAKE_GATE"] + str(rank))
        while not gate.exists():
            session.check()
            time.sleep(0.02)
        print(f"rank {rank} saves beside {process.state(session.teacher.identity.pid)} teacher", flush=True)
    elif mode not in ("ok", "half", "late", "leaves", "asks", "crashes once"):
        try:
            session.wait(lambda: None, time.monotonic() + 120)
        except PeerLost as error:
            if mode == "waits":
                print(f"rank {rank} saves: {type(error).__name__}: {error}", flush=True)
                return
            if mode != "stubborn":
                raise
            time.sleep(600)
    session.close()
    did("closed")
    if mode == "late" and rank == 1:
        Path(os.environ["FAKE_GATE"]).read_bytes()


def did(what: str) -> None:
    print(f"{time.monotonic():.6f} {what}", flush=True)


def ask(session: RankSession) -> None:
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
