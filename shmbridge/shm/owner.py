"""The owner of a session: it alone creates shared objects, and only here are any removed.

The owner is the supervisor in the launcher. It holds a file lock on the control segment while it lives, so that a later
start can tell a dead session from a live one without trusting a pid (pids mean nothing across PID namespaces).
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import posix_ipc

from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ConfigError, PlanError
from shmbridge.output_spec import Offer
from shmbridge.shm import layout
from shmbridge.shm.doorbell import Doorbell
from shmbridge.shm.layout import ControlWord, LaneWord
from shmbridge.shm.process import myself
from shmbridge.shm.record import Failure
from shmbridge.shm.segment import Segment
from shmbridge.shm.session import Lane, MappedSession, Names, Shape, Token, by_cause

SHM_DIRECTORY = Path("/dev/shm")
_OBJECT = re.compile(r"(?:sem\.)?shmbridge-([0-9a-f]{32})-[a-z0-9.-]+")


def objects(session_id: str | None = None) -> dict[str, list[str]]:
    """Names in /dev/shm that look like ours, by session id; of one session where it is given."""
    found: dict[str, list[str]] = {}
    for name in os.listdir(SHM_DIRECTORY):
        match = _OBJECT.fullmatch(name)
        if match and session_id in (None, match[1]):
            found.setdefault(match[1], []).append(name)
    return found


def unlink_session(session_id: str) -> int:
    """Remove every object of a session, its control segment last. Returns how many there were."""
    names = objects(session_id).get(session_id, [])
    _unlink(sorted(names, key=lambda name: name.endswith("-control")))
    return len(names)


def _unlink(names: Iterable[str]) -> None:
    for name in names:
        try:
            if name.startswith("sem."):
                posix_ipc.unlink_semaphore("/" + name.removeprefix("sem."))
            else:
                posix_ipc.unlink_shared_memory("/" + name)
        except posix_ipc.ExistentialError:
            pass


@contextmanager
def lock_if_dead(session_id: str) -> Iterator[bool]:
    """True, and the owner's lock held, where no live owner holds it; so a session is never taken from its owner."""
    path = SHM_DIRECTORY / Names(session_id).control[1:]
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield True  # killed while it created or removed the session: the control segment is first and last
        return
    except OSError:
        yield False  # another user's
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


