"""Numbers as the launcher prints them."""

from __future__ import annotations

import pytest

from launcher.console.text import ranges, seconds, size


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1.0 KiB"), (98304, "96.0 KiB"), (3 * 2**30, "3.0 GiB")]
)
def test_sizes(nbytes, text):
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")]
)
def test_durations(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2], "0-2"), ([0, 1, 5, 6, 3], "0-1,5-6,3"), ([2, 1], "2,1"), ([], "")]
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text
