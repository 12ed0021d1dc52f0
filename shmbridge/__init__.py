"""shmbridge: a teacher process next to a torchrun training group, on one node, without a shared process group.

    bridge = shmbridge.connect()
    bridge.wait_ready()
    pending = bridge.submit(input_ids)
    with pending.wait() as reply:
        loss = kd_loss(student_logits, reply.logits)

Nothing here imports torch until `connect` (or another name that needs it) is first used, so that the launcher starts
fast.

errors         every exception
config         the settings
log            the logger, and the debug line of every hand-over
launch         the command shmbridge-launch: loads the launcher by its path, because another package may be named launcher
model_path     where a teacher's model is: a directory, a file, or the hub
output_spec    what a teacher returns, and how many bytes it takes
fingerprint    fingerprints of tensors and tokenizers, for the parity check
head           the output head: its matrix, bias and scaling
shm            the protocol in shared memory; torch-free
plane          where replies lie: shared memory, or the teacher's GPU memory
teacher        the teacher's process
rank           the rank's side: connect, submit, read replies
losses         memory-bounded distillation losses
integrations   the trainers that people use
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shmbridge.errors import (
    AttachError,
    Closed,
    ConfigError,
    DeadlineExceeded,
    LauncherDied,
    NotLaunched,
    ParityError,
    PeerLost,
    PlanError,
    RequestRefused,
    RingFull,
    RunStopped,
    SessionInUse,
    ShmbridgeError,
    TeacherDied,
    TeacherError,
    TornReply,
    TrainerDied,
)

if TYPE_CHECKING:
    from shmbridge.head import Head
    from shmbridge.rank.bridge import Bridge
    from shmbridge.rank.connect import connect
    from shmbridge.rank.pending import Lease, Pending
    from shmbridge.rank.prefetch import Prefetch
    from shmbridge.rank.reply import Reply
    from shmbridge.rank.stats import Stats
    from shmbridge.teacher.batch import Batch

__version__ = "0.2.0"

__all__ = [
    "AttachError",
    "Batch",
    "Bridge",
    "Closed",
    "ConfigError",
    "DeadlineExceeded",
    "Head",
    "LauncherDied",
    "Lease",
    "NotLaunched",
    "ParityError",
    "PeerLost",
    "Pending",
    "PlanError",
    "Prefetch",
    "Reply",
    "RequestRefused",
    "RingFull",
    "RunStopped",
    "SessionInUse",
    "ShmbridgeError",
    "Stats",
    "TeacherDied",
    "TeacherError",
    "TornReply",
    "TrainerDied",
    "connect",
]

_LAZY = {
    "Batch": "shmbridge.teacher.batch",
    "Bridge": "shmbridge.rank.bridge",
    "Head": "shmbridge.head",
    "Lease": "shmbridge.rank.pending",
    "Pending": "shmbridge.rank.pending",
    "Prefetch": "shmbridge.rank.prefetch",
    "Reply": "shmbridge.rank.reply",
    "Stats": "shmbridge.rank.stats",
    "connect": "shmbridge.rank.connect",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'shmbridge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
