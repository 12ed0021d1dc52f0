"""The sessions of this user on this machine: which there are, which one is meant, and the removal of dead ones.

A session is live while its owner holds the kernel lock on its control segment. Reading attaches with all the checks of
Segment.attach; what cannot be read is told as such.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

import msgspec

from launcher import registry
from launcher.console.text import listed
from launcher.hang import snapshot
from launcher.hang.snapshot import Snapshot
from shmbridge.errors import AttachError, ConfigError
from shmbridge.shm import owner
from shmbridge.shm.session import MappedSession

LIVE, STALE, UNREADABLE = "live", "stale", "unreadable"
SHORT = 8  # digits of an id, as people are told


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One session, as far as it can be read."""

    session_id: str
    name: str = ""
    state: str = LIVE
    objects: int = 0  # in /dev/shm
    nbytes: int = 0  # that these take
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
    names = {entry.session.partition("@")[0]: name for name, entry in registry.entries().items()}
    found = [_read(session_id, names.get(session_id, ""), left) for session_id, left in owner.objects().items()]
    return sorted(found, key=lambda one: (one.state != LIVE, one.name, one.session_id))


def dead() -> list[str]:
    """Ids of this user's dead sessions."""
    found = owner.objects()
    mine = [one for one, left in found.items() if all(stat.st_uid == os.geteuid() for stat in _stats(left))]
    return [session_id for session_id in mine if not live(session_id)]


def reclaim() -> Iterator[tuple[str, int]]:
    """Remove what dead sessions of this user left in shared memory: (session id, number of objects) of each, once it is done. A live
    one is never touched, because its owner holds a kernel lock."""
    for session_id in dead():
        with owner.lock_if_dead(session_id) as is_dead:
            count = owner.unlink_session(session_id) if is_dead else 0
        if count:  # none where its owner was just removing it
            yield session_id, count


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
    ended = [one for one in found if one.state != LIVE and asked and asked in (one.name, one.session_id[: len(asked)])]
    if ended:
        why = f"not readable: {ended[0].problem.rstrip('.')}"
        if ended[0].state == STALE:
            why = "dead: its launcher was killed. `shmbridge-launch clean` removes what it left"
        raise ConfigError(f"session {ended[0].short} is {why}.")
    here = f"live: {_listed(alive)}" if alive else "no session of this user is live"
    raise ConfigError(f"there is no session {asked!r}; {here}." if asked else f"{here}.")


def _listed(sessions: Sequence[Session]) -> str:
    return listed([f"{one.name} ({one.short})" if one.name else one.short for one in sessions])


def _read(session_id: str, name: str, left: Sequence[str]) -> Session:
    stats = _stats(left)
    nbytes = 512 * sum(stat.st_blocks for stat in stats)
    found = Session(session_id=session_id, name=name, objects=len(left), nbytes=nbytes)
    others = [stat.st_uid for stat in stats if stat.st_uid != os.geteuid()]
    if others:
        return msgspec.structs.replace(found, state=UNREADABLE, problem=f"it belongs to uid {others[0]}")
    if not live(session_id):
        return msgspec.structs.replace(found, state=STALE)
    try:
        view = MappedSession(session_id)
        seen = snapshot.look(view)
    except AttachError as error:
        return msgspec.structs.replace(found, state=UNREADABLE, problem=str(error))
    return msgspec.structs.replace(found, run=view.settings.run_dir, snapshot=seen)


def _stats(names: Sequence[str]) -> list[os.stat_result]:
    """Of a session's objects, without those that its owner is just removing."""
    found = []
    for name in names:
        with suppress(FileNotFoundError):
            found.append((owner.SHM_DIRECTORY / name).lstat())
    return found
