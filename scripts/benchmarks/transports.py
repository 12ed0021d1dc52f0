"""The transports that `bench.py roundtrip` compares, and the cell of its table in which they run."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import posix_ipc
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.bridge import open_session, teach
from shmbridge.output_spec import OutputSpec
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.rank_session import RankSession
from shmbridge.teacher.batch import Batch

TOKENS = 8192  # int64: 64 KB of IDs for each request of each rank
LARGE = 1 << 20  # from this reply size on copies cost more than wake-ups
_MARK = 7.0

Ask = Callable[[Callable[[Any], object]], None]
"""Makes one request, and calls its argument with the reply (tensor or buffer), which is valid in that call alone."""


class Cell:
    """One section of a table: ranks, reply size, cores; and the teacher's model, a standing answer.

    `same` puts all processes on the first core. `across` gives it to the teacher, and the others to the ranks as far as they
    go. While `pause_s[0]` is not 0 every forward sleeps that long, in all processes that are forked.
    """

    def __init__(self, placement: str, ranks: int, reply_bytes: int, cores: list[int]) -> None:
        self.placement, self.ranks, self.reply_bytes = placement, ranks, reply_bytes
        others = cores[:1] if placement == "same" else cores[1:]
        self.teacher_core, self.rank_cores = cores[0], [others[i % len(others)] for i in range(ranks)]
        self.pause_s = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")

    @property
    def large(self) -> bool:
        return self.reply_bytes >= LARGE

    def transports(self) -> list[type[Transport]]:
        """Those that run in this cell, in the order of the table."""
        bare = [Memcpy] if self.large and self.ranks == 1 else []
        core_each = len({self.teacher_core, *self.rank_cores}) == 1 + self.ranks
        spinning = [ShmbridgeSpin] if core_each and not self.large else []
        return [Raw, *bare, Shmbridge, ShmbridgeExchange, *spinning, ZeroMq, Gloo, Queues]

    def answers(self, rows: int = 1) -> torch.Tensor:
        """(rows, reply_bytes / 4) float32, in memory that has been written to."""
        return torch.full((rows, self.reply_bytes // 4), _MARK)

    def forward(self) -> None:
        if self.pause_s[0]:
            time.sleep(self.pause_s[0])

    def check(self, reply: Any) -> None:
        """Raise ValueError unless `reply` is one row of `answers`."""
        found, expected = np.asarray(reply).reshape(-1).view(np.float32), self.reply_bytes // 4
        if found.size != expected or not (found == _MARK).all():
            raise ValueError(f"a reply of {found.size} items is not the {expected} items that the teacher gave")


def token_ids() -> torch.Tensor:
    """(1, TOKENS) int64."""
    return torch.arange(TOKENS).reshape(1, TOKENS)


def _buffer(tensor: torch.Tensor) -> memoryview:
    return tensor.numpy().data.cast("B")


class Transport:
    """One transport in one cell.

    The benchmark's process calls `prepare` and `close`. Between them it forks a process that calls `teach` and one for each
    rank, which enters `rank`. A rank that leaves the `with` block tells the teacher, and `teach` returns when all have left.
    `close` is called after a failure too, with the processes gone. `directory` is empty, and removed by the benchmark.
    """

    name: str
    ranked = True  # False: it only shows a limit

    def __init__(self, cell: Cell, directory: Path) -> None:
        self.cell, self.directory = cell, directory

    def prepare(self) -> None:
        """Create what must exist before the fork."""

    def teach(self) -> None:
        """Answer every rank until all have left."""

    def rank(self, index: int) -> AbstractContextManager[Ask]:
        """Connect, and return what makes one request."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove what `prepare` made."""


class Memcpy(Transport):
    """numpy.copyto in the rank's process, with no teacher: the limit of whatever copies the reply once.

    It is the C library's memcpy between the warm memory of two tensors, on pages of the ordinary size, as those of shared
    memory are. No IDs, no wake-up, no other process.
    """

    name = "bare memcpy"
    ranked = False

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        source, target = self.cell.answers().numpy(), self.cell.answers().zero_().numpy()

        def ask(read: Callable[[Any], object]) -> None:
            np.copyto(target, source)
            read(target)

        yield ask


