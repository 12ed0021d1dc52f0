"""Whether a call of the bridge may go on: it is open, this process connected it, and the run is not to stop.

The save hook (bridge.on_stop) is called here, once, before the rank stops.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
        self._deferrals = 0
        self._takes_sigterm = False

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
        if self._session is None or self._why_closed or os.getpid() != self.process:
            self.check()
            raise Closed("the bridge is off; there is no teacher.")
        return self._session

    def close(self, why: str) -> bool:
        """Make every later use raise Closed, which says `why`. Returns whether the bridge was usable until now."""
        usable = self.usable
        self._why_closed = self._why_closed or why
        return usable

    def end(self, closes_lane: bool) -> None:
        """The last of a bridge that was closed. Nothing is left to save from it, so SIGTERM ends the process again."""
        self._hook = None
        if self._takes_sigterm and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._takes_sigterm = False
        if closes_lane and self._session is not None:
            self._session.close()

    def reopen(self) -> RankSession:
        """The session of a closed bridge, for the next one of this process. Raises what RankSession.reopen raises."""
        assert self._session is not None, "a bridge that is off gives way to nobody"
        self._session.reopen()
        return self._session

    # Stopping

    def on_stop(self, hook: Hook) -> None:
        """Call `hook` before this rank stops. SIGTERM then only sets a flag, unless the script has a handler for it."""
        session = self._session
        if session is None:
            return
        if self._hook is None:
            session.record.saves = True
            session.stop = self._interrupts
            in_main = threading.current_thread() is threading.main_thread()
            if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, lambda *_: self._on_sigterm())
                self._takes_sigterm = True
        self._hook = hook

    @property
    def stop_requested(self) -> bool:
        """Whether the run is to stop: this rank has a hook and was sent SIGTERM, or the session says so."""
        return self._signalled or self.asked_to_stop

    @property
    def asked_to_stop(self) -> bool:
        """Whether the session says that the run is to stop."""
        return self._session is not None and self._session.control.stopping

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
        return self._hook is not None and not self._deferrals and self.stop_requested

    def _on_sigterm(self) -> None:
        if os.getpid() == self.process:
            self._signalled = True
        else:  # a forked child, such as a DataLoader worker, saves nothing
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
