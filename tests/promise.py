"""What a test reports of the promise that it keeps, for the table of scripts/faults.py."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

import pytest

BUSY = (
    4  # a test accepts this many times the limit: other tests run beside it. scripts/faults.py holds the limit itself
)


@dataclass
class Seen:
    """What one call of `kept` reports. Times are in seconds."""

    text: str
    took_s: float | None
    limit_s: float | None
    exit_code: int | None


class Promise:
    """The promise that `@pytest.mark.promise(row, within=...)` names. `within` is the limit of docs/reliability.md.

    A limit such as "D+2 s" needs the seconds of its deadline: `@pytest.mark.promise(9, within="D+2 s", D=3)`. A parametrized
    test may have the mark for one of its cases.
    """

    def __init__(self, test: pytest.Item) -> None:
        self._test = test
        self._mark = test.get_closest_marker("promise")

    def kept(self, text: str, took_s: float | None = None, exit_code: int | None = None) -> None:
        """Report what was seen. `took_s`, from the fault to what is promised, must be within the limit."""
        if not self._mark:
            return
        limit_s = None
        if took_s is not None and self._mark.kwargs:
            limit_s = _seconds(**self._mark.kwargs)
            assert 0 <= took_s <= BUSY * limit_s, f"{text}: {took_s:.2f} s, promised within {limit_s:g} s"
        seen = Seen(text, took_s, limit_s, exit_code)
        self._test.user_properties.append(("promise", asdict(seen)))  # xdist sends it as plain values


def _seconds(within: str, **deadlines: float) -> float:
    """Of a limit such as "1 s" or "D+2 s"."""
    match = re.fullmatch(r"(?:(\w+)\+)?(\d+) s", within)
    assert match, f"within={within!r} is no limit in seconds"
    return float(match[2]) + (deadlines[match[1]] if match[1] else 0)


def of(report: pytest.TestReport) -> list[Seen]:
    """What a test has reported."""
    return [Seen(**value) for name, value in report.user_properties if name == "promise"]
