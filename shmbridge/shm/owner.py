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
from shmbridge.shm.layout import ControlWord
from shmbridge.shm.participant_record import Failure
from shmbridge.shm.process import myself
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
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            dead = True
        except BlockingIOError:
            dead = False
        yield dead
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
        with ExitStack() as undo:
            session_id, segment = _create_control(undo, teachers)
            words, shape = segment.words, Shape.of(settings, lanes, teachers)
            words[ControlWord.OWNER_PID], words[ControlWord.OWNER_START] = myself()
            for i, value in enumerate(shape):
                words[ControlWord.LANES + i] = value
            _write_settings(segment, settings)
            segment.publish()
            super().__init__(session_id, segment)
            self.settings = settings
            self.control.owner.sign_in()
            self._teacher_bells = [Doorbell(self.names.teacher_bell(i), create=True) for i in range(teachers)]
            self._undo = undo.pop_all()

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
        last, generation = self.generation, self.generation + 1
        shape = self.control.shape if lanes is None else self.control.shape._replace(lanes=lanes)
        with self._whole_or_undone():
            bells = [
                Doorbell(self.names.member_bell(generation, lane, member), create=True)
                for lane in range(shape.lanes)
                for member in range(shape.members)
            ]
            created = [self._create_lane(generation, lane) for lane in range(shape.lanes)]
        self.control.shape, self.generation, self.lanes, self._rank_bells = shape, generation, created, bells
        self._forget_failure_of_generation()
        self.control.stopping = False
        self.control.words[ControlWord.LANES] = shape.lanes
        self.control.generation = generation
        self.ring_all()
        self._unlink_all(f"-g{last}-")  # whoever still has its objects open keeps them
        return self.token

    @contextmanager
    def _whole_or_undone(self) -> Iterator[None]:
        """Remove the objects that the block has created where it raises."""
        before = objects(self.session_id)
        try:
            yield
        except BaseException:
            created = set(objects(self.session_id)[self.session_id]) - set(before[self.session_id])
            _unlink(created)
            raise

    def _unlink_all(self, part: str) -> None:
        """Remove the session's objects whose name has `part` in it."""
        _unlink(name for name in objects(self.session_id).get(self.session_id, []) if part in name)

    def _create_lane(self, generation: int, index: int) -> Lane:
        """A lane, served by its own teacher, or by another one in place of a lost one."""
        teacher = index % len(self.control.teachers)
        left = [record.rank for record in self.control.teachers if not record.lost]
        if left and teacher not in left:
            teacher = left[index % len(left)]
        shape = self.control.shape.lane_layout
        name = self.names.lane(generation, index)
        segment = Segment.create(name, layout.LANE, shape.nbytes, self.session_id, generation, index)
        for word, value in zip(layout.LANE_CONSTANTS, shape.constants, strict=True):
            segment.words[word] = value
        lane = Lane(segment, shape, index, generation)
        lane.teacher = lane.wanted_teacher = teacher
        segment.publish()
        return lane

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
        shape, record = self.control.shape, self.control.owner
        nbytes = shape.exchange_bytes if on_gpu else shape.reply_bytes(agreed.outputs)
        head = layout.head_bytes(agreed.head) if agreed.head else 0
        with self._whole_or_undone():
            if head and record.offer is None:  # later generations have the head of the first
                Segment.create(self.names.head(), layout.HEAD, layout.PAGE + head, self.session_id).publish()
            for lane in range(shape.lanes):
                name = self.names.reply(self.generation, lane)
                Segment.create(name, layout.REPLY, nbytes, self.session_id, self.generation, lane).publish()
        record.write_offer(agreed.encode())
        self.control.replies_ready = self.generation
        self.ring_all()
        return nbytes * shape.lanes + head

    def end_training(self) -> None:
        """Announce that this generation's training group has ended; the teacher drains, and stops or waits for the next."""
        self.control.training_done = self.generation
        self.ring_all()

    def end_session(self) -> None:
        """Announce that no generation follows."""
        self.control.ending = True
        self.end_training()

    def ask_to_stop(self) -> None:
        """Announce that the run is to stop: ranks with a save hook save at their next call of the bridge, and the end of a rank
        or a teacher is no failure."""
        self.control.stopping = True
        self.ring_all()

    def hand_over(self, lane: int, teacher: int) -> None:
        """Give a lane whose teacher is gone, and reaped, to another one."""
        self.lanes[lane].wanted_teacher = teacher
        self.lanes[lane].teacher = teacher
        self.ring_all()

    def ask_to_hand_over(self, lane: int, teacher: int) -> None:
        """Ask the teacher that serves a lane to hand it over to `teacher`, once nothing of it is in its hands."""
        self.lanes[lane].wanted_teacher = teacher
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
        self._unlink_all(f"-g{self.generation}-reply")

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


def _create_control(undo: ExitStack, teachers: int) -> tuple[str, Segment]:
    """A session's id, and its control segment under this process's lock; `undo` removes all of the session."""
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
