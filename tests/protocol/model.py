"""Every interleaving of a rank and a teacher, over the functions of the real ring.

A state is what lies in shared memory (cursors, heads, payload), how often each doorbell has rung, and where each side is in
its program. A step runs one side up to its next access to a cursor: Ring's methods are executed as they are, over words
that stop them. To go on in the middle of a method it is run again from its begin, and the accesses made so far are
answered from a log. Either side may be killed before any step; then the survivor must end, and a new generation begins in
the same dirty memory with cleared cursors, which is worse than the fresh memory that it has in truth.

`explore` walks all states and returns what is wrong with any of them:

    - a method of the ring, or a check of the bytes, raised: a reply of another sequence or generation, half a reply
    - deadlock: no step is possible, or none that leads to an end (the model has no slices: a lost wake-up is never healed)
    - an end at which a request is neither answered nor failed
    - cursors out of order
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from shmbridge.errors import RingFull, ShmbridgeError
from shmbridge.output_spec import Extent
from shmbridge.shm import ring as ring_module
from shmbridge.shm.layout import CHUNK_HEAD, REPLY_HEAD, REQUEST, REQUEST_DATA, WORD, LaneLayout, LaneWord
from shmbridge.shm.ring import Composition, Ring
from tests.protocol.actors import Broken, require

CURSORS = (
    LaneWord.REQUESTED,
    LaneWord.CLOSED,
    LaneWord.REPLIED,
    LaneWord.STREAMED,
    LaneWord.RELEASED,
    LaneWord.CONSUMED,
    LaneWord.ABANDONED,
)
RANK, TEACHER = 0, 1
OF_TEACHER = frozenset({LaneWord.REPLIED, LaneWord.STREAMED})
OWN = (frozenset(CURSORS) - OF_TEACHER, OF_TEACHER)
DONE, LOST, DEAD = -1, -2, -3  # in place of a program counter
MAX_RINGS = 3  # a doorbell that has rung so often is as good as one that has rung more often


class Side(NamedTuple):
    """Where a side is: in which line of its program, with which number in its hands, after which accesses."""

    pc: int = 0
    local: int = 0
    log: tuple[Any, ...] = ()  # what the current line has read so far; None for what it wrote
    base: tuple[int, ...] = ()  # replied, streamed and consumed when that line began


class State(NamedTuple):
    sides: tuple[Side, Side]
    cursors: tuple[int, ...]
    heads: bytes
    payload: tuple[int, ...]  # two words a reply slot
    bells: tuple[int, int]
    ready: int  # the generation that the teacher serves
    generation: int
    strays: int  # rings that nobody has asked for, still to come


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
        self.layout = layout
        self.slots = case.chunks or case.depth
        spans = [(layout.request(i), REQUEST.size) for i in range(case.depth)]
        spans += [(layout.request(i) + REQUEST_DATA, WORD) for i in range(case.depth)]
        spans += [(layout.reply_head(i), REPLY_HEAD.size) for i in range(case.depth)]
        spans += [(layout.chunk_head(i), CHUNK_HEAD.size) for i in range(case.chunks)]
        self._views = [self.memory[at : at + nbytes] for at, nbytes in spans]
        self._ends = [sum(nbytes for _, nbytes in spans[:i]) for i in range(len(spans) + 1)]
        self._loaded = b""
        self.ring = Ring(self.memory, self.words, layout, 1)

    def load(self, state: State, which: int) -> None:
        """Unpack a state for a side that goes on."""
        side = state.sides[which]
        self.words.log = None
        self.words.cursors = list(state.cursors)
        self.base = side.base or (state.cursors[2], state.cursors[3], state.cursors[5])
        self.replied, self.streamed, _ = self.base
        self.words.cursors[2:4] = self.base[:2]
        self.ring.generation = state.generation
        self.ring.take_over()
        self.words.cursors = list(state.cursors)
        self.words.begin(side.log, OWN[which])
        if self._loaded is not state.heads:
            for i, view in enumerate(self._views):
                view[:] = state.heads[self._ends[i] : self._ends[i + 1]]
        self.payload = list(state.payload)
        self.bells = state.bells
        self.ready = state.ready
        self.generation = state.generation
        self._heads = state.heads

    def heads(self) -> bytes:
        now = b"".join(self._views)
        self._loaded = self._heads if now == self._heads else now
        return self._loaded

    def cursor(self, word: int) -> int:
        """A look that is no step: the side's own cursor, or one that it has just read."""
        return self.words.cursors[CURSORS.index(word)]


