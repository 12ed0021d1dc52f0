"""Garbled shared memory: every attach and every call of ring, session and board ends in an error of ours or a correct result.

    python -m tests.protocol.fuzz --seed 1 --cases 1000

Each case lays a session out as it is in the middle of its work, garbles one or a few places of the control segment, the
lane segment, or the file itself, and then makes every call that a participant makes. The calls run in a forked child, so
that a crash by a signal is seen as what it is. What is garbled depends on the seed and the case alone.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from shmbridge.errors import ShmbridgeError
from shmbridge.shm import doorbell, layout
from shmbridge.shm.layout import RECORD_BYTES, RECORDS_OFFSET, SETTINGS_OFFSET
from shmbridge.shm.owner import Owner
from shmbridge.shm.participant_record import Failure
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.teacher_session import TeacherSession
from tests.protocol import actors
from tests.protocol.actors import FAILS, OFFER, TOKENS, Broken, TinyRank, TinyTeacher, content, require

CASES_OF_A_CHILD = 50
JSON = (SETTINGS_OFFSET, RECORDS_OFFSET + RECORD_BYTES + layout.OFFER.offset, RECORDS_OFFSET + layout.FAILURE.offset)
INTERESTING = (0, 1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)


class Scene:
    """A session in the middle of its work, and its segments' bytes as they were then."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.owner = Owner(actors.settings(depth=2, chunks=chunks), 1)
        self.token = self.owner.start_generation()
        teacher = TinyTeacher(TeacherSession(self.token))
        rank = TinyRank(RankSession(self.token, 0))
        self.owner.create_replies(OFFER)
        teacher.open()
        rank.open(0.0)
        if chunks:
            rank.submit()
            teacher.move(), teacher.move(), teacher.move()  # two chunks of the first reply
        else:
            rank.submit(), rank.submit()
            teacher.move()  # the first reply
        self.owner.control.owner.relay(Failure("trainer", 3, 1, "training", 5, 9, "exit code 7"))
        self.owner.control.owner.words[layout.RecordWord.FAILURE] = 0  # until a case garbles it
        self.segments = {"control": self.owner.control.segment, "lane": self.owner.lanes[0].segment}
        rank.session.record.words[layout.RecordWord.PID] = 0  # so that a case can attach to the lane
        self.pristine = {name: bytes(segment.bytes) for name, segment in self.segments.items()}

    def places(self) -> list[tuple[str, int, int]]:
        """(segment, from, to) of what is worth garbling; payload bytes have no check and are not among it."""
        lane = self.owner.lanes[0].ring.layout
        found = [
            ("control", 0, 256),
            *(("control", at, at + 512) for at in JSON),
            ("control", RECORDS_OFFSET, RECORDS_OFFSET + 128),
            ("control", RECORDS_OFFSET + RECORD_BYTES, RECORDS_OFFSET + RECORD_BYTES + 128),
            ("lane", 0, 128),
            ("lane", 512, 704),
            ("lane", lane.record(0), lane.record(0) + 128),
        ]
        for slot in range(lane.depth):
            found.append(("lane", lane.request(slot), lane.request(slot) + layout.REQUEST.size))
            found.append(("lane", lane.reply_head(slot), lane.reply_head(slot) + layout.REPLY_HEAD.size))
        chunks = map(lane.chunk_head, range(lane.chunks))
        return found + [("lane", at, at + layout.CHUNK_HEAD.size) for at in chunks]

    def restore(self) -> None:
        for name, segment in self.segments.items():
            segment.bytes[:] = self.pristine[name]

    def garble(self, chance: random.Random) -> str:
        """Change something; in words, what."""
        told = []
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            name, start, stop = chance.choice(self.places())
            memory, words = self.segments[name].bytes, self.segments[name].words
            how = chance.choice(["byte", "word", "word", "near", "block"])
            if how == "byte":
                memory[chance.randrange(start, stop)] = chance.randrange(256)
            elif how == "block":
                at = chance.randrange(start, stop)
                end = min(stop, at + chance.randrange(1, 64))
                memory[at:end] = chance.randbytes(end - at)
            else:
                at = chance.randrange(start // 8, stop // 8)
                near = words[at] + chance.choice([-2, -1, 1, 2])
                value = near if how == "near" else chance.choice([*INTERESTING, chance.getrandbits(64)])
                words[at] = value % 2**64
            told.append(f"{how} in {name}[{start}:{stop}]")
        return ", ".join(told)


@contextmanager
def replaced_file(scene: Scene, chance: random.Random) -> Iterator[str]:
    """A segment's file of another size, mode or owner under its name, while the mapped one lies aside."""
    names = scene.owner.names
    name = chance.choice([names.control, names.lane(1, 0), names.reply(1, 0)])
    path, aside = f"/dev/shm{name}", f"/dev/shm{name}.aside"
    with open(path, "rb") as file:
        data = file.read()
    sizes = [0, 1, 7, 4095, 4096, 4097, len(data) - 4096, len(data) - 1, len(data) + 1, len(data) + 4096, 2 * len(data)]
    size = chance.choice([*sizes, len(data), len(data), chance.randrange(3 * len(data))])
    mode = chance.choice([0o600, 0o600, 0o600, 0o400, 0o666, 0o660, 0o604, 0o601, 0o700])
    uid = chance.choice([0, 0, 0, 1])
    geteuid = os.geteuid
    os.rename(path, aside)
    try:
        with open(path, "wb") as file:
            file.write(data[:size].ljust(size, b"\0"))
            os.fchmod(file.fileno(), mode)
        os.geteuid = lambda: geteuid() + uid
        yield f"{name}: {size} bytes in place of {len(data)}, mode {mode:o}, another's: {uid}"
    finally:
        os.geteuid = geteuid
        os.rename(aside, path)


def use_everything(scene: Scene) -> int:
    """Every call that a participant makes. Returns how many ended in an error of ours."""
    calls = [_as_rank, _as_teacher, _as_owner]
    return sum(_refused(call, scene) for call in calls)


def _refused(call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except ShmbridgeError:
        return True
    return False


def _as_rank(scene: Scene) -> None:
    session = RankSession(scene.token, 0)
    rank = TinyRank(session)
    ring = rank.ring
    _refused(session.check)
    _refused(_open, rank)
    _look_at(session.record, session.teacher, session.control.owner)
    _refused(rank.session.ring_teacher)
    for sequence in range(3):
        _refused(_read, rank, scene, sequence)
    if scene.chunks:
        _refused(_read_chunks, rank)
    else:
        _refused(rank.submit, FAILS)
    _refused(session.wait, lambda: ring.answered(0), time.monotonic())
    rank.session.close()


def _open(rank: TinyRank) -> None:
    try:
        rank.open(0.0)
    except Broken:  # another offer, which the rank cannot know: it has no plane
        pass


def _read(rank: TinyRank, scene: Scene, sequence: int) -> None:
    """A reply whose head passes is the reply to its sequence."""
    if not rank.ring.answered(sequence):
        return
    head = rank.ring.read_reply(sequence)
    if head.error is None and not scene.chunks and hasattr(rank, "plane"):
        require(rank.plane.read(sequence) == content("reply", rank.generation, sequence), "another reply's bytes")


def _read_chunks(rank: TinyRank) -> None:
    """A chunk that passes, and begins where its reader expects it, is that chunk."""
    for part in range(2):
        chunk = rank.ring.next_chunk(0)
        if chunk is None or (chunk.start, chunk.positions) != (part * TOKENS, TOKENS) or not hasattr(rank, "plane"):
            return
        if chunk.number == part:  # the reader's own cursor, which nobody else writes, was not garbled
            expected = content("reply", rank.generation, 0, part)
            require(rank.plane.read(part) == expected, "another chunk's bytes")
        rank.ring.consume(chunk.number)


def _as_teacher(scene: Scene) -> None:
    session = TeacherSession(scene.token)
    _refused(session.attach, scene.token.generation)
    for lane in session.served:
        _refused(session.gone, lane)
        _refused(lane.ring.next_request)
        _look_at(*lane.records)
        for sequence in range(3):
            _refused(lane.ring.read_request, sequence)
        lane.ring.has_room()
        _refused(lane.ring.streamed_of, 0)
    _refused(session.check)
    if session.served:
        teacher = TinyTeacher(session)
        if not _refused(teacher.map):
            for _ in range(4):
                _refused(_move, teacher)


def _move(teacher: TinyTeacher) -> None:
    try:
        teacher.move()
    except Broken:  # garbled IDs: the teacher cannot know
        pass


def _as_owner(scene: Scene) -> None:
    _refused(scene.owner.failures)
    _refused(scene.owner.offered)
    _look_at(scene.owner.control.teachers[0], scene.owner.lanes[0].records[0])


def _look_at(*records: object) -> None:
    """All that a record tells."""
    names = [name for name, value in vars(type(records[0])).items() if isinstance(value, property | layout.Word)]
    for record in records:
        for name in names:
            _refused(getattr, record, name)


class Case(NamedTuple):
    seed: int
    number: int

    def run(self, scene: Scene) -> int:
        """How many of the three participants were refused."""
        chance = random.Random(f"{self.seed} {self.number}")
        if self.number % 4 == 3:
            with replaced_file(scene, chance) as what:
                return self._use(scene, what)
        scene.restore()
        return self._use(scene, scene.garble(chance))

    def _use(self, scene: Scene, what: str) -> int:
        try:
            return use_everything(scene)
        except Exception as error:
            raise Broken(f"{self}, {what}: {type(error).__name__}: {error}") from error


def run(seed: int, cases: int, chunks: int) -> tuple[int, float, list[str]]:
    """How many calls were refused, how many seconds the slowest case took, and what went wrong."""
    assert "torch" not in sys.modules, "a child must fork cheaply"
    doorbell.SLICE_S = 0.001
    refused, slowest, violations = 0, 0.0, []
    for first in range(0, cases, CASES_OF_A_CHILD):
        scene = Scene(chunks)
        batch = [Case(seed, number) for number in range(first, min(cases, first + CASES_OF_A_CHILD))]
        try:
            status, text = _in_a_child(scene, batch)
        finally:
            scene.owner.close()
        if status == 0:
            counts, seconds = text.split()
            refused, slowest = refused + int(counts), max(slowest, float(seconds))
        else:
            violations.append(f"cases {batch[0]} to {batch[-1].number}, exit status {status}: {text}")
    return refused, slowest, violations


def _in_a_child(scene: Scene, batch: list[Case]) -> tuple[int, str]:
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            refused, slowest = 0, 0.0
            for case in batch:
                began = time.monotonic()
                refused += case.run(scene)
                slowest = max(slowest, time.monotonic() - began)
            os.write(writes, f"{refused} {slowest}".encode())
            code = 0
        except BaseException:
            os.write(writes, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(code)
    os.close(writes)
    with open(reads, "rb") as file:
        text = file.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.protocol.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=0)
    args = parser.parse_args()
    refused, slowest, violations = run(args.seed, args.cases, args.chunks)
    print(*violations, sep="\n")
    print(f"seed {args.seed}: {args.cases} cases, {refused} refused, {len(violations)} violations, slowest {slowest} s")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
