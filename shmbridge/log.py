"""The debug log of every hand-over, and the logger that it goes to.

The `shmbridge` logger has its own level and handler, and no parent. A script that clears the root logger's handlers and
sets it to NOTSET neither loses our warnings nor gets our debug lines. Code on the hot path holds a Trace, or None and
then formats nothing.
"""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("shmbridge")


def configure(level: str) -> None:
    """Set the logger up for this process. `level` is a name of the logging module's, in any case."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level.upper())


class Trace:
    """Writes one line for each hand-over of one participant."""

    def __init__(self, role: str, rank: int) -> None:
        self._who = f"{role} {rank}"

    @classmethod
    def of(cls, role: str, rank: int) -> Trace | None:
        """A Trace if the level is debug, else None."""
        return cls(role, rank) if logger.isEnabledFor(logging.DEBUG) else None

    def hand_over(
        self,
        event: str,
        *,
        lane: int,
        step: int | None,
        sequence: int,
        slot: int,
        shape: tuple[int, ...],
        nbytes: int,
        since_ns: int,
    ) -> None:
        """One line: who, what, which request, how much, and the microseconds since `since_ns` (CLOCK_MONOTONIC)."""
        logger.debug(
            "%s %-7s lane=%d step=%s sequence=%d slot=%d shape=%s bytes=%d us=%.1f",
            self._who,
            event,
            lane,
            "-" if step is None else step,
            sequence,
            slot,
            "x".join(map(str, shape)),
            nbytes,
            (time.monotonic_ns() - since_ns) / 1000,
        )
