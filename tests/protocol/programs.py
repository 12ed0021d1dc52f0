"""What each side of the exhaustive model does, line by line: the rank, its teacher, or two teachers and the owner of the lane."""

from __future__ import annotations

from functools import partial
from typing import Any

from shmbridge.errors import RingFull
from shmbridge.output_spec import Extent
from shmbridge.shm.layout import WORD, LaneWord
from shmbridge.shm.ring import Composition, Ring
from tests.protocol.actors import require
from tests.protocol.world import (
    AWAY,
    DEAD,
    RANK,
    SECOND,
    SERVES,
    TEACHER,
    WANTED,
    Body,
    Case,
    Due,
    Program,
    State,
    World,
    mark,
)


def of(case: Case) -> tuple[Program, ...]:
    """A program for each side."""
    if case.handovers is None:
        return rank_program(case), teacher_program(case, 0)
    return rank_program(case), teacher_program(case, 0), teacher_program(case, 1), owner_program(case.handovers)


# The rank


def rank_program(case: Case) -> Program:
    """Submit up to the depth, read in order, release; close."""
    program = Program()
    _wait(program, case, lambda world, ring, local: world.ready == world.generation)
    submitted = 0
    for sequence in range(case.requests):
        while submitted < min(case.requests, sequence + case.depth):
            _submit(program, case, submitted)
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
    program.call(lambda world, ring, local: setattr(ring, "closed", True))
    _ring_teacher(program, case)
    return program


def _wait(program: Program, case: Case, ready: Body) -> None:
    """Where there is another teacher, the death of one is waited out."""
    waited_out: tuple[Due, Body] | tuple[()] = () if case.handovers is None else (_a_death, _nothing)
    program.wait(ready, case.recheck, *waited_out)


def _ring_teacher(program: Program, case: Case) -> None:
    """Ring who serves the lane."""

    def ring_it(world: World, ring: Ring, local: int) -> None:
        world.ring_bell(TEACHER + world.lane.teacher)

    if case.handovers is None:
        program.ring(TEACHER)
    else:
        program.call(ring_it)


def _a_death(state: State, which: int) -> bool:
    return any(side.pc == DEAD for side in state.sides)


def _nothing(world: World, ring: Ring, local: int) -> None:
    pass


def _submit(program: Program, case: Case, sequence: int, full: str = "") -> None:
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
    _ring_teacher(program, case)
    program.local(lambda local: sequence + 1)
    program.label(skip)


def _whole(program: Program, case: Case, sequence: int, payload: bool, ahead: int | None = None) -> None:
    _wait(program, case, lambda world, ring, local: ring.answered(sequence))

    def read(world: World, ring: Ring, local: int) -> None:
        head = ring.read_reply(sequence)
        require(head.echo == mark(world.generation, sequence), "the head of another request")

    program.call(read)
    if ahead is not None:
        _submit(program, case, ahead, full="is refused")
    if payload:
        for half in range(2):
            program.call(partial(_read_half, sequence=sequence, number=sequence, half=half))


def _read_half(world: World, ring: Ring, local: int, *, sequence: int, number: int, half: int, part: int = 0) -> None:
    found = world.payload[number % world.slots * 2 + half]
    require(found == mark(world.generation, sequence, part), f"half {half} of {sequence}.{part} is {found}")


def _chunk(program: Program, case: Case, sequence: int, part: int) -> None:
    """The next chunk of a reply, its two halves, and back; `number` of the chunk is the rank's own cursor."""

    def ready(world: World, ring: Ring, local: int) -> bool | None:
        before = world.base
        found = ring.next_chunk(sequence) is not None or ring.answered(sequence)
        if ring.consumed != before and case.rings_for_skipped:  # chunks of an abandoned reply: there is room again
            world.ring_bell(TEACHER)
        return found

    def take(world: World, ring: Ring, local: int) -> None:
        chunk = ring.next_chunk(sequence)
        require(chunk is not None and chunk.start == part, f"{chunk} is not chunk {part} of {sequence}")

    def half(world: World, ring: Ring, local: int, which: int) -> None:
        number = world.cursor(LaneWord.CONSUMED)
        _read_half(world, ring, local, sequence=sequence, number=number, half=which, part=part)

    _wait(program, case, ready)
    program.call(take)
    program.call(partial(half, which=0))
    program.call(partial(half, which=1))
    program.call(lambda world, ring, local: ring.consume(world.cursor(LaneWord.CONSUMED)))
    _ring_teacher(program, case)


def _leave(program: Program, case: Case, sequence: int) -> None:
    """Abandon a reply, a streamed one after its first chunk, and wait until its slot may be given back."""
    if case.chunks:
        _chunk(program, case, sequence, 0)
    program.call(lambda world, ring, local: ring.abandon(sequence))
    _ring_teacher(program, case)
    _wait(program, case, lambda world, ring, local: ring.answered(sequence))


# The teachers


