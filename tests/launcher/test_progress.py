"""What the terminal tells of teachers until they are ready."""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from launcher.console import progress
from launcher.console.progress import Progress
from launcher.console.terminal import Console
from shmbridge.shm.participant_record import Phase

GENERATION = 1  # that a teacher is ready for


class Terminal:
    """Records as teachers would write them, a clock that the test moves, and the lines that come of it."""

    def __init__(self, count: int) -> None:
        self.now = 100.0
        self.records = [
            SimpleNamespace(identity=None, phase=Phase.ABSENT, progressed=(0, 0), ready=0) for _ in range(count)
        ]
        self._stream = io.StringIO()
        self._progress = Progress(Console(self._stream), self.records)  # type: ignore[arg-type]
        self._seen = 0

    def set(self, replica: int, phase: Phase, progressed: tuple[int, int] = (0, 0), ready: int = 0) -> None:
        record = self.records[replica]
        record.identity, record.phase, record.progressed, record.ready = "somebody", phase, progressed, ready

    def after(self, duration: float) -> list[str]:
        """New lines, `duration` seconds later."""
        self.now += duration
        self._progress.show()
        lines = self._stream.getvalue().splitlines()
        new, self._seen = lines[self._seen :], len(lines)
        return [line.removeprefix("[launcher] ") for line in new]

    @property
    def ready(self) -> bool:
        return self._progress.ready


@pytest.fixture
def one(monkeypatch) -> Iterator[Terminal]:
    yield from terminal(monkeypatch, 1)


@pytest.fixture
def three(monkeypatch) -> Iterator[Terminal]:
    yield from terminal(monkeypatch, 3)


def terminal(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[Terminal]:
    made: list[Terminal] = []
    monkeypatch.setattr(progress.time, "monotonic", lambda: made[0].now if made else 100.0)
    made.append(Terminal(count))
    yield made[0]


def test_one_teacher_tells_each_phase_at_once_and_its_progress_every_two_seconds(one):
    assert one.after(1) == []
    one.set(0, Phase.LOADING, (1, 4))
    assert one.after(0) == ["teacher loads the model: 25 %, 1.0 s"]
    one.set(0, Phase.LOADING, (2, 4))
    assert one.after(1) == []
    assert one.after(1) == ["teacher loads the model: 50 %, 3.0 s"]
    one.set(0, Phase.PROBING)
    assert one.after(0) == ["teacher tries a first forward, 3.0 s"]
    one.set(0, Phase.OFFERED)
    assert one.after(9) == []
    one.set(0, Phase.COLLECTING, ready=GENERATION)
    assert one.after(1) == ["teacher ready in 13.0 s"]
    assert one.ready


def test_several_share_a_line_which_comes_every_two_seconds(three):
    three.set(0, Phase.STARTING)
    assert three.after(1) == ["teacher 0 starts, 1.0 s"]
    three.set(0, Phase.LOADING, (3, 10))
    three.set(1, Phase.LOADING, (5, 10))
    three.set(2, Phase.STARTING)
    assert three.after(1) == []
    assert three.after(1) == ["teacher 2 starts; teachers 0 and 1 load the model: 30 % and 50 %, 3.0 s"]
    three.set(0, Phase.OFFERED)
    three.set(1, Phase.OFFERED)
    three.set(2, Phase.LOADING)
    assert three.after(2) == ["teacher 2 loads the model; teachers 0 and 1 wait for the others, 5.0 s"]


def test_every_replica_is_told_once_it_is_ready(three):
    for replica in range(3):
        three.set(replica, Phase.OFFERED)
    assert three.after(5) == [], "none loads any more"
    three.set(1, Phase.COLLECTING, ready=GENERATION)
    assert three.after(1) == ["teacher 1 ready in 6.0 s"]
    assert not three.ready
    three.set(0, Phase.COLLECTING, ready=GENERATION)
    three.set(2, Phase.COLLECTING, ready=GENERATION)
    assert three.after(1) == ["teachers 0 and 2 ready in 7.0 s"]
    assert three.ready
    assert three.after(9) == []


def test_a_teacher_that_is_in_the_next_generation_already_is_ready(one):
    """A group that waited has begun it at once: `teacher start` did not return until that group had ended."""
    one.set(0, Phase.COLLECTING, ready=GENERATION + 1)
    one.after(0.1)
    assert one.ready


def test_the_parts_of_a_load_are_numbered_where_each_counts_from_zero(one):
    """As transformers loads files, then weights: a percentage alone would go backwards."""
    shown = []
    for progressed in ((0, 0), (4, 4), (39, 390), (390, 390), (1, 390)):
        one.set(0, Phase.LOADING, progressed)
        shown += one.after(2)
    assert [line.partition("model")[2].rpartition(",")[0] for line in shown] == [
        "",
        ": 100 %",
        ": 10 % of part 2",
        ": 100 % of part 2",
        ": 0 % of part 3",
    ]
