"""The ring and the doorbells under every interleaving, every crash, and stray rings; and that a broken ring is found."""

from __future__ import annotations

import re

import pytest

from tests.protocol import mutants
from tests.protocol.model import explore
from tests.protocol.world import Case

WHOLE = [
    Case(depth=1, requests=2),
    Case(depth=1, requests=3, strays=1),
    Case(depth=2, requests=4),
    Case(depth=2, requests=3, ahead=True, strays=1),
    Case(depth=2, requests=3, abandon=1, strays=1),
    Case(depth=1, requests=2, abandon=0, strays=2),
]
STREAMED = [
    Case(depth=1, requests=2, chunks=1),
    Case(depth=2, requests=2, chunks=1, parts=3),
    Case(depth=2, requests=2, chunks=2),
    Case(depth=2, requests=3, chunks=2, parts=1),
    Case(depth=2, requests=2, chunks=1, abandon=0),
    Case(depth=2, requests=2, chunks=2, abandon=0),
    Case(depth=1, requests=2, chunks=1, strays=1),
]
CRASHES = [
    Case(depth=1, requests=2, crashes=True, generations=2),
    Case(depth=2, requests=2, crashes=True, generations=2),
    Case(depth=2, requests=3, crashes=True, abandon=1),
    Case(depth=1, requests=2, chunks=2, crashes=True),
    Case(depth=2, requests=2, chunks=1, abandon=0, crashes=True),
    Case(depth=1, requests=2, chunks=1, parts=1, crashes=True, generations=2),
]
# With two teachers. One of them may die in the cases with crashes.
HANDED_OVER = [
    Case(handovers=1),
    pytest.param(Case(requests=1, handovers=1, crashes=True), marks=pytest.mark.slow),
    pytest.param(Case(handovers=2), marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    pytest.param(Case(handovers=1, crashes=True), marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
]


def name(case: Case) -> str:
    return ",".join(f"{key}={value}" for key, value in case._asdict().items() if value != Case._field_defaults[key])


@pytest.mark.parametrize("case", WHOLE + STREAMED + CRASHES + HANDED_OVER, ids=name)
def test_every_interleaving_ends_and_gives_each_reply_to_its_request(case):
    found = explore(case)
    assert not found.violations, found.violations
    assert found.states > 1000 and found.ends, "the exploration itself is broken"


@pytest.mark.parametrize(
    ("mutant", "case", "what"),
    [
        (
            None,
            Case(recheck=False, strays=1),
            "refused",
        ),  # a ring may be left over from an earlier wait, or come from nowhere
        (None, Case(chunks=1, abandon=0, rings_for_skipped=False), "lost wake-up"),
        ("publish_before_write_request", Case(), "request slot .* refused"),
        ("publish_before_write_reply", Case(), "reply slot .* refused"),
        ("publish_before_write_reply", Case(abandon=0, requests=3), "refused|cursors out of order"),
        ("publish_before_write_chunk", Case(chunks=2), "chunk .* refused"),
        ("release_before_read", Case(requests=3, ahead=True), "half . of 0"),
        pytest.param(
            "hand_over_what_is_not_published",
            Case(handovers=1),
            "cursor fell|cursors out of order|half . of",
            marks=[pytest.mark.slow, pytest.mark.timeout(600)],
        ),
    ],
)
def test_a_protocol_that_is_broken_on_purpose_is_found(mutant, case, what, monkeypatch):
    if mutant:
        mutants.MUTANTS[mutant](monkeypatch.setattr)
    (violation,) = explore(case).violations
    assert re.search(what, violation)
