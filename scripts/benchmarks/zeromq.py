"""ZeroMQ over ipc://: a ROUTER at the teacher, a DEALER in each rank.

Large parts travel without copies of pyzmq's own (copy=False), in both directions; the kernel's socket copies them in and
out. The rank holds the reply as a tensor over the received frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.cell import Ask, Cell, Check, Model, token_ids


class ZeroMq:
    """See the module."""

    name = "ZeroMQ ipc"
    ranked = True

    def prepare(self, cell: Cell, model: Model, scratch: Path) -> None:
        import zmq

        self._zmq = zmq
        self._model = model
        self._ranks = cell.ranks
        self._copy = not cell.large  # a frame object costs more than a copy of a small reply
        self._address = f"ipc://{scratch}/socket"

    def teach(self) -> None:
        zmq = self._zmq
        answer = self._model.answers().numpy().data.cast("B")
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.bind(self._address)
            staying = self._ranks
            while staying:
                who = socket.recv()
                ids = socket.recv(copy=False)
                if not ids.buffer.nbytes:
                    staying -= 1
                    continue
                self._model.forward()
                socket.send(who, zmq.SNDMORE)
                socket.send(answer, copy=self._copy)

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        zmq = self._zmq
        ids = token_ids().numpy().data.cast("B")
        copy = self._copy
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.connect(self._address)

            def ask(check: Check) -> None:
                socket.send(ids, copy=False)
                received = socket.recv(copy=copy)
                reply = torch.frombuffer(bytearray(received) if copy else received.buffer, dtype=torch.float32)
                if check:
                    check(reply)

            yield ask
            socket.send(b"")

    def close(self) -> None:
        pass