class Raw(Transport):
    """The raw limit: shared memory and two semaphores for each rank, and no protocol.

    The rank copies its IDs in, posts, waits, and copies the reply out; the teacher waits, copies the IDs out and the reply
    in, and posts. Nothing is checked, and a death is a hang. Several ranks are served in turn.
    """

    name = "raw limit"
    ranked = False

    def prepare(self) -> None:
        nbytes = TOKENS * 8 + self.cell.reply_bytes
        views = [memoryview(mmap.mmap(-1, nbytes)) for _ in range(self.cell.ranks)]
        self._lanes = [(view[: TOKENS * 8], view[TOKENS * 8 :], _semaphore(), _semaphore()) for view in views]
        self._left = memoryview(mmap.mmap(-1, mmap.PAGESIZE))

    def teach(self) -> None:
        answer, ids = _buffer(self.cell.answers()), memoryview(bytearray(TOKENS * 8))
        forward, left = self.cell.forward, self._left
        while True:
            for lane_ids, lane_reply, requested, answered in self._lanes:
                requested.acquire()
                if left[0]:
                    return
                ids[:] = lane_ids
                forward()
                lane_reply[:] = answer
                answered.release()

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        lane_ids, lane_reply, requested, answered = self._lanes[index]
        ids, reply = _buffer(token_ids()), memoryview(bytearray(len(lane_reply)))

        def ask(read: Callable[[Any], object]) -> None:
            lane_ids[:] = ids
            requested.release()
            answered.acquire()
            reply[:] = lane_reply
            read(reply)

        yield ask
        self._left[0] = 1
        requested.release()


def _semaphore() -> posix_ipc.Semaphore:
    """Without a name: forked processes inherit it."""
    semaphore = posix_ipc.Semaphore(f"/bench-raw-{secrets.token_hex(8)}", posix_ipc.O_CREX, mode=0o600)
    semaphore.unlink()
    return semaphore


