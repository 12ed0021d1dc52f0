"""Ranks seen from outside: a process is its pid and its start time."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from launcher.supervisor.ranks import Ranks
from shmbridge import config
from shmbridge.shm.layout import RecordWord
from shmbridge.shm.owner import Owner


@pytest.fixture
def ranks(request) -> Iterator[Ranks]:
    """Of one rank, which is this process. A parameter: one more setting."""
    settings = ["ring.max_tokens=64", *([request.param] if hasattr(request, "param") else [])]
    with Owner(config.load(overrides=settings), lanes=1) as owner:
        owner.start_generation()
        owner.lanes[0].records[0].sign_in()
        yield Ranks(owner.lanes, 1, owner.settings.teacher.serve_until == "closed")


@pytest.fixture
def taken() -> Iterator[list[int]]:
    """SIGUSR1s that this process got."""
    found: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: found.append(number))
    yield found
    signal.signal(signal.SIGUSR1, before)


def make_stranger(ranks: Ranks) -> None:
    """Let the pid on the board be used again: a rank with this pid had started at another time."""
    ranks._lanes[0].records[0].words[RecordWord.START] -= 1


def test_a_signal_is_forwarded_to_the_rank_itself(ranks, taken):
    assert ranks.forward(signal.SIGUSR1, None) == "SIGUSR1 was sent to rank 0"
    assert taken == [signal.SIGUSR1]


def test_a_signal_is_not_sent_to_a_stranger_with_the_ranks_pid(ranks, taken):
    make_stranger(ranks)
    assert ranks.forward(signal.SIGUSR1, None) == "SIGUSR1 was sent to no rank: none has a handler for it"
    assert taken == []


def test_a_rank_is_watched_until_it_ends(ranks):
    ranks.update()
    assert len(ranks.watch()) == 1
    assert ranks.ended_ns == {}


def test_a_stranger_is_not_watched_and_the_rank_counts_as_ended(ranks):
    make_stranger(ranks)
    ranks.update()
    assert ranks.watch() == []
    assert set(ranks.ended_ns) == {0}


@pytest.mark.parametrize(
    ("ranks", "finished"),
    [("teacher.serve_until=closed", True), ("teacher.serve_until=exited", False)],
    indirect=["ranks"],
)
def test_a_rank_that_has_closed_may_still_need_its_teacher(ranks, finished):
    """It may connect again, as long as it lives: a teacher that dies meanwhile has died."""
    assert not ranks.finished([0])
    ranks._lanes[0].ring.closed = True
    assert ranks.finished([0]) is finished
    make_stranger(ranks)
    assert ranks.finished([0])
