"""The trial of the CUDA plane: short-lived processes that the launcher starts before a session exists.

    launcher           export N, one for each replica        import, in the environment of training
                       Exported: facts, N exports
    Task for each pair
                                                             Tried for each pair, in turn
    closes its pipe    ends                                  has ended

A message is one line, MARK and JSON; whatever else is printed on the way is torch's or the user's, and no message. Each export
is of a slab of its own, as each lane's is: torch opens a handle once in a process, so a second card that opened the same
one would be given the first card's mapping.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from shmbridge.errors import AttachError

if TYPE_CHECKING:
    import torch

MARK = b"shmbridge-probe "
_STRIDE = 4096  # bytes of the one slot of a slab that is tried


class Facts(msgspec.Struct, frozen=True):
    """What a process and its other side must have alike."""

    torch: str
    pid_namespace: int
    gpus: tuple[str, ...]  # UUIDs, in the order of its cuda:0, cuda:1, ...


class Exported(msgspec.Struct, frozen=True):
    """An exporter's message."""

    refused: str | None = None  # why it cannot export
    facts: Facts = Facts("", 0, ())
    exports: tuple[msgspec.Raw, ...] = ()  # cuda_slab.Export as JSON, one for each importing GPU


class Task(msgspec.Struct, frozen=True):
    """A pair of GPUs to try, as the importer is told of it."""

    device: int  # the importing GPU, in the importer's numbering
    facts: Facts  # the exporter's
    export: msgspec.Raw


class Tried(msgspec.Struct, frozen=True):
    """The importer's message: None, or why it did not work."""

    reason: str | None
    of_jobs: bool = False  # it is about the two jobs, not about this pair of GPUs


def encode(message: object) -> bytes:
    """A message as its line; it begins a new one, whatever was printed before."""
    return b"\n" + MARK + msgspec.json.encode(message) + b"\n"


def messages(lines: Iterable[bytes]) -> Iterable[bytes]:
    """The JSON of those lines that are messages."""
    return (line.removeprefix(MARK) for line in lines if line.startswith(MARK))


def main(argv: Sequence[str]) -> int:
    """`export N` or `import`; the exit code."""
    if argv[0] == "export":
        export(int(argv[1]))
    else:
        tasks = next(iter(messages(sys.stdin.buffer)), b"[]")
        try_all(msgspec.json.decode(tasks, type=tuple[Task, ...]))
    return 0


def export(importers: int) -> None:
    """Say what this process exports, and keep it until stdin is closed."""
    slabs: list[object] = []
    try:
        message = _export(importers, slabs)
    except Exception as error:
        message = Exported(_told(error))
    _send(message)
    sys.stdin.buffer.read()


def _export(importers: int, slabs: list[object]) -> Exported:
    """What is exported; `slabs` keeps it."""
    from shmbridge.plane import cuda_ipc, cuda_slab

    own = facts()
    if not own.gpus:
        return Exported(f"torch {own.torch} finds no CUDA device in the teacher's environment", own)
    device = _device(0)
    reason = cuda_ipc.unusable(device)
    if reason:
        return Exported(reason, own)
    made = [cuda_slab.Slab(device, slots=1, stride=_STRIDE, generation=1) for _ in range(importers)]
    slabs += made
    return Exported(None, own, tuple(msgspec.Raw(msgspec.json.encode(slab.export())) for slab in made))


def try_all(tasks: Sequence[Task]) -> None:
    """Say of each task whether its export opens, and reads as it was written."""
    opened: list[object] = []
    try:
        own = facts()
    except Exception as error:
        _send(Tried(_told(error), of_jobs=True))
        return
    for task in tasks:
        unlike = disagreement(task.facts, own, task.device)
        _send(Tried(unlike, of_jobs=True) if unlike else Tried(_open(task, own, opened)))


def disagreement(teacher: Facts, training: Facts, device: int) -> str | None:
    """What keeps the two jobs from sharing memory of any GPU; `device` is training's."""
    if not training.gpus:
        return f"torch {training.torch} finds no CUDA device in training's environment"
    if teacher.torch != training.torch:
        return (
            f"the teacher has torch {teacher.torch}, training has torch {training.torch}; a CUDA handle opens only in the "
            "torch that made it (install the same in both, see teacher.python)"
        )
    if teacher.pid_namespace != training.pid_namespace:
        return (
            "teacher and training are in different PID namespaces, between which CUDA IPC does not work (run both in one "
            "container, or with the host's: docker run --pid=host)"
        )
    if device >= len(training.gpus):
        return _hidden("training", training, f"its own cuda:{device}")
    if teacher.gpus[0] not in training.gpus:
        return _hidden("training", training, teacher.gpus[0])
    if training.gpus[device] not in teacher.gpus:
        return _hidden("the teacher", teacher, training.gpus[device])
    return None


def facts() -> Facts:
    """Of this process."""
    import torch

    from shmbridge.plane import cuda_ipc

    count = torch.cuda.device_count()
    gpus = tuple(cuda_ipc.identify(_device(index)) for index in range(count))
    return Facts(str(torch.__version__), cuda_ipc.pid_namespace(), gpus)


def _open(task: Task, own: Facts, opened: list[object]) -> str | None:
    """Why the task's export cannot be used on its device; `opened` keeps it where it can."""
    import torch

    from shmbridge.plane import cuda_slab

    theirs = own.gpus.index(task.facts.gpus[0])
    try:
        if theirs != task.device and not torch.cuda.can_device_access_peer(task.device, theirs):
            return "no peer access (`nvidia-smi topo -p2p r` shows which GPUs have it)"
        export = msgspec.json.decode(task.export, type=cuda_slab.Export)
        opened.append(cuda_slab.Opened(export, _device(task.device)))
    except Exception as error:
        return _told(error)
    return None


def _device(index: int) -> torch.device:
    import torch

    return torch.device("cuda", index)


def _hidden(job: str, sees: Facts, missing: str) -> str:
    count = f"{len(sees.gpus)} GPU{'s' if len(sees.gpus) > 1 else ''}"
    return (
        f"{job} sees {count}, and not {missing}; all GPUs of the run must be visible to both jobs (look for what sets "
        "CUDA_VISIBLE_DEVICES in its environment)"
    )


def _told(error: Exception) -> str:
    """In one line, without a remedy: the launcher knows whether one is wanted."""
    first = (str(error).splitlines() or [""])[0].partition(" Set plane=")[0].rstrip(".")
    return first if isinstance(error, AttachError) else f"{type(error).__name__}: {first}"


def _send(message: object) -> None:
    sys.stdout.buffer.write(encode(message))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