class Shmbridge(Transport):
    """This bridge: the real Owner, Server and Bridge, with the checks, the board and the liveness that users get.

    The IDs are checked and copied into the slot; the teacher copies them out, and its answer into the reply slot once. Under a
    lease the rank then holds a tensor over that memory and no copy is made: the first pass over the reply is the user's own
    work. The time runs from submit to the end of the lease. The teacher answers what is there (teacher.linger_ms=0), as the
    raw limit, the queues and ZeroMQ do; a linger buys larger forwards with latency.
    """

    name = "shmbridge"
    settings = "ring.spin_us=0"
    _owner = None

    def prepare(self) -> None:
        output = OutputSpec("out", "float32", (self.cell.reply_bytes // 4,))
        settings = (f"ring.max_tokens={TOKENS}", "ring.max_batch=1", self.settings)
        self._owner, self._token, self._offer = open_session(self.cell.ranks, output, *settings)

    def teach(self) -> None:
        answers, forward = self.cell.answers(self.cell.ranks), self.cell.forward
        outputs = [{"out": answers[:rows]} for rows in range(self.cell.ranks + 1)]

        def answer(batch: Batch) -> dict[str, torch.Tensor]:
            forward()
            return outputs[len(batch.input_ids)]

        teach(self._token, self._offer, answer, torch.device("cpu"))

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        with Bridge(RankSession(self._token, index)) as bridge:
            bridge.wait_ready()
            yield self._ask(bridge, token_ids())

    def _ask(self, bridge: Bridge, ids: torch.Tensor) -> Ask:
        def ask(read: Callable[[Any], object]) -> None:
            with bridge.submit(ids).wait() as reply:
                read(reply["out"])

        return ask

    def close(self) -> None:
        if self._owner is not None:
            self._owner.close()


class ShmbridgeExchange(Shmbridge):
    """`exchange` copies the reply out."""

    name = "shmbridge exchange"

    def _ask(self, bridge: Bridge, ids: torch.Tensor) -> Ask:
        return lambda read: read(bridge.exchange(ids)["out"])


class ShmbridgeSpin(Shmbridge):
    name = "shmbridge spin 50us"
    settings = "ring.spin_us=50"


class ZeroMq(Transport):
    """ZeroMQ over ipc://: a ROUTER at the teacher, a DEALER in each rank.

    Large parts travel without copies of pyzmq's own (copy=False), in both directions; the kernel's socket copies them in and
    out. The rank holds the reply as a tensor over the received frame.
    """

    name = "ZeroMQ ipc"

    def prepare(self) -> None:
        import zmq

        self._zmq = zmq
        self._copy = not self.cell.large  # a frame object costs more than a copy of a small reply
        self._address = f"ipc://{self.directory}/socket"

    def teach(self) -> None:
        zmq, answer, staying = self._zmq, _buffer(self.cell.answers()), self.cell.ranks
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.bind(self._address)
            while staying:
                who = socket.recv()
                if not socket.recv(copy=False).buffer.nbytes:
                    staying -= 1
                    continue
                self.cell.forward()
                socket.send(who, zmq.SNDMORE)
                socket.send(answer, copy=self._copy)

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        zmq, ids, copy = self._zmq, _buffer(token_ids()), self._copy
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.connect(self._address)

            def ask(read: Callable[[Any], object]) -> None:
                socket.send(ids, copy=False)
                received = socket.recv(copy=copy)
                read(torch.frombuffer(bytearray(received) if copy else received.buffer, dtype=torch.float32))

            yield ask
            socket.send(b"")


class Gloo(Transport):
    """torch.distributed's gloo: the teacher is the last rank of one world.

    Each request is four collectives: rank 0 broadcasts the shape of the IDs, all gather their IDs at the teacher, the teacher
    broadcasts the shape of the reply and scatters the replies. TCP over the loopback interface, rendezvous by a file.
    """

    name = "gloo"

    def _join(self, rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store, world = f"file://{self.directory}/store", self.cell.ranks + 1
        dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(minutes=30))

    def teach(self) -> None:
        teacher, answer = self.cell.ranks, self.cell.answers()
        self._join(teacher)
        answers, own = [answer] * (teacher + 1), torch.empty_like(answer)
        shape, reply_shape = torch.zeros(2, dtype=torch.int64), torch.tensor(answer.shape)
        gathered = [torch.zeros(1, TOKENS, dtype=torch.int64) for _ in answers]
        while True:
            dist.broadcast(shape, src=0)
            if not shape[0]:
                return
            dist.gather(gathered[teacher], gathered, dst=teacher)
            self.cell.forward()
            dist.broadcast(reply_shape, src=teacher)
            dist.scatter(own, answers, src=teacher)

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        self._join(index)
        teacher, ids, reply = self.cell.ranks, token_ids(), self.cell.answers().zero_()
        shape, reply_shape = torch.tensor(ids.shape), torch.zeros(2, dtype=torch.int64)

        def ask(read: Callable[[Any], object]) -> None:
            dist.broadcast(shape, src=0)
            dist.gather(ids, dst=teacher)
            dist.broadcast(reply_shape, src=teacher)
            dist.scatter(reply, src=teacher)
            read(reply)

        yield ask
        dist.broadcast(shape.zero_(), src=0)


class Queues(Transport):
    """torch.multiprocessing queues: one to the teacher, one to each rank.

    Tensors travel as shared-memory files whose descriptors are pickled. The rank's IDs are moved into shared memory by the
    first request and stay there, so later ones copy nothing; every reply must be a fresh tensor, because the receiver owns it.
    """

    name = "torch queues"

    def prepare(self) -> None:
        fork = mp.get_context("fork")
        self._requests, self._replies = fork.Queue(), [fork.Queue() for _ in range(self.cell.ranks)]

    def teach(self) -> None:
        answer, staying = self.cell.answers(), self.cell.ranks
        while staying:
            rank, ids = self._requests.get()
            if ids is None:
                staying -= 1
                continue
            self.cell.forward()
            self._replies[rank].put(answer.clone())

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        ids, replies = token_ids(), self._replies[index]

        def ask(read: Callable[[Any], object]) -> None:
            self._requests.put((index, ids))
            read(replies.get())

        yield ask
        self._requests.put((index, None))
        self._requests.close()
        self._requests.join_thread()
