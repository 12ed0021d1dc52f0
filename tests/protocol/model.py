"""Every interleaving of a rank and its teacher, or of a rank, two teachers and the owner, over the functions of the real ring.

A state is what lies in shared memory (cursors, heads, payload), how often each doorbell has rung, and where each side is in
its program. A step runs one side up to its next access to a cursor: Ring's methods are executed as they are, over words
that stop them. To go on in the middle of a method it is run again from its begin, and the accesses made so far are
answered from a log. Either side may be killed before any step; then the survivor must end, and a new generation begins in
the same dirty memory with cleared cursors, which is worse than the fresh memory that it has in truth.

With `handovers` the owner asks that often, and at any moment, for the lane to be served by the other teacher. One side may be
killed then: where it is a teacher, the owner gives its lane to the other, and from the death on every wait has its slices.

`explore` walks all states and returns what is wrong with any of them:

    - a method of the ring, or a check of the bytes, raised: a reply of another sequence or generation, half a reply
    - deadlock: no step is possible, or none that leads to an end (there are no slices: a lost wake-up is never healed)
    - an end at which a request is neither answered nor failed
    - cursors out of order, or one that falls
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, NamedTuple

from shmbridge.errors import ShmbridgeError
from shmbridge.shm import ring as ring_module
from tests.protocol import programs
from tests.protocol.actors import Broken
from tests.protocol.world import (
    CURSORS,
    DEAD,
    DONE,
    LOST,
    NAMES,
    OWNER,
    SERVES,
    Case,
    Descriptor,
    Line,
    Side,
    State,
    Stopped,
    World,
    replaced,
)


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
        self.programs = programs.of(case)
        self.world = World(case)
        self.violations: list[str] = []

    def first(self) -> State:
        world = self.world
        empty = b"".join(world._views)
        payload = (0,) * (2 * world.slots)
        ready = 0 if self.case.handovers is None else 1  # a lane is handed over behind the barrier
        return self._begun(State((), (), empty, payload, (), ready, 1, self.case.strays))

    def _begun(self, state: State) -> State:
        """A generation begins."""
        sides = tuple(self._settled(which, Side()) for which in range(len(self.programs)))
        return state._replace(sides=sides, bells=(0,) * min(len(sides), OWNER), cursors=(0,) * len(CURSORS))

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
        names = dict(zip(NAMES, state.cursors, strict=True))
        self.violations.append(f"{what}; {state.sides}, bells {state.bells}, generation {state.generation}, {names}")

    def _is_end(self, state: State) -> bool:
        over = all(side.pc < 0 for side in state.sides)
        return over and not self._may_begin_again(state)

    def _may_begin_again(self, state: State) -> bool:
        crashed = any(side.pc == DEAD for side in state.sides)
        return crashed and state.generation < self.case.generations

    def _check_end(self, state: State) -> None:
        rank, *others = state.sides
        requested, replied, released = state.cursors[0], state.cursors[2], state.cursors[4]
        if rank.pc == DONE and not requested == replied == released == self.case.requests:
            self._complain(state, "the rank has ended and was not given everything")
        if self.case.handovers is not None:
            return
        (teacher,) = others
        if teacher.pc == DONE and replied != requested:
            self._complain(state, "the teacher has ended and dropped a request")
        if (rank.pc == LOST and teacher.pc != DEAD) or (teacher.pc == LOST and rank.pc != DEAD):
            self._complain(state, "a peer was lost that is not dead")

    # Steps

    def _successors(self, state: State) -> list[tuple[bool, State]]:
        """(whether it is an accident rather than a step of a program, what follows)"""
        found: list[tuple[bool, State]] = []
        enough = self.case.handovers is not None and any(side.pc == DEAD for side in state.sides)
        for which, side in enumerate(state.sides):
            if side.pc >= 0:
                after = self._step(state, which)
                if after:
                    found.append((False, after))
                if self.case.crashes and which != OWNER and not enough:
                    found.append((True, self._put(state, which, Side(DEAD))))
        if state.strays:
            for bell in range(len(state.bells)):
                bells = self.world.rung(state.bells, bell)
                found.append((True, state._replace(bells=bells, strays=state.strays - 1)))
        if all(side.pc < 0 for side in state.sides) and self._may_begin_again(state):
            found.append((False, self._next_generation(state)))
        return found

    def _next_generation(self, state: State) -> State:
        return self._begun(state._replace(generation=state.generation + 1))

    def _put(self, state: State, which: int, side: Side) -> State:
        side = self._settled(which, side)
        return state._replace(sides=replaced(state.sides, which, side))

    def _step(self, state: State, which: int) -> State | None:
        side, program = state.sides[which], self.programs[which]
        line = program.lines[side.pc]
        on = Side(side.pc + 1, side.local, kept=side.kept)
        if line.kind == "ring":
            return self._put(state._replace(bells=self.world.rung(state.bells, line.bell)), which, on)
        if line.kind == "drain":
            return self._put(state._replace(bells=replaced(state.bells, which, 0)), which, on)
        if line.kind == "sleep":
            if state.bells[which]:
                return self._put(state._replace(bells=replaced(state.bells, which, state.bells[which] - 1)), which, on)
            if line.due(state, which) if line.due else state.sides[1 - which].pc in (DEAD, LOST):
                return self._put(state, which, on._replace(pc=program.labels[line.target]))
            return None
        if line.due and not side.log and not line.due(state, which):
            return None
        return self._call(state, which, line, on)

    def _call(self, state: State, which: int, line: Line, on: Side) -> State | None:
        side, world = state.sides[which], self.world
        assert line.do
        world.load(state, which)
        try:
            value = line.do(world, world.ring, side.local)
        except Stopped:
            on = side._replace(log=tuple(world.words.log or ()), base=world.base)
        except (ShmbridgeError, Broken) as error:
            self._complain(state, f"{type(error).__name__}: {error}")
            return None
        else:
            on = on._replace(kept=(world.ring._sealed, world.ring.filled))
            on = self._settled(which, self._after(which, on, value))
        cursors = tuple(world.words.cursors)
        if cursors != state.cursors:
            self._check_order(state, cursors)
        return State(
            replaced(state.sides, which, on),
            cursors,
            world.heads(),
            tuple(world.payload),
            world.bells,
            world.ready,
            state.generation,
            state.strays,
            world.over,
        )

    def _settled(self, which: int, side: Side) -> Side:
        """Past all lines that are no step."""
        lines = self.programs[which].lines
        while 0 <= side.pc < len(lines) and lines[side.pc].kind == "local":
            do = lines[side.pc].do
            assert do
            on = Side(side.pc + 1, side.local, kept=side.kept)
            side = self._after(which, on, do(self.world, self.world.ring, side.local))
        return Side(DONE) if side.pc == len(lines) else side

    def _after(self, which: int, on: Side, value: Any) -> Side:
        if isinstance(value, str):
            ends = {"DONE": DONE, "LOST": LOST}
            return Side(ends[value]) if value in ends else on._replace(pc=self.programs[which].labels[value])
        return on if value is None else on._replace(local=int(value))

    def _check_order(self, state: State, cursors: tuple[int, ...]) -> None:
        requested, _, replied, streamed, released, consumed, abandoned = cursors[:SERVES]
        in_order = (
            released <= replied <= requested <= released + self.case.depth
            and consumed <= streamed <= consumed + self.case.chunks
            and abandoned <= requested
        )
        if not in_order:
            self._complain(state, f"cursors out of order: {cursors}")
        if any(before > after for before, after in zip(state.cursors[:SERVES], cursors[:SERVES], strict=True)):
            self._complain(state, f"a cursor fell: {cursors}")


def explore(case: Case, most_violations: int = 1) -> Found:
    """Every state that `case` can reach, and what is wrong with any of them."""
    explorer = Explorer(case)
    modelled: dict[str, Any] = {"time": SimpleNamespace(monotonic_ns=lambda: 0)}
    for each in ("REQUEST", "REPLY_HEAD", "CHUNK_HEAD"):
        modelled[each] = Descriptor(getattr(ring_module, each), explorer.world.words)
    kept = {each: getattr(ring_module, each) for each in modelled}
    vars(ring_module).update(modelled)
    try:
        return explorer.explore(most_violations)
    finally:
        vars(ring_module).update(kept)
