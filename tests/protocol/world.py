"""What the exhaustive model is made of: one state of a lane, the words that stop whoever uses them, and programs line by line.

model.py walks the states, programs.py says what each side does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from shmbridge.shm.layout import CHUNK_HEAD, REPLY_HEAD, REQUEST, REQUEST_DATA, WORD, LaneLayout, LaneWord
from shmbridge.shm.ring import Ring
from shmbridge.shm.session import Lane

NAMES = ("requested", "closed", "replied", "streamed", "released", "consumed", "abandoned", "teacher", "wanted")
CURSORS = tuple(getattr(LaneWord, name.upper()) for name in NAMES)
CONSUMED = CURSORS.index(LaneWord.CONSUMED)
SERVES, WANTED = len(CURSORS) - 2, len(CURSORS) - 1  # places in CURSORS; the words before these two never fall
RANK, TEACHER, SECOND, OWNER = range(4)  # a case without handovers has the first two alone
OF_TEACHER = frozenset({LaneWord.REPLIED, LaneWord.STREAMED})
OF_OWNER = frozenset({LaneWord.WANTED})
OF_RANK = frozenset(CURSORS[:SERVES]) - OF_TEACHER
DONE, LOST, DEAD = -1, -2, -3  # in place of a program counter
# A doorbell that has rung so often is as good as one that has rung more often. Where a lane is handed over, it is 1: a side is
# then woken less often than in truth, which finds no fewer lost wake-ups.
MAX_RINGS = 3
AWAY = 100  # added to `local` by a teacher that does not serve the lane


class Side(NamedTuple):
    """Where a side is: in which line of its program, with which number in its hands, after which accesses."""

    pc: int = 0
    local: int = 0
    log: tuple[Any, ...] = ()  # what the current line has read so far; None for what it wrote
    base: int | None = None  # consumed, when that line began
    kept: tuple[int, int] = (0, 0)  # what a teacher's ring keeps to itself: sealed, filled


class State(NamedTuple):
    sides: tuple[Side, ...]
    cursors: tuple[int, ...]
    heads: bytes
    payload: tuple[int, ...]  # two words a reply slot
    bells: tuple[int, ...]  # of the rank and the teachers
    ready: int  # the generation that the teacher serves
    generation: int
    strays: int  # rings that nobody has asked for, still to come
    over: bool = False  # the owner has announced that training has ended


class Stopped(Exception):
    """What follows an access to a word is another step."""


class Words:
    """The cursors; whoever makes an access that is not in the log is stopped behind it, unless it reads a word that nobody
    else writes."""

    def __init__(self) -> None:
        self.cursors = [0] * len(CURSORS)
        self.log: list[Any] | None = None  # None: nobody is stopped
        self._place = {word: i for i, word in enumerate(CURSORS)}
        self._at = 0

    def begin(self, log: tuple[Any, ...], own: frozenset[int]) -> None:
        self.log = list(log)
        self._own = own
        self._at = 0

    def once(self, access: Callable[[], Any], stop: bool) -> Any:
        """What `access` gives; what it gave, where this line has made it before."""
        if self.log is None:
            return access()
        if self._at == len(self.log):
            self.log.append(access())
            if stop:
                raise Stopped
        self._at += 1
        return self.log[self._at - 1]

    def __getitem__(self, index: int) -> int:
        place = self._place[index]
        found: int = self.once(lambda: self.cursors[place], stop=self.log is not None and index not in self._own)
        return found

    def __setitem__(self, index: int, value: int) -> None:
        self.once(lambda: self.cursors.__setitem__(self._place[index], value), stop=True)


class Descriptor:
    """A struct of the layout, whose reads and writes stand in the log too."""

    def __init__(self, of: struct.Struct, words: Words) -> None:
        self._of, self._words = of, words

    def unpack_from(self, memory: memoryview, offset: int) -> tuple[int, ...]:
        found: tuple[int, ...] = self._words.once(lambda: self._of.unpack_from(memory, offset), stop=False)
        return found

    def pack_into(self, memory: memoryview, offset: int, *values: int) -> None:
        self._words.once(lambda: self._of.pack_into(memory, offset, *values), stop=False)


class World:
    """One state, unpacked, so that a line of a program can run on it."""

    def __init__(self, case: Case) -> None:
        layout = LaneLayout(case.depth, max_tokens=1, chunks=case.chunks)
        self.memory = memoryview(bytearray(layout.nbytes))
        self.words = Words()
        self.most_rings = MAX_RINGS if case.handovers is None else 1
        self.slots = case.chunks or case.depth
        spans = [(layout.request(i), REQUEST.size) for i in range(case.depth)]
        spans += [(layout.request(i) + REQUEST_DATA, WORD) for i in range(case.depth)]
        spans += [(layout.reply_head(i), REPLY_HEAD.size) for i in range(case.depth)]
        spans += [(layout.chunk_head(i), CHUNK_HEAD.size) for i in range(case.chunks)]
        self._views = [self.memory[at : at + nbytes] for at, nbytes in spans]
        self._ends = [sum(nbytes for _, nbytes in spans[:i]) for i in range(len(spans) + 1)]
        self._loaded = b""
        segment: Any = SimpleNamespace(bytes=self.memory, words=self.words)
        self.lane = Lane(segment, layout, 0, 1)
        self.ring = self.lane.ring

    def load(self, state: State, which: int) -> None:
        """Unpack a state for a side that goes on."""
        side = state.sides[which]
        self.words.log = None
        self.words.cursors = list(state.cursors)
        self.base = state.cursors[CONSUMED] if side.base is None else side.base
        self.ring.generation = state.generation
        self.ring._sealed, self.ring.filled = side.kept
        self.words.begin(side.log, _own(which, side))
        if self._loaded is not state.heads:
            for i, view in enumerate(self._views):
                view[:] = state.heads[self._ends[i] : self._ends[i + 1]]
        self.payload = list(state.payload)
        self.bells = state.bells
        self.ready, self.over = state.ready, state.over
        self.sides = state.sides
        self.generation = state.generation
        self._heads = state.heads

    def heads(self) -> bytes:
        now = b"".join(self._views)
        self._loaded = self._heads if now == self._heads else now
        return self._loaded

    def rung(self, bells: tuple[int, ...], bell: int) -> tuple[int, ...]:
        """The doorbells, after one more ring of `bell`."""
        return replaced(bells, bell, min(self.most_rings, bells[bell] + 1))

    def ring_bell(self, bell: int) -> None:
        self.bells = self.rung(self.bells, bell)

    def cursor(self, word: int) -> int:
        """A look that is no step: the side's own cursor, or one that it has just read."""
        return self.words.cursors[CURSORS.index(word)]


