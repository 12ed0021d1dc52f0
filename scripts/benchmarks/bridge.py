"""A session without a launcher, whose teacher returns one output, `out`."""

from __future__ import annotations

import torch

from shmbridge import config
from shmbridge.output_spec import Offer, OutputSpec
from shmbridge.shm.owner import Owner
from shmbridge.shm.session import Token
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher.batch import Forward
from shmbridge.teacher.payload import Verbatim
from shmbridge.teacher.server import Server

SETTINGS = ("teacher.model=bench:none", "parity=false", "log.stats_every=0")  # of every session of a benchmark


def open_session(ranks: int, output: OutputSpec, *settings: str) -> tuple[Owner, Token, Offer]:
    """The owner, which is to be closed, and what the other processes attach with."""
    owner = Owner(config.load(overrides=[*SETTINGS, "teacher.linger_ms=0", *settings]), ranks)
    token, offer = owner.start_generation(), Offer((output,), "bench")
    owner.create_replies(offer)
    return owner, token, offer


def teach(token: Token, offer: Offer, forward: Forward, device: torch.device) -> None:
    """The teacher's process: answer until the ranks have closed."""
    session = TeacherSession(token)
    session.publish(offer)
    session.next_generation()
    Server(session, forward, Verbatim(offer.outputs), offer, device).serve()