def teacher_program(case: Case, index: int) -> Program:
    """Open the barrier; answer the oldest request, whole or in chunks, until the rank has closed.

    Where there are two, teacher `index` hands the lane over where the owner wants that, see teacher/scheduler.py, and goes on until
    training is over. A thread publishes a sealed reply a little later; meanwhile the teacher looks at who is to serve the lane.

    `local` is 1 + the sequence that it answers, 0 where there is none, and AWAY more while the other teacher serves the lane.
    """
    program = Program()
    exchange = partial(_exchange, index=index)
    handed = case.handovers is not None
    if handed:
        program.local(lambda local: AWAY if index else 0)
    else:
        program.call(_open_barrier)
        program.ring(RANK)
    program.label("collect")
    if handed:
        program.call(exchange)
        program.wait(_may_take, due=partial(_exchange_is_due, index=index), check=exchange)
    else:
        program.wait(lambda world, ring, local: ring.next_request() is not None or ring.closed, case.recheck)
    program.call(partial(_take, handed=handed))
    program.call(_read_request)
    if not handed:
        program.call(_skip_if_unwanted)
    if case.chunks:
        _stream(program, case)
    else:
        for half in range(2):
            program.call(partial(_write_half, half=half))
    program.label("head")
    program.call(
        lambda world, ring, local: ring.write_reply(local - 1, _PLACE, None, mark(world.generation, local - 1))
    )
    if handed:
        program.call(lambda world, ring, local: ring.seal_reply(local - 1))
        program.call(exchange)
    program.label("publish")
    program.call(lambda world, ring, local: ring.publish_reply(local % AWAY - 1))
    program.ring(RANK)
    program.local(lambda local: local // AWAY * AWAY)
    program.goto("collect")
    return program


_PLACE = Composition(1, 0, 1, 1, 1, 0)


def _open_barrier(world: World, ring: Ring, local: int) -> None:
    world.ready = world.generation


def _take(world: World, ring: Ring, local: int, handed: bool) -> int | str:
    over = world.over
    sequence = ring.next_request() if local < AWAY else None
    if sequence is None:
        return "DONE" if over or (not handed and ring.closed) else "collect"
    return 1 + sequence


def _read_request(world: World, ring: Ring, local: int) -> None:
    request = ring.read_request(local - 1)
    require(int.from_bytes(request.ids, "little") == mark(world.generation, local - 1), "the IDs of another request")


def _skip_if_unwanted(world: World, ring: Ring, local: int) -> str | None:
    if ring.abandoned >= local:
        ring.skip_reply(local - 1)
        return "publish"
    return None


def _write_half(world: World, ring: Ring, local: int, half: int) -> None:
    world.payload[(local - 1) % world.slots * 2 + half] = mark(world.generation, local - 1)


def _stream(program: Program, case: Case) -> None:
    def may_go_on(world: World, ring: Ring, local: int) -> bool:
        return ring.has_room() or ring.abandoned >= local or ring.closed

    def room(world: World, ring: Ring, local: int) -> str | None:
        if ring.abandoned >= local or ring.closed:
            return "head"
        return None if ring.has_room() else "next chunk"

    def write_half(world: World, ring: Ring, local: int, half: int) -> None:
        number, part = world.cursor(LaneWord.STREAMED), ring.streamed_of(local - 1)
        world.payload[number % world.slots * 2 + half] = mark(world.generation, local - 1, part)

    program.label("next chunk")
    program.call(lambda world, ring, local: "head" if ring.streamed_of(local - 1) == case.parts else None)
    program.wait(may_go_on, case.recheck)
    program.call(room)
    for half in range(2):
        program.call(partial(write_half, half=half))
    program.call(lambda world, ring, local: ring.write_chunk(local - 1, ring.streamed_of(local - 1), 1))
    program.call(lambda world, ring, local: ring.publish_chunk())
    program.ring(RANK)
    program.goto("next chunk")


# Handing over


def _may_take(world: World, ring: Ring, local: int) -> bool:
    return world.over or (local < AWAY and ring.next_request() is not None)


def _exchange_is_due(state: State, which: int, index: int) -> bool:
    serves = state.sides[which].local < AWAY
    exchange = state.cursors[WANTED] != index if serves else state.cursors[SERVES] == index
    return exchange or _a_death(state, which)


def _exchange(world: World, ring: Ring, local: int, index: int) -> int | None:
    lane = world.lane
    if local >= AWAY:
        if lane.teacher != index:
            return None
        ring.take_over()
        return local - AWAY
    if lane.wanted_teacher == index or not ring.settled:
        return None
    heir = lane.wanted_teacher
    lane.teacher = heir
    world.ring_bell(TEACHER + heir)
    return local + AWAY


def owner_program(handovers: int) -> Program:
    """Ask for the lane to change hands; give a dead teacher's to the other one; announce the end of training."""

    def ring_all(world: World) -> None:
        for bell in (RANK, TEACHER, SECOND):
            world.ring_bell(bell)

    def is_dead(sides: tuple[Any, ...], teacher: int) -> bool:
        return bool(sides[TEACHER + teacher].pc == DEAD)

    def ask(world: World, ring: Ring, local: int) -> None:
        teacher = 1 - world.cursor(LaneWord.WANTED)
        if not is_dead(world.sides, teacher):
            world.lane.wanted_teacher = teacher
            ring_all(world)

    def due(state: State, which: int) -> bool:
        return state.sides[RANK].pc < 0 or any(is_dead(state.sides, state.cursors[word]) for word in (SERVES, WANTED))

    def tend(world: World, ring: Ring, local: int) -> str:
        serves = world.lane.teacher
        if is_dead(world.sides, serves):
            world.lane.wanted_teacher = 1 - serves
            world.lane.teacher = 1 - serves
            ring_all(world)
        elif is_dead(world.sides, world.cursor(LaneWord.WANTED)):
            world.lane.wanted_teacher = serves
            ring_all(world)
        elif world.sides[RANK].pc < 0:
            world.over = True
            ring_all(world)
            return "DONE"
        return "watch"

    program = Program()
    for _ in range(handovers):
        program.call(ask)
    program.label("watch")
    program.until(due, tend)
    return program
