"""The keeper's socket: who comes, and what they say.

It lies in the registry's directory, which is the user's alone, and takes only processes of this user. One that says garbage is
dropped; of too many the oldest makes room; nobody is waited for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher import registry
from launcher.daemon import messages
from launcher.daemon.messages import ToKeeper
from launcher.daemon.transport import Lines, credentials

Visitor = Lines[ToKeeper]
_MOST_VISITORS = 32
_BACKLOG = 16


@contextmanager
def listening(name: str) -> Iterator[socket.socket]:
    """The socket of a name that this process has claimed."""
    with registry.socket_path(name) as path:
        _remove(path)  # a keeper that was killed has left it
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
    listener.listen(_BACKLOG)
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


class Reception:
    """The connections of a keeper."""

    def __init__(self, listener: socket.socket, hear: Callable[[Visitor, ToKeeper], None]) -> None:
        """`hear` is given each message, and whose it is."""
        self._listener = listener
        self._hear = hear
        self._visitors: list[Visitor] = []  # the oldest first
        self.holder: Visitor | None = None  # is never put out to make room

    def watch(self) -> tuple[list[int], list[int]]:
        """File descriptors to read from, and those to write to."""
        here = [visitor for visitor in self._visitors if visitor.open]
        return [self._listener.fileno(), *(one.fd for one in here)], [one.fd for one in here if one.behind]

    def attend(self) -> None:
        """Take who has come, hear what was said, and forget who has gone."""
        self._accept()
        for visitor in list(self._visitors):
            for message in visitor.receive():
                self._hear(visitor, message)
            visitor.flush()
        self._visitors = [visitor for visitor in self._visitors if visitor.open]

    def close(self) -> None:
        for visitor in self._visitors:
            visitor.close()

    def _accept(self) -> None:
        for _ in range(_BACKLOG):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody (else) there; or they have gone, or there are no file descriptors left
                return
            if not credentials(connection).is_mine:
                connection.close()
                continue
            self._visitors.append(Lines(connection, messages.AT_KEEPER))
            if len(self._visitors) > _MOST_VISITORS:
                oldest = next(visitor for visitor in self._visitors if visitor is not self.holder)
                oldest.close()
                self._visitors.remove(oldest)
