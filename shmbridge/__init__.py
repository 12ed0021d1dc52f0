"""shmbridge: a teacher process next to a torchrun training group, on one node, without a shared process group.

    bridge = shmbridge.connect()
    bridge.wait_ready()
    pending = bridge.submit(input_ids)
    with pending.wait() as reply:
        loss = kd_loss(student_logits, reply.logits)

Nothing here imports torch until `connect` (or another name that needs it) is first used, so that the launcher starts
fast.
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
    from shmbridge.bridge import Bridge
    from shmbridge.connection import connect
    from shmbridge.head import Head
    from shmbridge.payload import Batch
    from shmbridge.pending import Lease, Pending
    from shmbridge.prefetch import Prefetch
    from shmbridge.reply import Reply
    from shmbridge.stats import Stats

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
    "Batch": "shmbridge.payload",
    "Bridge": "shmbridge.bridge",
    "Head": "shmbridge.head",
    "Lease": "shmbridge.pending",
    "Pending": "shmbridge.pending",
    "Prefetch": "shmbridge.prefetch",
    "Reply": "shmbridge.reply",
    "Stats": "shmbridge.stats",
    "connect": "shmbridge.connection",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'shmbridge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
