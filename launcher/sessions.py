"""The sessions of this user on this machine: which there are, and which one is meant.

A session is live while its owner holds the kernel lock on its control segment. Reading attaches with all the checks of
Segment.attach; what cannot be read is told as such.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from launcher import registry
from launcher.console.text import listed
from launcher.hang import snapshot
from launcher.hang.snapshot import Snapshot
from shmbridge.errors import AttachError, ConfigError
from shmbridge.shm import owner
from shmbridge.shm.session import MappedSession, Names

LIVE, STALE, UNREADABLE = "live", "stale", "unreadable"
SHORT = 8  # digits of an id, as people are told


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One session, as far as it can be read."""

    session_id: str
    name: str = ""
    state: str = LIVE
    objects: int = 0  # in /dev/shm
    problem: str = ""  # why it cannot be read
    run: str = ""
    snapshot: Snapshot | None = None

    @property
    def short(self) -> str:
        return self.session_id[:SHORT]


def live(session_id: str) -> bool:
    """Whether a process holds the owner's lock."""
    with owner.lock_if_dead(session_id) as dead:
        return not dead


def every() -> list[Session]:
    """All sessions that have objects in /dev/shm, the live ones first."""
    names = {str(entry.get("session")).partition("@")[0]: name for name, entry in registry.entries().items()}
    found = [_read(session_id, names.get(session_id, ""), len(left)) for session_id, left in owner.objects().items()]
    return sorted(found, key=lambda one: (one.state != LIVE, one.name, one.session_id))


def find(asked: str) -> Session:
    """The live session with this name, id or beginning of an id; without one, the only one there is.

    Raises:
        ConfigError: there is none, or there are several; lists what there is.
    """
    found = every()
    alive = [one for one in found if one.state == LIVE]
    fitting = [one for one in alive if asked == one.name] if asked else alive
    fitting = fitting or [one for one in alive if asked and one.session_id.startswith(asked.lower())]
    if len(fitting) == 1:
        return fitting[0]
    if fitting and asked:
        raise ConfigError(f"{asked!r} is the beginning of {len(fitting)} session ids: {_listed(fitting)}.")
    if fitting:
        raise ConfigError(f"there are {len(fitting)} live sessions, name one: {_listed(fitting)}.")
    dead = [one for one in found if one.state != LIVE and asked and asked in (one.name, one.session_id[: len(asked)])]
    if dead:
        raise ConfigError(f"session {dead[0].short} is {_why(dead[0])}.")
    here = f"live: {_listed(alive)}" if alive else "no session of this user is live"
    raise ConfigError(f"there is no session {asked!r}; {here}." if asked else f"{here}.")


def _why(session: Session) -> str:
    if session.state == STALE:
        return "dead: its launcher was killed. `shmbridge-launch clean` removes what it left"
    return f"not readable: {session.problem.rstrip('.')}"


def _listed(sessions: Sequence[Session]) -> str:
    return listed([f"{one.name} ({one.short})" if one.name else one.short for one in sessions])


def _read(session_id: str, name: str, objects: int) -> Session:
    found = Session(session_id=session_id, name=name, objects=objects)
    other = _foreign(session_id)
    if other:
        return msgspec.structs.replace(found, state=UNREADABLE, problem=other)
    if not live(session_id):
        return msgspec.structs.replace(found, state=STALE)
    try:
        view = MappedSession(session_id)
        seen = snapshot.look(view)
    except AttachError as error:
        return msgspec.structs.replace(found, state=UNREADABLE, problem=str(error))
    return msgspec.structs.replace(found, run=view.settings.run_dir, snapshot=seen)


def _foreign(session_id: str) -> str:
    """Whose it is, where it is another user's."""
    path = Path(owner.SHM_DIRECTORY) / Names(session_id).control[1:]
    try:
        uid = path.lstat().st_uid
    except FileNotFoundError:
        return ""
    return "" if uid == os.geteuid() else f"it belongs to uid {uid}"
