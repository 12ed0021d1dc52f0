"""Whether a call of the bridge may go on: it is open, this process connected it, and the run is not to stop.

The save hook (bridge.on_stop) is called here, once, before the rank stops.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from shmbridge import log
from shmbridge.errors import Closed, RunStopped
from shmbridge.shm.rank_session import RankSession

Hook = Callable[[], object]


class Lifecycle:
    """The life of one bridge. A bridge that is off has no session: nothing stops it, and signals end the rank as without it."""

    def __init__(self, session: RankSession | None) -> None:
        self._session = session
        self.enabled = session is not None
        self.process = os.getpid()
        self._why_closed = ""  # empty while the bridge is open
        self._hook: Hook | None = None
        self._signalled = False
        self.deferrals = 0  # blocks in which a stop does not interrupt the bridge

    # Use

    @property
    def usable(self) -> bool:
        """Whether the bridge is open and this process connected it. A forked child, such as a DataLoader worker, is not the rank."""
        return not self._why_closed and os.getpid() == self.process

    def check(self) -> None:
        """Raise Closed unless the bridge is usable."""
        if self._why_closed:
            raise Closed(self._why_closed)
        if os.getpid() != self.process:
            raise Closed(f"the bridge belongs to pid {self.process}; a forked child cannot use it.")

    @property
    def session(self) -> RankSession:
        """The session of a usable bridge. Raises Closed."""
        self.check()
        if self._session is None:
            raise Closed("the bridge is off; there is no teacher.")
        return self._session

    def close(self, why: str) -> bool:
        """Make every later use raise Closed, which says `why`. Returns whether the bridge was usable until now."""
        usable = self.usable
        self._why_closed = self._why_closed or why
        return usable

    def end(self) -> None:
        """Nothing is left to save from a bridge that was closed, so SIGTERM ends the process again."""
        self._hook = None
        self._replace_sigterm(self._on_sigterm, signal.SIG_DFL)

    # Stopping

    def on_stop(self, hook: Hook) -> None:
        """Call `hook` before this rank stops. SIGTERM then only sets a flag, unless the script has a handler for it."""
        session = self._session
        if session is None:
            return
        if self._hook is None:
            session.record.saves = True
            session.stop = self._interrupts
            self._replace_sigterm(signal.SIG_DFL, self._on_sigterm)
        self._hook = hook

    @property
    def stop_requested(self) -> bool:
        """Whether the run is to stop: this rank has a hook and was sent SIGTERM, or the session says so."""
        return self._signalled or self.asked_to_stop

    @property
    def asked_to_stop(self) -> bool:
        """Whether the session says that the run is to stop."""
        return self._session is not None and self._session.control.stopping

    def heed(self) -> None:
        """Save and raise RunStopped where the run is to stop."""
        if self._interrupts():
            self.save()
            raise RunStopped("the run is to stop, and this rank has saved (bridge.on_stop).")

    def save(self) -> None:
        """Call the hook, unless it was called before. What it raises is raised."""
        hook, self._hook = self._hook, None
        session = self._session
        if hook is None or session is None:
            return
        log.logger.info("rank %d saves before it stops", session.lane.index)
        with session.record.declaring("save hook", session.settings.timeouts.save_s):
            hook()
        session.stop = lambda: self.stop_requested

    def _interrupts(self) -> bool:
        """Whether a stop ends calls of the bridge. It does not within the hook: a teacher that lives answers the hook's requests."""
        return self._hook is not None and not self.deferrals and self.stop_requested

    @staticmethod
    def _replace_sigterm(before: object, after: Any) -> None:
        """Set the handler of SIGTERM, which only the main thread may do, where it is `before`."""
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) == before:
            signal.signal(signal.SIGTERM, after)

    def _on_sigterm(self, *_: object) -> None:
        if os.getpid() == self.process:
            self._signalled = True
        else:  # a forked child, such as a DataLoader worker, saves nothing
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
