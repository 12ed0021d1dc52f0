"""A thread that shows a live process in its record.

A heartbeat tells a process whose interpreter runs from one that is stopped, or holds the GIL in native code. Whether its
loop moves, the phase, step and sequence words tell.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from shmbridge.shm.participant_record import Record

EVERY_S = 1.0


class Heartbeat:
    """Beats once a second until `stop`, or the end of the process. A forked child has none."""

    def __init__(self, record: Record, look: Callable[[], None] | None = None) -> None:
        """`look` is called with each beat, in the thread; what it raises ends the thread."""
        self._record = record
        self._look = look
        self._stopped = threading.Event()
        record.beat()
        threading.Thread(target=self._run, name="shmbridge-heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(EVERY_S):
            self._record.beat()
            if self._look:
                self._look()
