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
