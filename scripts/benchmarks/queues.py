"""torch.multiprocessing queues: one to the teacher, one to each rank.

Tensors travel as shared-memory files whose descriptors are pickled. The rank's IDs are moved into shared memory by the
first request and stay there, so later ones copy nothing; every reply must be a fresh tensor, because the receiver owns it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from benchmarks.cell import Ask, Cell, Check, Model, token_ids


class Queues:
    """See the module."""

    name = "torch queues"
    ranked = True

    def __init__(self) -> None:
        self._replies: list[Any] = []

    def prepare(self, cell: Cell, model: Model, scratch: Path) -> None:
        self._model = model
        context = mp.get_context("fork")
        self._requests = context.Queue()
        self._replies = [context.Queue() for _ in range(cell.ranks)]

    def teach(self) -> None:
        answer = self._model.answers()
        staying = len(self._replies)
        while staying:
            rank, ids = self._requests.get()
            if ids is None:
                staying -= 1
                continue
            self._model.forward()
            self._replies[rank].put(answer.clone())

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        ids, replies = token_ids(), self._replies[index]

        def ask(check: Check) -> None:
            self._requests.put((index, ids))
            reply = replies.get()
            if check:
                check(reply)

        yield ask
        self._requests.put((index, None))
        self._requests.close()
        self._requests.join_thread()

    def close(self) -> None:
        for queue in self._replies:
            queue.close()