Body = Callable[[World, Ring, int], Any]


class Line(NamedTuple):
    """One line of a program. `do` gives a label to go to, a new number for `local`, or None."""

    kind: str  # call, ring, drain, sleep; or local: of no interest to the other side, and no step
    do: Body | None = None
    target: str = ""
    bell: int = 0


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

    def goto(self, target: str) -> None:
        self.local(lambda local: target)

    def local(self, do: Callable[[int], str | int | None]) -> None:
        """Where the program goes on, or what it counts."""
        self.lines.append(Line("local", lambda world, ring, local: do(local)))

    def wait(self, ready: Body, recheck: bool = True) -> None:
        """Doorbell.wait: look; sleep until rung; look again. What became ready before the peer was lost is still given."""
        self._fresh += 1
        end, sleep, drain = (f"{name} {self._fresh}" for name in ("end", "sleep", "drain"))

        def to(target: str, other: str) -> Body:
            def look(world: World, ring: Ring, local: int) -> str:
                return target if ready(world, ring, local) else other

            return look

        self.call(to(drain, sleep))
        self.label(sleep)
        self.lines.append(Line("sleep", target=f"lost {self._fresh}"))
        if recheck:
            self.call(to(end, sleep))
        else:
            self.goto(end)
        self.label(f"lost {self._fresh}")
        self.call(to(end, "LOST"))
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


def mark(generation: int, sequence: int, part: int = 0) -> int:
    """The payload word of one reply or chunk."""
    return 10000 * generation + 100 * sequence + part + 1


# The rank


def rank_program(case: Case) -> Program:
    """Submit up to the depth, read in order, release; close."""
    program = Program()
    program.wait(lambda world, ring, local: world.ready == world.generation, case.recheck)
    submitted = 0
    for sequence in range(case.requests):
        while submitted < min(case.requests, sequence + case.depth):
            _submit(program, submitted)
            submitted += 1
        if sequence == case.abandon:
            _leave(program, case, sequence)
        elif case.chunks:
            for part in range(case.parts):
                _chunk(program, case, sequence, part)
            _whole(program, case, sequence, payload=False)
        else:
            more = submitted if case.ahead and submitted < case.requests else None
            _whole(program, case, sequence, payload=True, ahead=more)
        program.call(lambda world, ring, local, s=sequence: ring.release(s))
    program.call(lambda world, ring, local: ring.close_requests())
    program.ring(TEACHER)
    return program


def _submit(program: Program, sequence: int, full: str = "") -> None:
    """local is the next sequence that is not submitted."""
    skip = f"submitted {sequence} {len(program.lines)}"

    def claim(world: World, ring: Ring, local: int) -> str | None:
        if local > sequence:
            return skip
        try:
            require(ring.claim() == sequence, "another sequence was claimed")
        except RingFull:
            if full:
                return skip
            raise
        return None

    def write(world: World, ring: Ring, local: int) -> None:
        data = memoryview(mark(world.generation, sequence).to_bytes(WORD, "little"))
        ring.write_request(sequence, None, Extent(1, 1), data)

    program.call(claim)
    program.call(write)
    program.call(lambda world, ring, local: ring.publish_request(sequence))
    program.ring(TEACHER)
    program.local(lambda local: sequence + 1)
    program.label(skip)


def _whole(program: Program, case: Case, sequence: int, payload: bool, ahead: int | None = None) -> None:
    program.wait(lambda world, ring, local: ring.answered(sequence), case.recheck)

    def read(world: World, ring: Ring, local: int) -> None:
        head = ring.read_reply(sequence)
        require(head.echo == mark(world.generation, sequence), "the head of another request")

    program.call(read)
    if ahead is not None:
        _submit(program, ahead, full="is refused")
    if payload:
        for half in range(2):
            program.call(partial(_read_half, sequence=sequence, number=sequence, half=half))


def _read_half(world: World, ring: Ring, local: int, *, sequence: int, number: int, half: int, part: int = 0) -> None:
    found = world.payload[number % world.slots * 2 + half]
    require(found == mark(world.generation, sequence, part), f"half {half} of {sequence}.{part} is {found}")


