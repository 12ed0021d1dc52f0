"""A GPU that lags behind its hosts, in place of shmbridge.plane.cuda_ipc: teacher and rank in one process, streams that run late.

What is launched on tensors in GPU memory waits in its stream, and `run` takes the streams on in an order of its seed,
within what events allow: so every interleaving of two GPUs that the protocol permits can come. A wait for an event that is not
recorded is no wait, as in CUDA. `syncs` counts when a host waited for a stream; `calls` holds what was launched, in order.
"""

from __future__ import annotations

import random
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from shmbridge.plane.cuda_ipc import MemoryHandle
from tests.fake_cuda import StandIn

_SHARED = {"teacher": "ready", "rank": "free"}  # what a process exports events for
_SIDE = {"teacher": "lane", "rank": "side"}


class Task:
    """Something in a stream. `after`: what it waits for in another."""

    def __init__(self, work: Callable[[], object], after: Task | None = None) -> None:
        self.work, self.after = work, after
        self.inference = torch.is_inference_mode_enabled()
        self.done = False

    @property
    def ready(self) -> bool:
        return self.after is None or self.after.done

    def run(self) -> None:
        with _disable_current_modes(), torch.inference_mode(self.inference):
            self.work()
        self.done = True


class SimStream:
    def __init__(self, gpu: SimGpu, name: str) -> None:
        self.gpu, self.name = gpu, name
        self.tasks: deque[Task] = deque()
        self.held = False  # a test lets nothing run
        gpu.streams.append(self)

    def launch(self, what: str, work: Callable[[], object] = lambda: None, after: Task | None = None) -> Task:
        task = Task(work, after)
        self.tasks.append(task)
        self.gpu.calls.append(f"{self.name} {what}")
        return task

    def query(self) -> bool:
        return not self.tasks

    def wait_event(self, event: SimEvent) -> None:
        self.launch(f"waits {event.name}", after=event.latest)

    def wait_stream(self, other: SimStream) -> None:
        self.launch(f"follows {other.name}", after=other.tasks[-1] if other.tasks else None)


class SimEvent:
    def __init__(self, gpu: SimGpu, name: str) -> None:
        self.gpu, self.name = gpu, name
        self.latest: Task | None = None

    def record(self, stream: SimStream) -> None:
        self.latest = stream.launch(f"records {self.name}")

    def query(self) -> bool:
        return self.latest is None or self.latest.done

    def synchronize(self) -> None:
        if not self.query():
            self.gpu.sync(self.latest)

    def elapsed_time(self, later: SimEvent) -> float:
        return 0.0


