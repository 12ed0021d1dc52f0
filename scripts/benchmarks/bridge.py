"""This bridge: the real Owner, Server and Bridge, with the checks, the board and the liveness that users get.

The IDs are checked and copied into the slot, the teacher copies them out and its answer into the reply slot once. Under a
lease the rank then holds a tensor over that memory and no copy is made: the first pass over the reply is the user's own
work. `exchange` copies the reply out. The time runs from submit to the end of the lease. The teacher answers what is there
(teacher.linger_ms=0), as the raw limit, the queues and ZeroMQ do; a linger buys larger forwards with latency.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.cell import TOKENS, Ask, Cell, Check, Model, token_ids
from shmbridge import config
from shmbridge.bridge import Bridge
from shmbridge.encode import Verbatim
from shmbridge.offer import Offer, OutputSpec
from shmbridge.owner import Owner
from shmbridge.payload import Batch
from shmbridge.server import Server
from shmbridge.session import TeacherSession, TrainerSession


class Shmbridge:
    """See the module. `copied` reads by exchange, otherwise under a lease; `spin_us` is ring.spin_us."""

    ranked = True

    def __init__(self, *, copied: bool = False, spin_us: int = 0) -> None:
        self.name = "shmbridge" + (" exchange" if copied else "") + (f" spin {spin_us}us" if spin_us else "")
        self._copied = copied
        self._spin_us = spin_us
        self._owner: Owner | None = None

    def prepare(self, cell: Cell, model: Model, scratch: Path) -> None:
        self._model = model
        self._ranks = cell.ranks
        overrides = [
            "teacher.model=bench:nothing",
            "parity=false",
            "log.stats_every=0",
            f"ring.max_tokens={TOKENS}",
            "ring.max_batch=1",
            f"ring.spin_us={self._spin_us}",
            "teacher.linger_ms=0",
        ]
        self._owner = Owner(config.load(overrides=overrides), cell.ranks)
        self._token = self._owner.start_generation()
        self._offer = Offer((OutputSpec("out", "float32", (cell.reply_bytes // 4,)),), "bench")
        self._owner.create_replies(self._offer)

    def teach(self) -> None:
        answers, forward = self._model.answers(self._ranks), self._model.forward
        outputs = [{"out": answers[:rows]} for rows in range(self._ranks + 1)]

        def answer(batch: Batch) -> dict[str, torch.Tensor]:
            forward()
            return outputs[len(batch.input_ids)]

        session = TeacherSession(self._token)
        session.offer(self._offer)
        Server(session, answer, Verbatim(self._offer.outputs), self._offer, torch.device("cpu")).serve()

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        with Bridge(TrainerSession(self._token, index)) as bridge:
            bridge.wait_ready()
            yield _exchange(bridge) if self._copied else _lease(bridge)

    def close(self) -> None:
        if self._owner is not None:
            self._owner.close()


def _lease(bridge: Bridge) -> Ask:
    ids = token_ids()

    def ask(check: Check) -> None:
        with bridge.submit(ids).wait() as reply:
            out = reply["out"]
            if check:
                check(out)

    return ask


def _exchange(bridge: Bridge) -> Ask:
    ids = token_ids()

    def ask(check: Check) -> None:
        out = bridge.exchange(ids)["out"]
        if check:
            check(out)

    return ask
