"""The last thing a rank does before it stops: the script's own save hook, once, in the thread that calls the bridge."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

from shmbridge import trace
from shmbridge.errors import LauncherDied
from shmbridge.session import TrainerSession

Hook = Callable[[], object]


class Stopping:
    """Of one rank. Without a hook it does nothing, and signals end the rank as they always did."""

    def __init__(self, session: TrainerSession) -> None:
        self._session = session
        self._hook: Hook | None = None
        self._signalled = False

    def set(self, hook: Hook) -> None:
        """Call `hook` before this rank stops. SIGTERM then only takes note, unless the script has a handler of its own."""
        if self._hook is None:
            self._session.record.has_save_hook()
            self._session.stop = self._asked
            in_main = threading.current_thread() is threading.main_thread()
            if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, lambda *_: self._take_note())
        self._hook = hook

    def heed(self) -> None:
        """Save and raise LauncherDied where the run is to stop."""
        if self._hook and self._asked():
            self.save()
            raise LauncherDied("the run is to stop, and this rank has saved (bridge.on_stop).")

    def save(self) -> None:
        """Call the hook, unless it was called before. What it raises is raised."""
        hook, self._hook = self._hook, None
        if hook is None:
            return
        seconds = self._session.settings.timeouts.save_s
        self._session.record.declare("save hook", time.monotonic_ns() + int(seconds * 1e9))
        trace.logger.info("rank %d saves before it stops", self._session.lane.index)
        try:
            hook()
        finally:
            self._session.record.withdraw()

    def _asked(self) -> bool:
        return self._signalled or self._session.asked_to_save

    def _take_note(self) -> None:
        self._signalled = True