class SimGpu(StandIn):
    """Both processes are in this one, and every stream runs when the test says so."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.calls: list[str] = []
        self.syncs = 0
        self.broken_open: Exception | None = None  # raised by open_memory
        self.full = False  # allocate raises
        self.streams: list[SimStream] = []
        self._process = "teacher"
        self._current = {name: SimStream(self, f"{name}'s compute") for name in _SHARED}
        self._events: dict[bytes, SimEvent] = {}
        self._memories: dict[bytes, torch.Tensor] = {}
        self._starts: list[int] = []  # of what lies on the GPU, sorted
        self._ends: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []  # so that no address is used again
        self._mode = _Launching(self)

    # What a test does

    @contextmanager
    def process(self, name: str) -> Iterator[None]:
        """What is launched here is `teacher`'s or `rank`'s."""
        before, self._process = self._process, name
        try:
            with self._mode:
                yield
        finally:
            self._process = before

    def run(self, steps: int | None = None) -> None:
        """Take the streams on by so many tasks; None: as far as they come."""
        while steps is None or steps:
            ready = [stream for stream in self.streams if stream.tasks and not stream.held and stream.tasks[0].ready]
            if not ready:
                return
            self.random.choice(ready).tasks.popleft().run()
            steps = None if steps is None else steps - 1

    def sync(self, task: Task | None) -> None:
        """A host waits for a task."""
        self.syncs += 1
        self.run()
        assert task is None or task.done, "a host waits for a stream that a test holds"

    def put(self, value: torch.Tensor) -> torch.Tensor:
        """`value` on the GPU, once its stream comes to it."""
        made = self.own(torch.empty_like(value).fill_(-77 if value.dtype.is_signed else 77))
        self.launch("forward", lambda: made.copy_(value))
        return made

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """From here on `tensor` lies on the GPU."""
        start, nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if nbytes and not self.has(tensor):
            insort(self._starts, start)
            self._ends[start] = start + nbytes
            self._kept.append(tensor)
        return tensor

    def has(self, tensor: torch.Tensor) -> bool:
        at = bisect_right(self._starts, tensor.data_ptr()) - 1
        return at >= 0 and tensor.data_ptr() < self._ends[self._starts[at]]

    def launch(self, what: str, work: Callable[[], object]) -> None:
        self._current[self._process].launch(what, work)

    def finish_current(self) -> None:
        """A host reads a value."""
        tasks = self._current[self._process].tasks
        if tasks:
            self.sync(tasks[-1])

    # What the module does

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        with torch.inference_mode(False):
            return self.own(torch.zeros(nbytes, dtype=torch.uint8))

    def export_memory(self, memory: torch.Tensor) -> MemoryHandle:
        self.exports += 1
        handle = f"memory{self.exports}".encode()
        self._memories[handle] = memory
        return MemoryHandle(handle, memory.nbytes, 0, b"counter", self.exports, b"", False)

    def open_memory(self, handle: MemoryHandle, device: torch.device) -> torch.Tensor:
        if self.broken_open:
            raise self.broken_open
        if handle.handle not in self._memories:
            raise RuntimeError("CUDA error: invalid resource handle")
        return self._memories[handle.handle]

    def shared_event(self, device: torch.device) -> SimEvent:
        kind = _SHARED[self._process]
        event = SimEvent(self, f"{kind}{sum(name.startswith(kind.encode()) for name in self._events)}")
        self._events[event.name.encode()] = event
        return event

    def export_event(self, event: SimEvent) -> bytes:
        return event.name.encode()

    def open_event(self, handle: bytes, device: torch.device) -> SimEvent:
        if handle not in self._events:
            raise RuntimeError("CUDA error: invalid resource handle")
        return self._events[handle]

    def timed_event(self) -> SimEvent:
        return SimEvent(self, "own")

    def current_stream(self, device: torch.device) -> SimStream:
        return self._current[self._process]

    def side_stream(self, device: torch.device) -> SimStream:
        return SimStream(self, _SIDE[self._process])

    @contextmanager
    def on(self, stream: SimStream) -> Iterator[SimStream]:
        before, self._current[self._process] = self._current[self._process], stream
        try:
            yield before
        finally:
            self._current[self._process] = before

    def keep_until(self, tensors: Iterable[torch.Tensor], stream: SimStream) -> None:
        pass

    def zero(self, device: torch.device) -> torch.Tensor:
        return self.own(torch.zeros((), dtype=torch.bool))

    def tell_host(self, word: torch.Tensor, value: torch.Tensor) -> None:
        word.copy_(value, non_blocking=True)

    def pause(self) -> None:
        self.syncs += 1
        self.run()


class _Launching(TorchDispatchMode):
    """Operations on the GPU's memory are launched, all others run."""

    def __init__(self, gpu: SimGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(map(self.gpu.has, given)) or func.is_view or "alias" in str(func):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.gpu.finish_current()
            return func(*args, **kwargs)
        if name.startswith("empty"):
            return self._scrambled(func(*args, **kwargs))
        written = func._schema.arguments[0].alias_info
        if written is not None and written.is_write:
            self.gpu.launch(name, lambda: func(*args, **kwargs))
            return args[0]
        made = tree_map(self._scrambled, func(*args, **kwargs))

        def compute() -> None:
            for target, value in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                target.copy_(value)

        self.gpu.launch(name, compute)
        return made

    def _scrambled(self, tensor: Any) -> Any:
        """What lies there until the stream has come so far."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return self.gpu.own(tensor.fill_(1 if tensor.dtype in (torch.bool, torch.uint8) else -77))
