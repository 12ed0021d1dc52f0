"""The last thing a rank does before it stops: the script's own save hook, once, in the thread that calls the bridge."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shmbridge import log
from shmbridge.errors import RunStopped
from shmbridge.shm.session import TrainerSession

Hook = Callable[[], object]


class Stopping:
    """Of one rank. Without a hook it does nothing, and signals end the rank as they always did."""

    def __init__(self, session: TrainerSession) -> None:
        self._session = session
        self._hook: Hook | None = None
        self._signalled = False
        self._deferrals = 0
        self._takes_sigterm = False
        self._process = os.getpid()

    def set(self, hook: Hook) -> None:
        """Call `hook` before this rank stops. SIGTERM then only takes note, unless the script has a handler of its own."""
        if self._hook is None:
            self._session.record.has_save_hook()
            self._session.stop = self._asked
            in_main = threading.current_thread() is threading.main_thread()
            if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, lambda *_: self._take_note())
                self._takes_sigterm = True
        self._hook = hook

    @property
    def requested(self) -> bool:
        """Whether the run is to stop."""
        return self._told()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In the block a stop does not interrupt the bridge."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1

    def heed(self) -> None:
        """Save and raise RunStopped where the run is to stop."""
        if self._hook and self._asked():
            self.save()
            raise RunStopped("the run is to stop, and this rank has saved (bridge.on_stop).")

    def save(self) -> None:
        """Call the hook, unless it was called before. What it raises is raised."""
        hook, self._hook = self._hook, None
        if hook is None:
            return
        log.logger.info("rank %d saves before it stops", self._session.lane.index)
        with self._session.record.declaring("save hook", self._session.settings.timeouts.save_s):
            hook()
        self._session.stop = self._told

    def close(self) -> None:
        """The bridge is closed: there is nothing left to save from it, and SIGTERM ends the process again."""
        self._hook = None
        if self._takes_sigterm and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._takes_sigterm = False

    def _asked(self) -> bool:
        """Whether a call of the bridge is to stop. Not within the hook: what it asks of a teacher that lives is still answered."""
        return self._hook is not None and not self._deferrals and self._told()

    def _told(self) -> bool:
        return self._signalled or self._session.asked_to_stop

    def _take_note(self) -> None:
        if os.getpid() == self._process:
            self._signalled = True
        else:  # a forked child, such as a DataLoader worker, saves nothing
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