def _chunk(program: Program, case: Case, sequence: int, part: int) -> None:
    """The next chunk of a reply, its two halves, and back; `number` of the chunk is the rank's own cursor."""

    def ready(world: World, ring: Ring, local: int) -> bool | None:
        before = world.base[2]
        found = ring.next_chunk(sequence) is not None or ring.answered(sequence)
        if ring.consumed != before and case.rings_for_skipped:  # chunks of an abandoned reply: there is room again
            world.bells = _rung(world.bells, TEACHER)
        return found

    def take(world: World, ring: Ring, local: int) -> None:
        chunk = ring.next_chunk(sequence)
        require(chunk is not None and chunk.start == part, f"{chunk} is not chunk {part} of {sequence}")

    def half(world: World, ring: Ring, local: int, which: int) -> None:
        number = world.cursor(LaneWord.CONSUMED)
        _read_half(world, ring, local, sequence=sequence, number=number, half=which, part=part)

    program.wait(ready, case.recheck)
    program.call(take)
    program.call(partial(half, which=0))
    program.call(partial(half, which=1))
    program.call(lambda world, ring, local: ring.consume(world.cursor(LaneWord.CONSUMED)))
    program.ring(TEACHER)


def _leave(program: Program, case: Case, sequence: int) -> None:
    """Abandon a reply, a streamed one after its first chunk, and wait until its slot may be given back."""
    if case.chunks:
        _chunk(program, case, sequence, 0)
    program.call(lambda world, ring, local: ring.abandon(sequence))
    program.ring(TEACHER)
    program.wait(lambda world, ring, local: ring.answered(sequence), case.recheck)


# The teacher


def teacher_program(case: Case) -> Program:
    """Open the barrier; answer the oldest request, whole or in chunks, until the rank has closed."""
    program = Program()
    program.call(_open_barrier)
    program.ring(RANK)
    program.label("collect")
    program.wait(lambda world, ring, local: ring.next_request() is not None or ring.closed, case.recheck)
    program.call(_take)
    program.label("answer")
    program.call(_read_request)
    program.call(_skip_if_unwanted)
    if case.chunks:
        _stream(program, case)
    else:
        for half in range(2):
            program.call(partial(_write_half, half=half))
    program.label("head")
    program.call(lambda world, ring, local: ring.write_reply(_current(world), _PLACE, None, _mark_of_current(world)))
    program.label("publish")
    program.call(lambda world, ring, local: ring.publish_reply(_current(world)))
    program.ring(RANK)
    program.local(lambda local: 0)
    program.goto("collect")
    return program


_PLACE = Composition(1, 0, 1, 1, 1, 0)


def _current(world: World) -> int:
    """The sequence in the teacher's hands: its own cursor, as it was before the line began."""
    return world.replied


def _mark_of_current(world: World, part: int = 0) -> int:
    return mark(world.generation, _current(world), part)


def _open_barrier(world: World, ring: Ring, local: int) -> None:
    world.ready = world.generation


def _take(world: World, ring: Ring, local: int) -> str | None:
    sequence = ring.next_request()
    if sequence is None:
        return "DONE" if ring.closed else "collect"
    require(sequence == _current(world), f"sequence {sequence} is not the oldest")
    return None


def _read_request(world: World, ring: Ring, local: int) -> None:
    request = ring.read_request(_current(world))
    require(int.from_bytes(request.ids, "little") == _mark_of_current(world), "the IDs of another request")


def _skip_if_unwanted(world: World, ring: Ring, local: int) -> str | None:
    if ring.abandoned > _current(world):
        ring.skip_reply(_current(world))
        return "publish"
    return None


def _write_half(world: World, ring: Ring, local: int, half: int) -> None:
    world.payload[_current(world) % world.slots * 2 + half] = _mark_of_current(world)


