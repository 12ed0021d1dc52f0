"""The seed's pattern over torch.distributed's gloo: the teacher is the last rank of one world.

Each request is four collectives: rank 0 broadcasts the shape of the IDs, all gather their IDs at the teacher, the teacher
broadcasts the shape of the reply and scatters the replies. TCP over the loopback interface, rendezvous by a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.cell import TOKENS, Ask, Cell, Check, Model, token_ids

_TIMEOUT = timedelta(minutes=30)


class Gloo:
    """See the module."""

    name = "gloo"
    ranked = True

    def prepare(self, cell: Cell, model: Model, scratch: Path) -> None:
        self._model = model
        self._ranks = cell.ranks
        self._store = scratch / "store"

    def _join(self, rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        world = self._ranks + 1
        dist.init_process_group("gloo", f"file://{self._store}", rank=rank, world_size=world, timeout=_TIMEOUT)

    def teach(self) -> None:
        self._join(self._ranks)
        teacher = self._ranks
        answer = self._model.answers()
        answers = [answer] * (self._ranks + 1)
        own = torch.empty_like(answer)
        shape, reply_shape = torch.zeros(2, dtype=torch.int64), torch.tensor(answer.shape)
        gathered = [torch.zeros(1, TOKENS, dtype=torch.int64) for _ in range(self._ranks + 1)]
        while True:
            dist.broadcast(shape, src=0)
            if not shape[0]:
                return
            dist.gather(gathered[teacher], gathered, dst=teacher)
            self._model.forward()
            dist.broadcast(reply_shape, src=teacher)
            dist.scatter(own, answers, src=teacher)

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        self._join(index)
        teacher = self._ranks
        ids, reply = token_ids(), self._model.answers().zero_()
        shape, reply_shape = torch.tensor(ids.shape), torch.zeros(2, dtype=torch.int64)

        def ask(check: Check) -> None:
            dist.broadcast(shape, src=0)
            dist.gather(ids, dst=teacher)
            dist.broadcast(reply_shape, src=teacher)
            dist.scatter(reply, src=teacher)
            if check:
                check(reply)

        yield ask
        shape.zero_()
        dist.broadcast(shape, src=0)

    def close(self) -> None:
        pass
