"""The trial of the CUDA plane: short-lived processes that the launcher starts before a session exists, two for each replica.

    export DEVICE...                                     import, in the environment of training
    Exported: facts, and an export for each DEVICE  ──►  Answer: to the exporter's message
                                                         Answer: whether the two jobs have alike what they must
                                                         Answer: for each DEVICE in turn
    ends when its stdin is closed                        ends

A message is one line, MARK and JSON; whatever else is printed on the way is torch's or the user's, and no message. Each export
is of a slab of its own, as each lane's is: torch opens a handle once in a process, so a second card that opened the same
one would be given the first card's mapping.
"""

from __future__ import annotations

import os
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
    """The exporter's message."""

    refused: str | None = None  # why it cannot export
    facts: Facts = Facts("", 0, ())
    exports: dict[int, msgspec.Raw] = {}  # cuda_slab.Export as JSON, by the importing GPU in the importer's numbering


class Answer(msgspec.Struct, frozen=True):
    """A message of the importer: None, or why a step went wrong."""

    reason: str | None


def encode(message: object) -> bytes:
    """A message as its line; it begins a new one, whatever was printed before."""
    return b"\n" + MARK + msgspec.json.encode(message) + b"\n"


def messages(lines: Iterable[bytes]) -> Iterable[bytes]:
    """The JSON of those lines that are messages."""
    return (line.removeprefix(MARK) for line in lines if line.startswith(MARK))


def main(argv: Sequence[str]) -> int:
    """`export DEVICE...` or `import`; the exit code."""
    if argv[0] == "export":
        export(tuple(map(int, argv[1:])))
        return 0
    message = next(iter(messages(sys.stdin.buffer)), None)
    if message is not None:
        import_(message)
    return 0


def export(devices: Sequence[int]) -> None:
    """Say what this process exports, and keep it until stdin is closed."""
    slabs: list[object] = []
    try:
        message = _export(devices, slabs)
    except Exception as error:
        message = Exported(_told(error))
    _send(message)
    os.dup2(2, 1)  # nobody reads what is printed from here on
    sys.stdin.buffer.read()


def _export(devices: Sequence[int], slabs: list[object]) -> Exported:
    """What is exported; `slabs` keeps it."""
    from shmbridge.plane import cuda_ipc, cuda_slab

    own = facts()
    if not own.gpus:
        return Exported(f"torch {own.torch} finds no CUDA device in the teacher's environment", own)
    device = _device(0)
    reason = cuda_ipc.unusable(device)
    if reason:
        return Exported(reason, own)
    made = [cuda_slab.Slab(device, slots=1, stride=_STRIDE, generation=1) for _ in devices]
    slabs += made
    exports = [msgspec.Raw(msgspec.json.encode(slab.export())) for slab in made]
    return Exported(None, own, dict(zip(devices, exports, strict=True)))


def import_(message: bytes) -> None:
    """Answer an exporter's message. Nothing follows an answer that is about the jobs."""
    opened: list[object] = []
    try:
        exported = msgspec.json.decode(message, type=Exported)
        if exported.refused:
            raise AttachError(exported.refused)
        _send(Answer(None))
        own = facts()
        for device in exported.exports:
            check(exported.facts, own, device)
        _send(Answer(None))
        for device, export in exported.exports.items():
            _send(Answer(_open(device, export, own.gpus.index(exported.facts.gpus[0]), opened)))
    except msgspec.DecodeError as error:
        _send(
            Answer(
                f"the exporter's message is garbled: {error} (install the same shmbridge in both, see teacher.python)"
            )
        )
    except Exception as error:
        _send(Answer(_told(error)))


def check(teacher: Facts, training: Facts, device: int) -> None:
    """Raise AttachError where the two jobs cannot share memory of any GPU; `device` is training's."""
    if not training.gpus:
        raise AttachError(f"torch {training.torch} finds no CUDA device in training's environment")
    if teacher.torch != training.torch:
        raise AttachError(
            f"the teacher has torch {teacher.torch}, training has torch {training.torch}; a CUDA handle opens only in the "
            "torch that made it (install the same in both, see teacher.python)"
        )
    if teacher.pid_namespace != training.pid_namespace:
        raise AttachError(
            "teacher and training are in different PID namespaces, between which CUDA IPC does not work (run both in one "
            "container, or with the host's: docker run --pid=host)"
        )
    if device >= len(training.gpus):
        raise _hidden("training", training, f"its own cuda:{device}")
    if teacher.gpus[0] not in training.gpus:
        raise _hidden("training", training, teacher.gpus[0])
    if training.gpus[device] not in teacher.gpus:
        raise _hidden("the teacher", teacher, training.gpus[device])


def facts() -> Facts:
    """Of this process."""
    import torch

    from shmbridge.plane import cuda_ipc

    count = torch.cuda.device_count()
    gpus = tuple(cuda_ipc.identify(_device(index)) for index in range(count))
    return Facts(str(torch.__version__), cuda_ipc.pid_namespace(), gpus)


def _open(device: int, export: msgspec.Raw, teacher: int, opened: list[object]) -> str | None:
    """Why the export of GPU `teacher` cannot be used on `device`; `opened` keeps it where it can."""
    import torch

    from shmbridge.plane import cuda_slab

    try:
        if teacher != device and not torch.cuda.can_device_access_peer(device, teacher):
            return "no peer access (`nvidia-smi topo -p2p r` shows which GPUs have it)"
        opened.append(cuda_slab.Opened(msgspec.json.decode(export, type=cuda_slab.Export), _device(device)))
    except Exception as error:
        return _told(error)
    return None


def _device(index: int) -> torch.device:
    import torch

    return torch.device("cuda", index)


def _hidden(job: str, sees: Facts, missing: str) -> AttachError:
    count = f"{len(sees.gpus)} GPU{'s' if len(sees.gpus) > 1 else ''}"
    return AttachError(
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