def _own(which: int, side: Side) -> frozenset[int]:
    """The words that nobody else writes meanwhile."""
    if which in (TEACHER, SECOND):
        return OF_TEACHER if side.local < AWAY else frozenset()
    return OF_RANK if which == RANK else OF_OWNER


Body = Callable[[World, Ring, int], Any]
Due = Callable[[State, int], bool]


class Line(NamedTuple):
    """One line of a program. `do` gives a label to go to, a new number for `local`, or None."""

    # call, ring, drain, sleep; until: a call that is made once it has something to give; or local: of no interest to the other
    # sides, and no step
    kind: str
    do: Body | None = None
    target: str = ""
    bell: int = 0
    due: Due | None = None


class Program:
    """Lines and labels."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.labels: dict[str, int] = {}
        self._fresh = 0

    def label(self, name: str) -> None:
        self.labels[name] = len(self.lines)

    def call(self, do: Body) -> None:
        self.lines.append(Line("call", do))

    def ring(self, bell: int) -> None:
        self.lines.append(Line("ring", bell=bell))

    def until(self, due: Due, do: Body) -> None:
        self.lines.append(Line("until", do, due=due))

    def goto(self, target: str) -> None:
        self.local(lambda local: target)

    def local(self, do: Callable[[int], str | int | None]) -> None:
        """Where the program goes on, or what it counts."""
        self.lines.append(Line("local", lambda world, ring, local: do(local)))

    def wait(self, ready: Body, recheck: bool = True, due: Due | None = None, check: Body | None = None) -> None:
        """Doorbell.wait: look; sleep until rung; look again. What became ready before the peer was lost is still given.

        Without `due` a slice's end finds that the other side is dead, and nothing else. With it, it finds what `due` tells,
        and does `check`.
        """
        self._fresh += 1
        end, sleep, drain = (f"{name} {self._fresh}" for name in ("end", "sleep", "drain"))

        def to(target: str, other: str) -> Body:
            def look(world: World, ring: Ring, local: int) -> str:
                return target if ready(world, ring, local) else other

            return look

        self.call(to(drain, sleep))
        self.label(sleep)
        self.lines.append(Line("sleep", target=f"lost {self._fresh}", due=due))
        if recheck:
            self.call(to(end, sleep))
        else:
            self.goto(end)
        self.label(f"lost {self._fresh}")
        if check:
            self.call(check)
        self.call(to(end, sleep if due else "LOST"))
        self.label(drain)
        self.lines.append(Line("drain"))
        self.label(end)


class Case(NamedTuple):
    """What is explored."""

    depth: int = 2
    requests: int = 2
    chunks: int = 0
    parts: int = 2  # chunks of a streamed reply
    abandon: int | None = None  # the sequence that the rank does not read to its end
    ahead: bool = False  # the rank tries to submit while it holds a reply
    crashes: bool = False
    generations: int = 1
    strays: int = 0
    recheck: bool = True  # False: a mutant that trusts its doorbell
    rings_for_skipped: bool = True  # False: a mutant that gives an abandoned reply's chunks back without a word
    handovers: int | None = None  # how often the owner asks for the lane to change hands; None: there is one teacher


def mark(generation: int, sequence: int, part: int = 0) -> int:
    """The payload word of one reply or chunk."""
    return 10000 * generation + 100 * sequence + part + 1


def replaced(items: tuple[Any, ...], place: int, item: Any) -> tuple[Any, ...]:
    return (*items[:place], item, *items[place + 1 :])
