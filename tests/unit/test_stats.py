"""Who waits for whom, on a clock of the test's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch

from shmbridge.rank import stats
from shmbridge.rank.stats import Meter, Stats
from shmbridge.shm.ring import Composition
from tests.harness import Echo, bench


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stats, "time", clock)
    return clock


@pytest.fixture
def lines(caplog, monkeypatch) -> Callable[[], list[str]]:
    """The lines about steps so far."""
    monkeypatch.setattr(stats.log.logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="shmbridge")
    return lambda: [line for line in caplog.messages if "waiting for the teacher" in line]


def forward(teacher_s: float, tokens: int = 100) -> Composition:
    """100 positions, of which `tokens` are none of the padding."""
    return Composition(1, 0, 10, 10, tokens, round(teacher_s * 1e9))


def steps(meter: Meter, clock: Clock, count: int, step_s: float, waited_s: float, teacher_s: float, tokens: int = 100):
    """Steps with the numbers that follow."""
    first = meter.total().replies
    for step in range(first, first + count):
        clock.now += step_s
        if waited_s:
            meter.waited(waited_s)
        meter.replied(step, forward(teacher_s, tokens))


def test_a_rank_that_waits_is_told_by_how_much_the_teacher_takes_longer(clock):
    meter = Meter(0)
    steps(meter, clock, 5, step_s=0.5, waited_s=0.2, teacher_s=0.45)
    total = meter.total()
    assert (total.replies, total.steps) == (5, 4), "the last has not ended"
    assert (total.elapsed_s, total.waited_s, total.teacher_s) == pytest.approx((2.5, 1.0, 2.25))
    assert (total.step_s, total.wait_share) == pytest.approx((0.5, 0.4))
    assert total.verdict == "the teacher takes longer, by 200 ms of a step of 500 ms"
    assert str(total) == f"40% of a step waiting for the teacher; {total.verdict}"


@pytest.mark.parametrize(
    ("waited_s", "teacher_s", "verdict"),
    [
        (0.06, 0.9, "the teacher takes longer, by 60 ms of a step of 1000 ms"),
        (0.04, 0.9, "balanced: the teacher computes for 900 ms of a step of 1000 ms"),
        (0.0, 3.0, "balanced: the teacher computes for 1000 ms of a step of 1000 ms"),  # it answers several ranks
        (0.04, 0.4, "the student takes longer, by 600 ms of a step of 1000 ms"),
    ],
)
def test_between_them_there_is_a_balance_that_small_changes_do_not_leave(clock, waited_s, teacher_s, verdict):
    meter = Meter(0)
    steps(meter, clock, 5, step_s=1.0, waited_s=waited_s, teacher_s=teacher_s)
    assert meter.total().verdict == verdict


def test_one_slow_step_changes_no_verdict(clock):
    """A loader that starts, which comes before the first reply, and a checkpoint."""
    meter = Meter(0)
    clock.now += 30
    steps(meter, clock, 5, step_s=0.2, waited_s=0.0, teacher_s=0.15)
    steps(meter, clock, 1, step_s=9.0, waited_s=5.0, teacher_s=0.15)
    steps(meter, clock, 5, step_s=0.2, waited_s=0.0, teacher_s=0.15)
    assert meter.total().step_s == pytest.approx(0.2)
    assert meter.total().verdict.startswith("balanced")


def test_micro_batches_of_a_step_are_one_step(clock, lines):
    meter = Meter(8)
    for step in range(4):
        for _ in range(4):
            clock.now += 0.1
            meter.replied(step, forward(0.05))
    total = meter.total()
    assert (total.replies, total.steps, total.unit) == (16, 3, "step")
    assert (total.step_s, total.step_teacher_s) == pytest.approx((0.4, 0.2))
    assert "of a step of 400 ms" in lines()[0]
    meter.replied(None, forward(0.05))  # an evaluation gives none
    assert meter.total().steps == 3


def test_without_a_step_of_the_loop_each_reply_is_called_a_reply(clock):
    meter = Meter(0)
    for _ in range(4):
        clock.now += 0.1
        meter.replied(None, forward(0.09))
    assert meter.total().verdict == "balanced: the teacher computes for 90 ms of a reply of 100 ms"


@pytest.mark.parametrize(
    ("step_s", "waited_s", "teacher_s", "advice"),
    [
        (0.5, 0.2, 0.2, "read ahead .*: the step could take as little as 300 ms"),  # one after the other
        (0.5, 0.2, 0.49, "the teacher is the limit: give it more GPUs .*"),
        (0.5, 0.01, 0.49, ""),
        (0.5, 0.0, 0.1, ""),
    ],
)
def test_the_advice_is_what_would_shorten_the_step(clock, step_s, waited_s, teacher_s, advice):
    meter = Meter(0)
    steps(meter, clock, 3, step_s, waited_s, teacher_s)
    assert re.fullmatch(advice, meter.total().advice)


def test_padding_is_a_mean_over_replies_and_told_where_there_is_any(clock):
    meter = Meter(3)
    steps(meter, clock, 2, step_s=1.0, waited_s=0.0, teacher_s=0.5, tokens=60)
    assert meter.total().padding == pytest.approx(0.4)
    steps(meter, clock, 2, step_s=1.0, waited_s=0.0, teacher_s=0.5, tokens=100)
    assert meter.total().padding == pytest.approx(0.2)
    assert str(meter.total()).endswith("; 20% of the teacher's tokens were padding")
    assert "padding" not in str(Stats(1, 1.0, 0.0, 0.5, 0.004))


def test_before_the_first_reply_there_is_no_verdict(clock):
    meter = Meter(2)
    clock.now += 5
    meter.waited(1.0)
    assert meter.total() == Stats(0, 5.0, 1.0, 0.0, 0.0)
    assert meter.total().verdict == "no reply yet"
    assert Stats().step_s == Stats().wait_share == 0
    meter.replied(0, forward(0.1))
    assert meter.total().verdict == "no step has been measured yet"


def test_one_line_for_each_window_which_knows_nothing_of_those_before(clock, lines):
    meter = Meter(3)
    steps(meter, clock, 5, step_s=1.0, waited_s=0.5, teacher_s=0.9)
    (line,) = lines()
    assert line.startswith(
        "step 2: 50% of a step waiting for the teacher; the teacher takes longer, by 500 ms of a step"
    )
    assert "; the teacher is the limit: " in line
    steps(meter, clock, 1, step_s=1.0, waited_s=0.5, teacher_s=0.9)
    assert len(lines()) == 2
    assert "the limit" not in lines()[1], "the same advice is given once"
    steps(meter, clock, 3, step_s=2.0, waited_s=0.0, teacher_s=0.5)
    assert lines()[2] == (
        "step 8: 0% of a step waiting for the teacher; the student takes longer, by 1500 ms of a step of 2000 ms"
    )
    total = meter.total()
    assert (total.replies, total.elapsed_s, total.waited_s) == (9, pytest.approx(12.0), pytest.approx(3.0))


def test_a_reset_forgets(clock, lines):
    meter = Meter(3)
    steps(meter, clock, 2, step_s=1.0, waited_s=0.5, teacher_s=0.9)
    meter.reset()
    assert meter.total() == Stats()
    steps(meter, clock, 2, step_s=4.0, waited_s=0.0, teacher_s=1.0)
    assert lines() == [], "a window begins at the reset too"
    assert meter.total()[:4] == (2, 8.0, 0.0, 2.0)
    steps(meter, clock, 1, step_s=4.0, waited_s=0.0, teacher_s=1.0)
    assert lines()[0].endswith("by 3000 ms of a step of 4000 ms")


def test_rank_0_alone_tells_every_so_many_replies_and_wait_ready_begins_the_count(lines):
    """In real processes: what was asked before wait_ready (the parity check's probe) is not counted."""
    sent = torch.ones(1, 4, dtype=torch.int64)
    with bench(2, "log.stats_every=2", "parity=true", "teacher.linger_ms=0") as it:
        it.teacher(Echo())
        for lane, expected in ((0, 2), (1, 0)):
            bridge = it.bridge(lane)
            bridge.wait_ready()
            assert bridge.stats().replies == 0
            before = len(lines())
            for step in range(5):
                bridge.exchange(sent, step=step)
            assert len(lines()) - before == expected
            assert bridge.stats().replies == 5
            bridge.close()