def _stream(program: Program, case: Case) -> None:
    """`local` counts the chunks that were sent."""

    def may_go_on(world: World, ring: Ring, local: int) -> bool:
        return ring.has_room() or ring.abandoned > _current(world) or ring.closed

    def room(world: World, ring: Ring, local: int) -> str | None:
        if ring.abandoned > _current(world) or ring.closed:
            return "head"
        return None if ring.has_room() else "next chunk"

    def half(world: World, ring: Ring, local: int, which: int) -> None:
        number = world.streamed
        world.payload[number % world.slots * 2 + which] = _mark_of_current(world, local)

    program.label("next chunk")
    program.local(lambda local: "head" if local == case.parts else None)
    program.wait(may_go_on, case.recheck)
    program.call(room)
    program.call(partial(half, which=0))
    program.call(partial(half, which=1))
    program.call(lambda world, ring, local: ring.write_chunk(_current(world), local, 1))
    program.call(lambda world, ring, local: ring.publish_chunk())
    program.ring(RANK)
    program.local(lambda local: local + 1)
    program.goto("next chunk")


# The exploration


class Found(NamedTuple):
    """What an exploration has seen."""

    states: int
    steps: int
    ends: int
    violations: list[str]


class Explorer:
    """All states of a case, breadth first."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.programs = (rank_program(case), teacher_program(case))
        self.world = World(case)
        self.violations: list[str] = []

    def first(self) -> State:
        world = self.world
        empty = b"".join(world._views)
        payload = (0,) * (2 * world.slots)
        start = (Side(), Side())
        return State(start, (0,) * len(CURSORS), empty, payload, (0, 0), 0, 1, self.case.strays)

    def explore(self, most_violations: int = 1) -> Found:
        first = self.first()
        numbers = {first: 0}
        before: list[list[int]] = [[]]  # steps that are no accident lead here from there
        ends: list[int] = []
        queue = deque([first])
        steps = 0
        while queue and len(self.violations) < most_violations:
            state = queue.popleft()
            number = numbers[state]
            if self._is_end(state):
                ends.append(number)
                self._check_end(state)
            willed = False
            for accident, after in self._successors(state):
                steps += 1
                willed |= not accident
                found = numbers.setdefault(after, len(numbers))
                if found == len(before):
                    before.append([])
                    queue.append(after)
                if not accident:
                    before[found].append(number)
            if not willed and not self._is_end(state) and not self.violations:
                self._complain(state, "deadlock: a lost wake-up")
        if not self.violations:
            self._check_all_end(before, ends)
        return Found(len(numbers), steps, len(ends), self.violations)

    def _check_all_end(self, before: list[list[int]], ends: list[int]) -> None:
        reached = set(ends)
        stack = list(ends)
        while stack:
            for number in before[stack.pop()]:
                if number not in reached:
                    reached.add(number)
                    stack.append(number)
        if len(reached) < len(before):
            self.violations.append(f"{len(before) - len(reached)} states lead to no end")

    def _complain(self, state: State, what: str) -> None:
        names = dict(
            zip(
                ("requested", "closed", "replied", "streamed", "released", "consumed", "abandoned"),
                state.cursors,
                strict=True,
            )
        )
        self.violations.append(f"{what}; {state.sides}, bells {state.bells}, generation {state.generation}, {names}")

    def _is_end(self, state: State) -> bool:
        over = all(side.pc < 0 for side in state.sides)
        return over and not self._may_begin_again(state)

    def _may_begin_again(self, state: State) -> bool:
        crashed = any(side.pc == DEAD for side in state.sides)
        return crashed and state.generation < self.case.generations

    def _check_end(self, state: State) -> None:
        rank, teacher = state.sides
        requested, replied, released = state.cursors[0], state.cursors[2], state.cursors[4]
        if rank.pc == DONE and not requested == replied == released == self.case.requests:
            self._complain(state, "the rank has ended and was not given everything")
        if teacher.pc == DONE and replied != requested:
            self._complain(state, "the teacher has ended and dropped a request")
        if (rank.pc == LOST and teacher.pc != DEAD) or (teacher.pc == LOST and rank.pc != DEAD):
            self._complain(state, "a peer was lost that is not dead")

    # Steps

    def _successors(self, state: State) -> list[tuple[bool, State]]:
        """(whether it is an accident rather than a step of a program, what follows)"""
        found: list[tuple[bool, State]] = []
        for which in (RANK, TEACHER):
            if state.sides[which].pc >= 0:
                after = self._step(state, which)
                if after:
                    found.append((False, after))
                if self.case.crashes:
                    found.append((True, self._put(state, which, Side(DEAD))))
        if state.strays:
            for bell in (RANK, TEACHER):
                rung = _rung(state.bells, bell)
                found.append((True, state._replace(bells=rung, strays=state.strays - 1)))
        if all(side.pc < 0 for side in state.sides) and self._may_begin_again(state):
            found.append((False, self._next_generation(state)))
        return found

    def _next_generation(self, state: State) -> State:
        return state._replace(
            sides=(Side(), Side()), cursors=(0,) * len(CURSORS), bells=(0, 0), generation=state.generation + 1
        )

    def _put(self, state: State, which: int, side: Side) -> State:
        side = self._settled(which, side)
        sides = (side, state.sides[1]) if which == RANK else (state.sides[0], side)
        return state._replace(sides=sides)

    def _step(self, state: State, which: int) -> State | None:
        side, program = state.sides[which], self.programs[which]
        line = program.lines[side.pc]
        on = Side(side.pc + 1, side.local)
        if line.kind == "ring":
            return self._put(state._replace(bells=_rung(state.bells, line.bell)), which, on)
        if line.kind == "drain":
            return self._put(state._replace(bells=_set(state.bells, which, 0)), which, on)
        if line.kind == "sleep":
            if state.bells[which]:
                return self._put(state._replace(bells=_set(state.bells, which, state.bells[which] - 1)), which, on)
            if state.sides[1 - which].pc in (DEAD, LOST):
                return self._put(state, which, Side(program.labels[line.target], side.local))
            return None
        return self._call(state, which, line, on)

    def _call(self, state: State, which: int, line: Line, on: Side) -> State | None:
        side, world = state.sides[which], self.world
        assert line.do
        world.load(state, which)
        try:
            value = line.do(world, world.ring, side.local)
        except Stopped:
            on = Side(side.pc, side.local, tuple(world.words.log or ()), world.base)
        except (ShmbridgeError, Broken) as error:
            self._complain(state, f"{type(error).__name__}: {error}")
            return None
        else:
            on = self._settled(which, self._after(which, on, value))
        if not self._in_order(world.words.cursors):
            self._complain(state, f"cursors out of order: {world.words.cursors}")
        return State(
            (on, state.sides[1]) if which == RANK else (state.sides[0], on),
            tuple(world.words.cursors),
            world.heads(),
            tuple(world.payload),
            world.bells,
            world.ready,
            state.generation,
            state.strays,
        )

    def _settled(self, which: int, side: Side) -> Side:
        """Past all lines that are no step."""
        lines = self.programs[which].lines
        while 0 <= side.pc < len(lines) and lines[side.pc].kind == "local":
            do = lines[side.pc].do
            assert do
            side = self._after(which, Side(side.pc + 1, side.local), do(self.world, self.world.ring, side.local))
        return Side(DONE) if side.pc == len(lines) else side

    def _after(self, which: int, on: Side, value: Any) -> Side:
        if isinstance(value, str):
            ends = {"DONE": DONE, "LOST": LOST}
            return Side(ends[value]) if value in ends else Side(self.programs[which].labels[value], on.local)
        return on if value is None else Side(on.pc, int(value))

    def _in_order(self, cursors: list[int]) -> bool:
        requested, _, replied, streamed, released, consumed, abandoned = cursors
        return (
            released <= replied <= requested <= released + self.case.depth
            and consumed <= streamed <= consumed + self.case.chunks
            and abandoned <= requested
        )


def _rung(bells: tuple[int, int], bell: int) -> tuple[int, int]:
    return _set(bells, bell, min(MAX_RINGS, bells[bell] + 1))


def _set(bells: tuple[int, int], bell: int, count: int) -> tuple[int, int]:
    return (count, bells[1]) if bell == RANK else (bells[0], count)


def explore(case: Case, most_violations: int = 1) -> Found:
    """Every state that `case` can reach, and what is wrong with any of them."""
    explorer = Explorer(case)
    replaced: dict[str, Any] = {"time": SimpleNamespace(monotonic_ns=lambda: 0)}
    for each in ("REQUEST", "REPLY_HEAD", "CHUNK_HEAD"):
        replaced[each] = Descriptor(getattr(ring_module, each), explorer.world.words)
    kept = {each: getattr(ring_module, each) for each in replaced}
    vars(ring_module).update(replaced)
    try:
        return explorer.explore(most_violations)
    finally:
        vars(ring_module).update(kept)
