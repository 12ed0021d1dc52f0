"""Names of live sessions, one file each in a directory that belongs to the user alone.

A name is taken while a process holds the kernel lock on its file; the file's text tells who. A file without a lock is
left from a launcher that was killed, and its name is free.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shmbridge.errors import ConfigError, SessionInUse


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What the file of a name tells of the process that has claimed it."""

    pid: int = 0
    session: str = ""
    run: str = ""  # directory
    kept: bool = False  # it keeps a teacher across runs

    @property
    def where(self) -> str:
        return f"pid {self.pid or 'unknown'}, run directory {self.run or 'not made yet'}"


class Registration:
    """A name that this process holds."""

    def __init__(self, file: int, kept: bool) -> None:
        self._file = file
        self._kept = kept
        self.describe(session="", run="")

    def describe(self, session: str, run: str) -> None:
        """Tell others which session and run directory the name stands for."""
        text = msgspec.json.encode(Entry(pid=os.getpid(), session=session, run=run, kept=self._kept))
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))


def directory() -> Path:
    """$XDG_RUNTIME_DIR/shmbridge where that is this user's, else /tmp/shmbridge-UID; made if needed.

    Raises:
        ConfigError: it cannot be made, belongs to somebody else, or others may write to it.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    path = Path(runtime) / "shmbridge" if _is_mine(runtime) else Path(f"/tmp/shmbridge-{os.geteuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(f"the directory of session names cannot be made: {path}: {error.strerror}.") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{path} must be a directory of uid {os.geteuid()} with mode 0700; remove it and start again."
        )
    return path


def _is_mine(runtime: str) -> bool:
    """After `su` or `sudo -E` the variable still names the directory of the user before."""
    try:
        status = os.stat(runtime)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and os.access(runtime, os.W_OK | os.X_OK)


@contextmanager
def claim(name: str, kept: bool = False) -> Iterator[Registration]:
    """Hold `name` while the block runs; `kept`: for a teacher across runs.

    Raises:
        SessionInUse: a live launcher holds it; names its pid and run directory.
    """
    path = directory() / f"{name}.json"
    try:
        file = _lock(path, os.O_CREAT)
    except BlockingIOError:
        held = entries().get(name, Entry())
        by, ways = "live launcher", "Stop it"
        if held.kept:
            by = "kept teacher"
            ways = (
                f"Train with it (shmbridge-launch --attach {name} ...), end it (shmbridge-launch teacher stop {name})"
            )
        another = "shmbridge-launch teacher start NAME ..." if kept else "--name NAME"
        raise SessionInUse(
            f"the name {name!r} is held by a {by} ({held.where}). {ways}, or choose another: {another}."
        ) from None
    try:
        yield Registration(file, kept)
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def remove_if_free(name: str, dry_run: bool = False) -> bool:
    """Remove the file and the socket of a name that no process holds; False where one does. With `dry_run` nothing is removed."""
    path = directory() / f"{name}.json"
    try:
        file = _lock(path)
    except OSError:
        return False
    if not dry_run:
        path.with_suffix(".sock").unlink(missing_ok=True)  # of a keeper; first, while nobody can claim the name
        path.unlink(missing_ok=True)
    os.close(file)
    return True


@contextmanager
def socket_path(name: str) -> Iterator[str]:
    """Where the keeper of `name` listens, by a path that is short enough for a unix socket however deep the directory is."""
    folder = os.open(directory(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{name}.sock"
    finally:
        os.close(folder)


def entries() -> dict[str, Entry]:
    """What the files tell, by name; also the files of launchers that were killed."""
    found = {}
    for path in sorted(directory().glob("*.json")):
        try:
            found[path.stem] = msgspec.json.decode(path.read_bytes(), type=Entry)
        except (OSError, msgspec.DecodeError):
            found[path.stem] = Entry()
    return found


def _lock(path: Path, flags: int = 0) -> int:
    """Open the file that is at `path` and take its lock. The lock on a file that was removed meanwhile is worth nothing: then
    again. Raises OSError: BlockingIOError where another process has the lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink:
                return file
        except BlockingIOError:
            os.close(file)
            raise
        os.close(file)
