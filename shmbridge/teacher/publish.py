"""Replies and chunks are published in the order in which they were sealed, and each after its bytes have arrived.

On the CPU, and on the CUDA plane, a sealed reply is published at once. Where a GPU copies to host memory, its host must not
wait in the forward's thread: a thread waits for each copy and publishes behind it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple


class _Sealed(NamedTuple):
    arrived: Callable[[], None] | None
    publish: Callable[[], None]


class Publisher:
    """Of one teacher. The thread begins with the first reply that has to be waited for."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Sealed | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def after(self, arrived: Callable[[], None] | None, publish: Callable[[], None]) -> None:
        """Call `publish` once `arrived` has returned, and after all that was handed in before."""
        if self._thread is None:
            if arrived is None:
                publish()
                return
            self._thread = threading.Thread(target=self._run, name="shmbridge-publisher", daemon=True)
            self._thread.start()
        self._queue.put(_Sealed(arrived, publish))

    def check(self) -> None:
        """Raise what waiting has raised: a CUDA error, after which nothing can be answered."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Publish what is sealed. Raises what `check` raises."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self) -> None:
        while (sealed := self._queue.get()) is not None:
            try:
                if sealed.arrived is not None:
                    sealed.arrived()
                sealed.publish()
            except BaseException as error:
                self._error = error
                return
