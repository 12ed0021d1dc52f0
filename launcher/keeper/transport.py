"""Messages as JSON lines over a unix socket, between processes of one user.

Nothing here blocks, and nothing that a peer sends raises: garbage, a line that is too long and a peer that does not read what it
is sent end that connection alone.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import msgspec

from launcher import registry

BACKLOG = 16  # connections that wait to be accepted
LONGEST_LINE = 256 * 1024
_CHUNK = 64 * 1024
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

T = TypeVar("T")


class Credentials(NamedTuple):
    """Who is at the other end of a unix socket, as the kernel knows it since connect or listen."""

    pid: int
    uid: int

    @property
    def is_mine(self) -> bool:
        return self.uid == os.geteuid()


def credentials(connection: socket.socket) -> Credentials:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return Credentials(pid, uid)


class Lines(Generic[T]):
    """One connection, from which messages of the decoder's type come."""

    def __init__(self, connection: socket.socket, decoder: msgspec.json.Decoder[T]) -> None:
        self.pid = credentials(connection).pid
        self.open = True
        self._connection = connection
        self._connection.setblocking(False)
        self._decoder = decoder
        self._received = bytearray()
        self._unsent = bytearray()

    @property
    def fd(self) -> int:
        return self._connection.fileno()

    @property
    def behind(self) -> bool:
        """The peer has not taken all that it was sent."""
        return bool(self._unsent)

    def send(self, message: msgspec.Struct) -> None:
        if self.open:
            self._unsent += msgspec.json.encode(message) + b"\n"
            self.flush()

    def flush(self) -> None:
        """Give the peer what it takes now."""
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            if len(self._unsent) > LONGEST_LINE:
                self.close()
        except OSError:
            self.close()

    def receive(self) -> list[T]:
        """The messages that have come; afterwards `open` tells whether more may come."""
        while self.open and len(self._received) <= LONGEST_LINE:
            try:
                chunk = self._connection.recv(_CHUNK)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            if not chunk:
                self.close()
            self._received += chunk
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        if len(rest) > LONGEST_LINE:
            self.close()
        return self._decoded(lines)

    def _decoded(self, lines: list[bytearray]) -> list[T]:
        found: list[T] = []
        for line in lines:
            try:
                found.append(self._decoder.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self.close()
                break
        return found

    def close(self) -> None:
        self.open = False
        self._connection.close()


@contextmanager
def listening(name: str) -> Iterator[socket.socket]:
    """The socket of a name that this process has claimed, in the registry's directory, which is the user's alone."""
    with registry.socket_path(name) as path:
        _remove(path)  # a keeper that was killed has left it
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
    listener.listen(BACKLOG)
    listener.setblocking(False)
    try:
        yield listener
    finally:
        listener.close()
        with registry.socket_path(name) as path:
            _remove(path)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
