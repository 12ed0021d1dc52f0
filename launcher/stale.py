"""Remove what dead sessions left in shared memory. A live one is never touched: its owner holds a kernel lock."""

from __future__ import annotations

import os
from collections.abc import Iterator

from shmbridge.shm import owner


def reclaim() -> Iterator[tuple[str, int]]:
    """(session id, number of objects) of each dead session of this user, once they have been removed."""
    for session_id, names in owner.objects().items():
        if not _is_mine(names):
            continue
        with owner.lock_if_dead(session_id) as dead:
            count = owner.unlink_session(session_id) if dead else 0
        if count:  # none where its owner was just removing it
            yield session_id, count


def dead() -> list[str]:
    """Ids of this user's dead sessions. Nothing is removed."""
    found = []
    for session_id, names in owner.objects().items():
        with owner.lock_if_dead(session_id) as is_dead:
            if is_dead and _is_mine(names):
                found.append(session_id)
    return found


def _is_mine(names: list[str]) -> bool:
    try:
        return all((owner.SHM_DIRECTORY / name).lstat().st_uid == os.geteuid() for name in names)
    except FileNotFoundError:
        return False  # its owner is removing it
