"""Names of live sessions, one file each in a directory of the user's own.

A name is taken while a process holds the kernel lock on its file; the file's text tells who. A file without a lock is
left from a launcher that was killed, and its name is free.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shmbridge.errors import ConfigError, SessionInUse


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
    file = _lock(path, name)
    try:
        yield Registration(file, kept)
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


@contextmanager
def socket_path(name: str) -> Iterator[str]:
    """Where the keeper of `name` listens, by a path that is short enough for a unix socket however deep the directory is."""
    folder = os.open(directory(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{name}.sock"
    finally:
        os.close(folder)


def entries() -> dict[str, dict[str, object]]:
    """What the files tell, by name; also those of launchers that were killed."""
    found: dict[str, dict[str, object]] = {}
    for path in sorted(directory().glob("*.json")):
        try:
            entry = json.loads(path.read_text())
        except (OSError, ValueError):
            entry = {}
        found[path.stem] = entry if isinstance(entry, dict) else {}
    return found


class Registration:
    """A name that this process holds."""

    def __init__(self, file: int, kept: bool = False) -> None:
        self._file = file
        self._kept = kept
        self.describe(session="", run="")

    def describe(self, session: str, run: str) -> None:
        """Tell others which session and run directory the name stands for."""
        entry = {"pid": os.getpid(), "session": session, "run": run} | ({"kept": True} if self._kept else {})
        text = json.dumps(entry).encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))


def _lock(path: Path, name: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file)
            os.close(file)
            raise SessionInUse(
                f"the name {name!r} is held by a live launcher (pid {holder.get('pid', 'unknown')}, run directory "
                f"{holder.get('run') or 'not made yet'}). Stop it, or choose another --name."
            ) from None
        if os.fstat(file).st_nlink:
            return file
        os.close(file)  # its last holder removed it in between


def _read(file: int) -> dict[str, object]:
    try:
        found = json.loads(os.pread(file, 64 * 1024, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
