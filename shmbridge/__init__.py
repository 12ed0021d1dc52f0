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
    PeerLost,
    PlanError,
    RequestRefused,
    RingFull,
    SessionInUse,
    ShmbridgeError,
    TeacherDied,
    TeacherError,
    TrainerDied,
)

if TYPE_CHECKING:
    from shmbridge.bridge import Bridge, Lease, Pending, Reply
    from shmbridge.connection import connect
    from shmbridge.server import Batch

__version__ = "0.1.0"

__all__ = [
    "AttachError",
    "Batch",
    "Bridge",
    "Closed",
    "ConfigError",
    "DeadlineExceeded",
    "LauncherDied",
    "Lease",
    "NotLaunched",
    "PeerLost",
    "Pending",
    "PlanError",
    "Reply",
    "RequestRefused",
    "RingFull",
    "SessionInUse",
    "ShmbridgeError",
    "TeacherDied",
    "TeacherError",
    "TrainerDied",
    "connect",
]

_LAZY = {
    "Batch": "shmbridge.server",
    "Bridge": "shmbridge.bridge",
    "Lease": "shmbridge.bridge",
    "Pending": "shmbridge.bridge",
    "Reply": "shmbridge.bridge",
    "connect": "shmbridge.connection",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'shmbridge' has no attribute {name!r}")
