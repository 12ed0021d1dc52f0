"""Attach to segments that are not what they should be, each in a process of its own: `attaching segments | others`.

Prints kind, seconds, what was raised (or the signal), and its text, with tabs between.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher import stale
from shmbridge import config
from shmbridge.shm import layout, owner
from shmbridge.shm.layout import ControlWord, Header
from shmbridge.shm.owner import SHM_DIRECTORY, Owner
from shmbridge.shm.segment import Segment
from shmbridge.shm.session import Token, TrainerSession

TRIALS = 300


def segments() -> None:
    kinds: dict[str, Callable[[Owner, Token], object]] = {
        "missing": lambda made, token: _path(made.names.control).unlink(),
        "truncated to 100 bytes": lambda made, token: os.truncate(_path(made.names.control), 100),
        "truncated to a page": lambda made, token: os.truncate(_path(made.names.control), 4096),
        "foreign": lambda made, token: _path(made.names.control).write_bytes(b"#" * 8192),
        "another version": lambda made, token: _set(made.control.segment, Header.VERSION, layout.VERSION + 1),
        "another session's lane": lambda made, token: _set(made.lanes[0].segment, Header.SESSION_LOW, 1),
        "settings that are none": lambda made, token: _set(made.control.segment, ControlWord.SETTINGS_NBYTES, 7),
    }
    for kind, garble in kinds.items():
        with _session() as (made, token):
            garble(made, token)
            _tell(kind, token)
    for seed in range(TRIALS):
        with _session() as (made, token):
            _scatter(random.Random(seed), [made.control.segment, made.lanes[0].segment])
            _tell(f"random {seed}", token)


def others() -> None:
    """Needs root."""
    with _session() as (made, token):
        for name in owner.objects(made.session_id)[made.session_id]:
            os.chown(SHM_DIRECTORY / name, 65534, 65534)
        _tell("another user's", token)
        print("reclaimed" if made.session_id in dict(stale.reclaim()) else "kept")


@contextmanager
def _session() -> Iterator[tuple[Owner, Token]]:
    settings = config.load(overrides=["teacher.model=faults:teacher", "ring.max_tokens=64"])
    with Owner(settings, lanes=1) as made:
        yield made, made.start_generation()
    assert not owner.objects(made.session_id), "objects are left"


def _path(name: str) -> Path:
    return SHM_DIRECTORY / name[1:]


def _set(segment: Segment, word: int, value: int) -> None:
    segment.words[word] = value


def _scatter(chance: random.Random, among: list[Segment]) -> None:
    """Some words of one segment become anything; most of them where something stands."""
    words = chance.choice(among).words
    for _ in range(chance.choice([1, 1, 4, 64])):
        words[chance.randrange(chance.choice([32, 512, len(words)]))] = chance.choice(
            [0, 1, 2**63, chance.getrandbits(64)]
        )


def _tell(kind: str, token: Token) -> None:
    """Attach in a child, and print how that ended."""
    sys.stdout.flush()
    began = time.monotonic()
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(send, _attach(token).encode()[:2000])
        os._exit(0)
    os.close(send)
    with open(receive, errors="replace") as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    print(f"{kind}\t{time.monotonic() - began:.4f}\t{told if code == 0 else f'signal {-code}' + chr(9)}")


def _attach(token: Token) -> str:
    try:
        session = TrainerSession(token, 0)
        session.check()
    except Exception as error:
        return f"{type(error).__name__}\t{error}".replace("\n", " ")
    return "attached\t"


if __name__ == "__main__":
    {"segments": segments, "others": others}[sys.argv[1]]()