class Owner(MappedSession):
    """Creates a session, announces its generations, and removes it. A context manager that removes it at the end."""

    def __init__(self, settings: Config, lanes: int, teachers: int = 1) -> None:
        """Create the control segment and the teachers' doorbells.

        Args:
            lanes: training ranks, one lane each.
            teachers: teacher processes; lane i is served by teacher i % teachers.

        Raises:
            PlanError: /dev/shm has no room.
            ConfigError: the settings are larger than their field.
        """
        self._rank_bells: list[Doorbell] = []
        self._has_head = False
        with ExitStack() as undo:
            session_id, segment = _create_control(undo, settings, Shape.of(settings, lanes, teachers))
            super().__init__(session_id, segment)
            self.settings = settings
            self.control.owner.sign_in()
            self._teacher_bells = [Doorbell(self.names.teacher_bell(i), create=True) for i in range(teachers)]
            self._undo = undo.pop_all()

    @property
    def shape(self) -> Shape:
        return self.control.shape

    def describe(self, settings: Config) -> None:
        """Put other settings of the same shape in place, before anybody has the token. Raises ConfigError."""
        _write_settings(self.control.segment, settings)
        self.settings = settings

    def start_generation(self, lanes: int | None = None) -> Token:
        """Create the lanes and doorbells of the next generation, announce it, and remove those of the last; `lanes` where their
        number is another now.

        Raises:
            PlanError: /dev/shm has no room. The session is at the last generation then, as if nothing had been asked.
        """
        shape = self.shape if lanes is None else self.shape._replace(lanes=lanes)
        generation = self.generation + 1
        with self._whole_or_undone():
            bells = [
                Doorbell(self.names.member_bell(generation, lane, member), create=True)
                for lane in range(shape.lanes)
                for member in range(shape.members)
            ]
            created = [self._create_lane(generation, lane) for lane in range(shape.lanes)]
        last, last_bells = self.generation, self._rank_bells
        self.control.shape, self.generation, self.lanes, self._rank_bells = shape, generation, created, bells
        self._forget_failure_of_generation()
        words = self.control.words
        words[ControlWord.STOPPING] = 0
        words[ControlWord.LANES] = shape.lanes
        words[ControlWord.CURRENT_GENERATION] = generation
        self.ring_all()
        self._remove_generation(last, last_bells)
        return Token(self.session_id, generation)

    @contextmanager
    def _whole_or_undone(self) -> Iterator[None]:
        """Remove the objects that the block has created where it raises."""
        before = self._objects()
        try:
            yield
        except BaseException:
            _unlink(self._objects() - before)
            raise

    def _objects(self) -> set[str]:
        return set(objects(self.session_id).get(self.session_id, []))

    def _create_lane(self, generation: int, index: int) -> Lane:
        shape = self.shape.lane_layout
        name = self.names.lane(generation, index)
        segment = Segment.create(name, layout.LANE, shape.nbytes, self.session_id, generation, index)
        words = segment.words
        words[LaneWord.TEACHER] = words[LaneWord.WANTED] = self._server(index)
        for word, value in zip(layout.LANE_CONSTANTS, shape.constants, strict=True):
            words[word] = value
        segment.publish()
        return Lane(segment, shape, index, generation)

    def _server(self, lane: int) -> int:
        """The teacher that serves a new lane: its own, or in place of a lost one another."""
        own, teachers = lane % self.shape.teachers, self.control.teachers
        left = [index for index, record in enumerate(teachers) if not record.lost]
        return left[lane % len(left)] if teachers[own].lost and left else own

    def offered(self) -> Offer | None:
        """What all teachers offer, once each has.

        Raises:
            PlanError: they differ, so the ranks would not get the same.
        """
        texts = [record.offer for record in self.control.teachers]
        offers = [Offer.decode(text) for text in texts if text is not None]
        if len(offers) < len(texts):
            return None
        first, *others = offers
        for index, other in enumerate(others, 1):
            if not other.agrees(first):
                raise PlanError(
                    f"teacher {index} offers {other.outputs}, teacher 0 offers {first.outputs}; replicas load the same model."
                )
        return first

    def create_replies(self, agreed: Offer) -> int:
        """Create the memory of replies and head that `agreed` needs and tell the teachers. Returns its size in bytes.

        Raises:
            PlanError: /dev/shm has no room; nothing of it is left then.
        """
        on_gpu = self.settings.plane == "cuda_ipc"
        nbytes = self.shape.exchange_bytes if on_gpu else self.shape.reply_bytes(agreed.outputs)
        head = layout.head_bytes(agreed.head) if agreed.head else 0
        with self._whole_or_undone():
            if head and not self._has_head:
                Segment.create(self.names.head(), layout.HEAD, layout.PAGE + head, self.session_id).publish()
            for lane in range(self.shape.lanes):
                name = self.names.reply(self.generation, lane)
                segment = Segment.create(name, layout.REPLY, nbytes, self.session_id, self.generation, lane)
                segment.publish()
        self._has_head = self._has_head or head > 0
        self.control.owner.write_offer(agreed.encode())
        self.control.words[ControlWord.REPLIES_READY] = self.generation
        self.ring_all()
        return nbytes * self.shape.lanes + head

    def _remove_generation(self, generation: int, bells: list[Doorbell]) -> None:
        """Remove its names; whoever still has its objects open keeps them."""
        for bell in bells:
            bell.close()
        _unlink(name for name in self._objects() if f"-g{generation}-" in name)

    def end_training(self) -> None:
        """Announce that this generation's training group has ended; the teacher drains, and stops or waits for the next."""
        self.control.words[ControlWord.TRAINING_DONE] = self.generation
        self.ring_all()

    def end_session(self) -> None:
        """Announce that no generation follows."""
        self.control.words[ControlWord.SESSION_ENDING] = 1
        self.end_training()

    def ask_to_stop(self) -> None:
        """Announce that the run is to stop: ranks with a save hook save at their next call of the bridge, and the end of a rank
        or a teacher is no failure."""
        self.control.words[ControlWord.STOPPING] = 1
        self.ring_all()

    def hand_over(self, lane: int, teacher: int) -> None:
        """Give a lane whose teacher is gone, and reaped, to another one."""
        words = self.lanes[lane].segment.words
        words[LaneWord.WANTED] = teacher
        self.lanes[lane].hand_over(teacher)
        self.ring_all()

    def ask_to_hand_over(self, lane: int, teacher: int) -> None:
        """Ask the teacher that serves a lane to hand it over to `teacher`, once nothing of it is in its hands."""
        self.lanes[lane].segment.words[LaneWord.WANTED] = teacher
        self.ring_all()

    def fail(self, failure: Failure) -> None:
        """Announce the failure that ends the run; every wait stops with it."""
        self._forget_failure_of_generation()
        self.control.owner.relay(failure)
        self.ring_all()

    def fail_generation(self, failure: Failure) -> None:
        """Announce the failure that ends this generation; its ranks' waits stop with it, and the teacher's do not."""
        self.control.owner.relay(msgspec.structs.replace(failure, generation=self.generation))
        self.ring_all()

    def _forget_failure_of_generation(self) -> None:
        failure = self.control.owner.failure
        if failure and failure.generation:
            self.control.owner.forget_failure()

    def free_replies(self) -> None:
        """Give back the reply memory of a generation that has ended, once no teacher has it open."""
        _unlink(name for name in self._objects() if f"-g{self.generation}-reply" in name)

    def ring_all(self) -> None:
        for bell in self._teacher_bells + self._rank_bells:
            bell.ring()

    def failures(self) -> list[Failure]:
        """Of teachers and ranks: causes before consequences, the earliest first."""
        records = [*self.control.teachers, *(record for lane in self.lanes for record in lane.records)]
        return by_cause(failure for record in records if (failure := record.failure))

    def close(self) -> None:
        """Remove everything. Whoever is still attached keeps its mappings, and learns it from the owner's death."""
        self._undo.close()

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _create_control(undo: ExitStack, settings: Config, shape: Shape) -> tuple[str, Segment]:
    """A session's id, and its control segment under this process's lock; `undo` removes all of the session."""
    session_id, segment = _create_locked(undo, shape.teachers)
    words = segment.words
    words[ControlWord.OWNER_PID], words[ControlWord.OWNER_START] = myself()
    for i, value in enumerate(shape):
        words[ControlWord.LANES + i] = value
    _write_settings(segment, settings)
    segment.publish()
    return session_id, segment


def _create_locked(undo: ExitStack, teachers: int) -> tuple[str, Segment]:
    while True:
        session_id = secrets.token_hex(16)
        name = Names(session_id).control
        segment = Segment.create(name, layout.CONTROL, layout.control_bytes(teachers), session_id)
        try:
            lock = os.open(SHM_DIRECTORY / name[1:], os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:  # a cleaner took it for dead, before it was locked
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            undo.callback(os.close, lock)
            undo.callback(unlink_session, session_id)
            return session_id, segment
        os.close(lock)


def _write_settings(segment: Segment, settings: Config) -> None:
    text = config.to_json(settings)
    if len(text) > layout.SETTINGS_CAPACITY:
        raise ConfigError(f"the settings take {len(text)} bytes as JSON, at most {layout.SETTINGS_CAPACITY} fit")
    segment.bytes[layout.SETTINGS_OFFSET : layout.SETTINGS_OFFSET + len(text)] = text
    segment.words[ControlWord.SETTINGS_NBYTES] = len(text)
