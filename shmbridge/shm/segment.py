"""POSIX shared-memory objects: created and reserved by the owner, attached with every check.

Only the owner unlinks them. An object that could not be reserved is unlinked here, before anyone has seen it.

A segment is reserved with posix_fallocate before it is mapped: on a full tmpfs ftruncate and mmap succeed and the first
write dies of SIGBUS, while posix_fallocate answers ENOSPC. It is then populated, so that no page fault is left for the
training loop.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import posix_ipc

from shmbridge.errors import AttachError, PlanError
from shmbridge.shm import layout
from shmbridge.shm.layout import Header

_MADV_POPULATE_WRITE = 23  # Linux 5.14; not yet in the mmap module


class Segment:
    """One mapped object. `bytes` is the whole mapping, `words` the same as 64-bit words.

    There is no close: the memory stays mapped while a view, an array or a tensor looks into it, and is unmapped with the
    last of them. An explicit unmap could only fail (NumPy pins a mapping) or leave a pointer into nothing.
    """

    def __init__(self, name: str, mapping: mmap.mmap) -> None:
        self.name = name
        self.bytes = memoryview(mapping)
        self.words = self.bytes.cast("Q")
        self._mapping = mapping

    @classmethod
    def create(cls, name: str, kind: int, nbytes: int, session_id: str, generation: int = 0, index: int = 0) -> Segment:
        """A new zeroed segment of `nbytes`, header written but for the magic; `publish` makes it attachable.

        Raises:
            PlanError: /dev/shm has no room for it.
        """
        require_x86()
        nbytes = layout.align(nbytes, layout.PAGE)
        with explained(f"segment {name}", nbytes):
            segment = cls(name, _reserve(name, nbytes))
            segment._populate()
        words = segment.words
        words[Header.VERSION], words[Header.KIND], words[Header.NBYTES] = layout.VERSION, kind, nbytes
        words[Header.SESSION_HIGH], words[Header.SESSION_LOW] = _session_words(session_id)
        words[Header.GENERATION], words[Header.INDEX] = generation, index
        return segment

    def _populate(self) -> None:
        """Touch every page now, so that the training loop meets no page fault."""
        try:
            self._mapping.madvise(_MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # an older kernel: the pages are reserved all the same
                raise

    def publish(self) -> None:
        self.words[Header.MAGIC] = layout.MAGIC

    @classmethod
    def attach(cls, name: str, kind: int, session_id: str, generation: int = 0, index: int = 0) -> Segment:
        """The existing segment `name`, after its owner, mode, size and header were checked.

        Raises:
            AttachError: says what was found, what was expected and what to do.
        """
        require_x86()
        shm = _open(name)
        try:
            status = os.fstat(shm.fd)
            size, mode = status.st_size, stat.S_IMODE(status.st_mode)
            if status.st_uid != os.geteuid():
                raise AttachError(
                    f"segment {name} belongs to uid {status.st_uid}, this process runs as {os.geteuid()}: refused."
                )
            if mode & 0o077:
                raise AttachError(
                    f"segment {name} has mode {mode:04o}, expected 0600: others can write to it. Refused."
                )
            if size < layout.PAGE or size % layout.PAGE:
                raise AttachError(f"segment {name} has {size} bytes, no whole number of pages: it is truncated.")
            segment = cls(name, mmap.mmap(shm.fd, size))
        finally:
            shm.close_fd()
        segment._check_header((kind, size, *_session_words(session_id), generation, index))
        segment._populate()
        return segment

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the segment's file lock for the block. Gives False, at once, where another process holds it. The kernel takes it
        back from a process that is killed. Raises AttachError."""
        shm = _open(self.name)
        try:
            fcntl.flock(shm.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            try:
                yield True
            finally:
                fcntl.flock(shm.fd, fcntl.LOCK_UN)  # closing would not do where another thread has forked meanwhile
        finally:
            shm.close_fd()

    def _check_header(self, expected: tuple[int, ...]) -> None:
        words = self.words
        if words[Header.MAGIC] != layout.MAGIC:
            raise AttachError(
                f"segment {self.name} has magic {words[Header.MAGIC]:#x}, expected {layout.MAGIC:#x}: "
                "it is foreign, garbled or half-made. Start a new session."
            )
        if words[Header.VERSION] != layout.VERSION:
            raise AttachError(
                f"segment {self.name} has layout version {words[Header.VERSION]}, this shmbridge has {layout.VERSION}: "
                "install the same shmbridge for launcher, teacher and training."
            )
        found = tuple(words[i] for i in range(Header.KIND, Header.INDEX + 1))
        if found != expected:
            fields = ("kind", "nbytes", "session (high)", "session (low)", "generation", "index")
            wrong = [f"{f} {a:#x}, expected {b:#x}" for f, a, b in zip(fields, found, expected, strict=True) if a != b]
            raise AttachError(
                f"segment {self.name} has {'; '.join(wrong)}: it is stale or garbled. Start a new session."
            )


def require_x86() -> None:
    """Raise AttachError on a processor whose stores other cores may see out of order (see docs/design.md)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise AttachError(
            f"this processor is {platform.machine()}; shmbridge needs x86-64, whose stores stay in order: "
            "its cursors carry no memory fence for other processors."
        )


@contextmanager
def explained(what: str, nbytes: int = 0) -> Iterator[None]:
    """Opens or creates `what`, which takes `nbytes`, in the block.

    Raises:
        AttachError: it does not exist, or is another user's.
        PlanError: /dev/shm has no room for it.
    """
    try:
        yield
    except posix_ipc.ExistentialError:
        raise AttachError(f"{what} does not exist: the session has ended. Start a new one.") from None
    except (posix_ipc.PermissionsError, PermissionError):
        raise AttachError(f"{what} belongs to another user; a session is private to its user.") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        shm = os.statvfs("/dev/shm")
        raise PlanError(
            f"/dev/shm has {shm.f_bavail * shm.f_frsize / 2**20:,.0f} MiB free, {what} needs "
            f"{max(nbytes, 2**20) / 2**20:,.0f} MiB. Lower ring.max_tokens or ring.depth, or give the container more (docker "
            "run --shm-size; Docker and Kubernetes give 64 MB unless told otherwise)."
        ) from None


def _open(name: str) -> posix_ipc.SharedMemory:
    with explained(f"segment {name}"):
        return posix_ipc.SharedMemory(name)


def _session_words(session_id: str) -> tuple[int, int]:
    return int(session_id[:16], 16), int(session_id[16:], 16)


def _reserve(name: str, nbytes: int) -> mmap.mmap:
    """Map a new object with all of its memory reserved. Nothing is left of it where that fails."""
    shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    try:
        os.fchmod(shm.fd, 0o600)
        os.posix_fallocate(shm.fd, 0, nbytes)
        return mmap.mmap(shm.fd, nbytes)
    except OSError:
        posix_ipc.unlink_shared_memory(name)
        raise
    finally:
        shm.close_fd()
