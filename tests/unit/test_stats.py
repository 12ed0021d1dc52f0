"""Who waits for whom, on a clock of the test's own."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from shmbridge import stats
from shmbridge.ring import Composition
from shmbridge.stats import Meter, Stats
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
    monkeypatch.setattr(stats.trace.logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="shmbridge")
    return lambda: [line for line in caplog.messages if "of the step waiting" in line]


def forward(teacher_s: float, tokens: int = 100) -> Composition:
    """100 positions, of which `tokens` are none of the padding."""
    return Composition(1, 0, 10, 10, tokens, round(teacher_s * 1e9))


def steps(meter: Meter, clock: Clock, count: int, step_s: float, waited_s: float, teacher_s: float, tokens: int = 100):
    for step in range(count):
        clock.now += step_s
        if waited_s:
            meter.waited(waited_s)
        meter.replied(step, forward(teacher_s, tokens))


def test_a_rank_that_sleeps_for_the_teacher_tells_by_how_much_it_is_the_longer(clock):
    meter = Meter(0)
    steps(meter, clock, 4, step_s=0.5, waited_s=0.2, teacher_s=0.45)
    total = meter.total()
    assert total.replies == 4
    assert (total.elapsed_s, total.waited_s, total.teacher_s) == pytest.approx((2.0, 0.8, 1.8))
    assert (total.step_s, total.wait_share) == pytest.approx((0.5, 0.4))
    assert total.verdict == "the teacher is the longer, by 200 ms a step of 500 ms"
    assert str(total) == f"40% of the step waiting for the teacher: {total.verdict}"


def test_a_rank_that_hardly_sleeps_tells_what_the_teacher_has_to_spare(clock):
    meter = Meter(0)
    steps(meter, clock, 4, step_s=20.0, waited_s=0.001, teacher_s=5.0)
    assert str(meter.total()) == (
        "0% of the step waiting for the teacher: the student is the longer, by 15.0 s a step of 20.0 s"
    )


def test_a_teacher_longer_than_the_step_has_nothing_to_spare(clock):
    """Its forward answers several ranks, or was long before the first reply."""
    meter = Meter(0)
    steps(meter, clock, 1, step_s=1.0, waited_s=0.0, teacher_s=3.0)
    assert meter.total().verdict == "the student is the longer, by 0 ms a step of 1000 ms"


@pytest.mark.parametrize(("share", "longer"), [(0.019, "student"), (0.021, "teacher")])
def test_the_verdict_turns_where_waiting_is_noticeable(clock, share, longer):
    meter = Meter(0)
    steps(meter, clock, 10, step_s=1.0, waited_s=share, teacher_s=0.5)
    assert meter.total().verdict.startswith(f"the {longer} is the longer")


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


def test_one_line_for_each_window_which_knows_nothing_of_those_before(clock, lines):
    meter = Meter(3)
    steps(meter, clock, 5, step_s=1.0, waited_s=0.5, teacher_s=0.9)
    assert lines() == [
        "step 2: 50% of the step waiting for the teacher: the teacher is the longer, by 500 ms a step of 1000 ms"
    ]
    steps(meter, clock, 1, step_s=1.0, waited_s=0.5, teacher_s=0.9)
    assert len(lines()) == 2
    steps(meter, clock, 3, step_s=2.0, waited_s=0.0, teacher_s=0.5)
    assert lines()[2] == (
        "step 2: 0% of the step waiting for the teacher: the student is the longer, by 1500 ms a step of 2000 ms"
    )
    total = meter.total()
    assert (total.replies, total.elapsed_s, total.waited_s) == (9, pytest.approx(12.0), pytest.approx(3.0))
    meter.replied(None, forward(0.5))
    meter.replied(None, forward(0.5))
    meter.replied(None, forward(0.5))
    assert lines()[3].startswith("reply 12: ")


def test_a_reset_forgets(clock, lines):
    meter = Meter(3)
    steps(meter, clock, 2, step_s=1.0, waited_s=0.5, teacher_s=0.9)
    meter.reset()
    assert meter.total() == Stats()
    steps(meter, clock, 2, step_s=4.0, waited_s=0.0, teacher_s=1.0)
    assert lines() == [], "a window begins at the reset too"
    assert meter.total() == Stats(2, 8.0, 0.0, 2.0, 0.0)
    steps(meter, clock, 1, step_s=4.0, waited_s=0.0, teacher_s=1.0)
    assert lines()[0].endswith("by 3000 ms a step of 4000 ms")


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
