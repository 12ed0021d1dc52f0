"""What a check finds, and how checks are run so that none of them can fail or hang its caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import msgspec

Status = Literal["ok", "warning", "fault"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "fault")  # from the best to the worst


class Finding(NamedTuple):
    """What one check found."""

    status: Status  # warning: runs work, but not all of them, or not as fast; fault: no run works, or none that was asked for
    found: str  # one line
    remedy: str = ""  # one line; empty where the status is ok


ok, warning, fault = (partial(Finding, status) for status in STATUSES)


class Fact(msgspec.Struct, frozen=True):
    """A finding with the name of its check, as `doctor --json` and report.json hold it."""

    name: str
    status: Status
    found: str
    remedy: str = ""


Check = Callable[[], Finding]  # its function name is the name of the fact


def gather(checks: Sequence[Check], limit_s: float) -> list[Fact]:
    """Run all checks at once, each in its own thread, for at most `limit_s` seconds. Never raises.

    A check that raises, or gives no answer in time, is a warning that says so. Its thread does not keep the process
    alive.
    """
    found: dict[str, Fact] = {}
    deadline = time.monotonic() + limit_s
    threads = []
    for check in checks:
        thread = threading.Thread(target=lambda check=check: found.setdefault(check.__name__, run(check)), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the limit of threads is reached
            continue
        threads.append(thread)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    names = [check.__name__ for check in checks]
    return [found.get(name) or Fact(name, "warning", f"not known: no answer within {limit_s:g} s") for name in names]


def run(check: Check) -> Fact:
    """Run one check in this thread. An exception is a warning that says so."""
    try:
        return Fact(check.__name__, *check())
    except Exception as error:
        return Fact(check.__name__, "warning", f"not known: {type(error).__name__}: {error}")


def worst(facts: Sequence[Fact]) -> Status:
    """The worst status; ok where there are no facts."""
    return max((fact.status for fact in facts), key=STATUSES.index, default="ok")
