"""Messages as JSON lines over a unix socket, between processes of one user.

Nothing here blocks, and nothing that a peer sends raises: garbage, a line that is too long and a peer that does not read what it
is sent end that connection alone.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from launcher import registry

BACKLOG = 16  # connections that wait to be accepted
LONGEST_LINE = 256 * 1024
_CHUNK = 16 * 1024  # read at once: a flood of messages holds up nobody else for long
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

T = TypeVar("T")


class Lines(Generic[T]):
    """One connection, from which messages of the decoder's type come. The kernel knows the peer's `pid` and `uid` since it connected or
    listened."""

    def __init__(self, connection: socket.socket, decoder: msgspec.json.Decoder[T]) -> None:
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, _ = _CREDENTIALS.unpack(packed)
        self.open = True
        self._connection = connection
        self._connection.setblocking(False)
        self._decoder = decoder
        self._received = bytearray()
        self._unsent = bytearray()

    def watch(self) -> list[tuple[int, int]]:
        """The file descriptor, where it is open, with events of select.poll."""
        writes = select.POLLOUT if self._unsent else 0
        return [(self._connection.fileno(), select.POLLIN | writes)] if self.open else []

    def send(self, message: msgspec.Struct) -> None:
        if self.open:
            self._unsent += msgspec.json.encode(message) + b"\n"
            self.flush()

    def flush(self) -> None:
        """Give the peer what it takes now."""
        try:
            while self.open and self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            if len(self._unsent) > LONGEST_LINE:
                self.close()
        except OSError:  # the peer has gone: `receive` closes, after what it has sent before
            self._unsent.clear()

    def receive(self) -> list[T]:
        """Some messages that have come; afterwards `open` tells whether more may come."""
        if not self.open:
            return []
        try:
            chunk = self._connection.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            chunk = b""
        if not chunk:
            self.close()
        self._received += chunk
        *lines, self._received = self._received.split(b"\n")
        messages: list[T] = []
        try:
            messages.extend(map(self._decoder.decode, lines))  # up to the first that is garbage
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.close()
        if len(self._received) > LONGEST_LINE:
            self.close()
        return messages

    def close(self) -> None:
        self.open = False
        self._connection.close()


@contextmanager
def listening(name: str) -> Iterator[socket.socket]:
    """The socket of a name that this process has claimed, in the registry's directory, which is the user's alone."""
    with registry.socket_path(name) as short, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path = Path(short)
        path.unlink(missing_ok=True)  # a keeper that was killed has left it
        listener.bind(short)
        path.chmod(0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)
