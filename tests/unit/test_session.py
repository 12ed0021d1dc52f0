"""What participants find in a session, what they refuse, and how each learns that another one is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import re

import posix_ipc
import pytest
import torch

import shmbridge
from shmbridge import config
from shmbridge.errors import (
    AttachError,
    DeadlineExceeded,
    LauncherDied,
    NotLaunched,
    PlanError,
    TeacherDied,
    TrainerDied,
)
from shmbridge.output_spec import HeadSpec, Offer, OutputSpec
from shmbridge.shm import layout, owner
from shmbridge.shm.layout import Header
from shmbridge.shm.participant_record import Failure, Phase, Record
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.segment import Segment
from shmbridge.shm.session import Lane, MappedSession, Token, lost
from shmbridge.shm.teacher_session import TeacherSession
from tests.harness import Echo, bench, until

OFFER = Offer((OutputSpec("out", "float32", ("seq", 8)),), "m")


@pytest.fixture
def it():
    with bench() as made:
        yield made


def shm(name: str) -> str:
    return "/dev/shm" + name


# Attaching


@pytest.mark.parametrize("text", ["", "x", "g" * 32 + "@1", "a" * 32, "a" * 32 + "@0", "a" * 32 + "@-1"])
def test_a_bad_token_is_named(text):
    with pytest.raises(AttachError, match="expected 32 hex digits"):
        Token.parse(text)


def test_connect_outside_a_session_names_the_command(monkeypatch):
    monkeypatch.delenv("SHMBRIDGE_SESSION", raising=False)
    with pytest.raises(NotLaunched, match=r"shmbridge-launch --teacher MODEL .* -- train\.py"):
        shmbridge.connect()


def test_connect_switched_off(monkeypatch):
    monkeypatch.setenv("SHMBRIDGE_SESSION", "off")
    with shmbridge.connect() as bridge:
        bridge.wait_ready()
        assert not bridge.enabled
        with bridge.submit([[1, 2]], step=4).wait() as reply:
            assert reply.missing and reply.step == 4 and reply.names == ()
            with pytest.raises(KeyError, match="the bridge is off"):
                reply.logits  # noqa: B018
        assert bridge.exchange([[1]]).missing


def test_a_session_that_ended_is_named():
    with pytest.raises(AttachError, match="does not exist: the session has ended"):
        RankSession(Token("0" * 32, 1), 0)


@pytest.mark.promise(19)
@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (Header.MAGIC, 0, "magic 0x0"),
        (Header.VERSION, 99, "layout version 99"),
        (Header.KIND, layout.REPLY, "kind 0x3, expected 0x2"),
        (Header.NBYTES, 1, "nbytes 0x1"),
        (Header.SESSION_LOW, 5, r"session \(low\) 0x5"),
        (Header.GENERATION, 9, "generation 0x9, expected 0x1"),
        (Header.INDEX, 3, "index 0x3"),
        (layout.LaneWord.DEPTH, 2**40, "depth, members, tokens"),
    ],
)
def test_a_garbled_lane_is_refused(it, word, value, message, promise):
    def attach() -> None:
        with pytest.raises(AttachError, match=message):
            RankSession(it.token, 0)

    it.owner.lanes[0].segment.words[word] = value
    assert it.start(attach).join() == 0, "neither another error nor a signal"
    promise.kept("a garbled, foreign or other-version header: AttachError with what was found and expected")


@pytest.mark.promise(19)
@pytest.mark.parametrize("size", [0, 100, 4096, 4100, 70000, 73728])
def test_a_truncated_or_enlarged_segment_is_refused(it, size, promise):
    name = it.owner.names.lane(1, 0)
    fake = name.replace("lane0", "lane7")
    with open(shm(name), "rb") as source, open(shm(fake), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(source.read()[:size].ljust(size, b"\0"))

    def attach() -> None:
        with pytest.raises(AttachError, match="truncated|nbytes|kind"):
            Segment.attach(fake, layout.LANE, it.token.session_id, 1, 7)

    assert it.start(attach).join() == 0, "neither another error nor a signal"
    promise.kept("truncated or enlarged: AttachError")


def test_a_segment_that_others_may_write_is_refused(it):
    os.chmod(shm(it.owner.names.lane(1, 0)), 0o666)
    with pytest.raises(AttachError, match="mode 0666, expected 0600"):
        RankSession(it.token, 0)


@pytest.mark.promise(20)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_segment_of_another_user_is_refused(it, promise):
    os.chown(shm(it.owner.names.lane(1, 0)), 12345, -1)
    with pytest.raises(AttachError, match="belongs to uid 12345"):
        RankSession(it.token, 0)
    promise.kept("another user's segment: AttachError")


def test_a_rank_of_an_older_generation_is_refused(it):
    it.owner.start_generation()
    with pytest.raises(AttachError, match="generation 1 of the session, which is at generation 2"):
        RankSession(it.token, 0)


def test_a_rank_beyond_the_lanes_is_refused(it):
    with pytest.raises(AttachError, match="asks for lane 1, the session has lanes 0 to 0"):
        RankSession(it.token, 1)


def test_a_lane_that_a_rank_has_signed_in_to_is_refused_to_another(it):
    RankSession(it.token, 0)
    with pytest.raises(AttachError, match=f"was taken by pid {os.getpid()}, .* have the same LOCAL_RANK"):
        RankSession(it.token, 0)


@pytest.mark.parametrize("killed", [False, True])
def test_of_two_ranks_that_sign_in_at_once_one_is_refused(it, killed, monkeypatch):
    """The first is held between its look at the lane and its own entry. Killed there, it leaves the lane free."""
    at_entry, go_on, sign_in = os.pipe(), os.pipe(), Record.sign_in

    def held(record: Record) -> None:
        os.write(at_entry[1], b".")
        os.read(go_on[0], 1)
        sign_in(record)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "sign_in", held)
        first = it.start(lambda: RankSession(it.token, 0))
    os.read(at_entry[0], 1)
    if killed:
        first.kill()
        first.join()
        RankSession(it.token, 0)
        return
    with pytest.raises(AttachError, match="two processes have the same LOCAL_RANK"):
        RankSession(it.token, 0)
    os.write(go_on[1], b".")
    assert first.join() == 0
    assert it.owner.lanes[0].records[0].identity.pid == first.pid


# The startup barrier


def test_the_barrier_names_a_teacher_that_never_came_and_one_that_is_slow(it):
    session = RankSession(it.token, 0)
    with pytest.raises(DeadlineExceeded, match="has not attached to the session after 0.01 s"):
        session.wait_ready(0.01)
    record = it.owner.control.teachers[0]
    record.sign_in()
    record.enter(Phase.LOADING)
    record.progress(3, 7)
    with pytest.raises(DeadlineExceeded, match=r"phase loading \(3 of 7\)") as late:
        session.wait_ready(0.01)
    assert session.record.phase is Phase.TRAINING
    session.record.fail_with(late.value)
    assert session.record.failure.phase == "barrier"


def test_a_rank_at_the_barrier_learns_that_the_teacher_died(it):
    session = RankSession(it.token, 0)
    teacher = it.start(it.owner.control.teachers[0].sign_in)
    teacher.join()
    with pytest.raises(TeacherDied, match=rf"pid {teacher.pid}, is gone; it was in phase starting"):
        session.wait_ready(30)


@pytest.mark.parametrize("lost", [False, True])
def test_a_rank_waits_for_every_replica_that_may_still_come(lost):
    """Teacher 0 writes what all ranks share, so a rank of teacher 1 must not go on before it is ready."""
    settings = config.load(overrides=["teacher.model=a:b", "ring.max_tokens=16"])
    with owner.Owner(settings, 2, teachers=2) as it:
        token = it.start_generation()
        teachers = [TeacherSession(token, index) for index in range(2)]
        rank = RankSession(token, 1)
        for teacher in teachers:
            teacher.publish(Offer((), "m"))
            teacher.attach(token.generation)
        teachers[1].open_barrier()
        with pytest.raises(DeadlineExceeded, match="teacher 0"):
            rank.wait_ready(0.05)
        if lost:
            it.control.teachers[0].lost = True
        else:
            teachers[0].open_barrier()
        assert rank.wait_ready(5).model == "m"


# Failures


@pytest.mark.parametrize(
    ("role", "kind"), [("teacher", TeacherDied), ("trainer", TrainerDied), ("launcher", LauncherDied)]
)
def test_a_rank_learns_of_a_failure_elsewhere_in_one_line_that_says_where_the_traceback_is(it, role, kind):
    """Not with the traceback in front of each rank's own."""
    failure = Failure(role, 3, 7, "loading", 5, 9, "OSError: no model\nlook here\nand there", "Traceback ...\nend")
    told = (
        f"{role} 3 (pid 7) in phase loading, step 5, sequence 9: OSError: no model (its traceback: /runs/x/report.txt)"
    )
    assert str(lost(failure, "/runs/x")) == told
    session, teacher = RankSession(it.token, 0), TeacherSession(it.token)
    it.owner.fail_generation(failure)
    teacher.check()  # its process outlives the generation
    with pytest.raises(kind, match="OSError: no model"):
        session.check()
    it.owner.fail(failure)
    with pytest.raises(kind):
        teacher.check()
    with pytest.raises(kind, match=f"{role} 3 .*step 5, sequence 9: OSError: no model") as caught:
        session.wait_ready(30)
    assert len(str(caught.value).splitlines()) == 1


def test_the_first_cause_stands_before_every_consequence():
    with bench(2) as it:
        first, second = (lane.records[0] for lane in it.owner.lanes)
        second.sign_in()
        second.fail_with(TeacherDied("gone"))
        first.sign_in()
        first.fail_with(ValueError("mine"))
        first.fail("a second one is not kept")
        assert [f.reason for f in it.owner.failures()] == ["ValueError: mine", "shmbridge.errors.TeacherDied: gone"]


def test_the_reason_of_an_exception_with_notes_is_its_message(it):
    error = FileNotFoundError("no missing.txt")
    error.add_note("while the teacher was ahead of the loop:\n")
    record = it.owner.lanes[0].records[0]
    record.fail_with(error)
    assert record.failure.reason == "FileNotFoundError: no missing.txt"
    assert "while the teacher was ahead" in record.failure.traceback


@pytest.mark.parametrize(
    ("reason", "kept"), [("\0" * 50_000 + "\udc80", ""), ("r" * 3000, "r" * 1000)], ids=["any length", "long traceback"]
)
def test_a_failure_of_any_length_fits_its_record(it, reason, kept):
    """The end of the traceback is kept, and of a reason that is not too long the beginning."""
    record = it.owner.lanes[0].records[0]
    record.fail(reason, "\0" * 200_000 + "t" * 6000 + "end")
    failure = record.failure
    assert failure.reason.startswith(kept)
    assert failure.traceback.endswith("t" * 5000 * bool(kept) + "end")


class Preempted:
    """A record's memory whose first reader is preempted halfway; `meanwhile` runs then."""

    def __init__(self, memory: memoryview, meanwhile) -> None:
        self.memory, self.meanwhile = memory, meanwhile

    def __getitem__(self, part: slice) -> bytes:
        middle = (part.start + part.stop) // 2
        first = bytes(self.memory[part.start : middle])
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return first + bytes(self.memory[middle : part.stop])


def test_a_failure_that_is_replaced_while_a_rank_reads_it_is_read_whole(it):
    """A mixture of both would be garbled: an AttachError, and the rank's save hook would not run."""
    session = RankSession(it.token, 0)
    it.owner.fail_generation(Failure("trainer", 3, 1, "training", 5, 9, "exit code 7" * 20))
    worse = Failure("launcher", 0, 2, "training", 5, 9, "interrupted" * 300)
    record = session.control.owner
    record.memory = Preempted(record.memory, lambda: it.owner.fail(worse))
    with pytest.raises(LauncherDied, match="interrupted"):
        session.check()


def test_a_mapped_session_follows_the_generations_and_tells_what_ends_them(it):
    seen = MappedSession(it.owner.session_id)
    assert (seen.generation, seen.control.generation, [lane.index for lane in seen.lanes]) == (1, 1, [0])
    assert seen.settings == it.owner.settings
    it.owner.fail_generation(Failure("launcher", 0, 1, "", None, None, "of generation 1", at_ns=2))
    assert [failure.reason for failure in seen.failures()] == ["of generation 1"]
    it.owner.start_generation(2)
    assert seen.control.generation == 2
    seen.update()
    assert (seen.generation, [lane.index for lane in seen.lanes], seen.failures()) == (2, [0, 1], [])
    rank = it.owner.lanes[1].records[0]
    rank.sign_in()
    rank.fail("of rank 1")
    it.owner.fail_generation(Failure("trainer", 1, 1, "", None, None, "of rank 1, as its launcher tells it"))
    assert [failure.reason for failure in seen.failures()] == ["of rank 1"]
    it.owner.fail(Failure("launcher", 0, 1, "", None, None, "of the session", at_ns=1))
    assert [failure.reason for failure in seen.failures()] == ["of the session", "of rank 1"]


def test_a_rank_that_dies_does_not_block_the_teacher_or_the_others():
    ids = torch.ones(1, 2, dtype=torch.int64)

    def dies(bridge):
        bridge.submit(ids).wait()
        os.kill(os.getpid(), 9)

    with bench(2, "teacher.collect=lockstep") as it:
        teacher = it.teacher(Echo())
        first, second = it.rank(0, dies), it.rank(1, lambda bridge: [bridge.exchange(ids) for _ in range(3)])
        assert (first.join(), second.join(), teacher.join()) == (-9, 0, 0)


def test_training_that_ends_without_connecting_ends_the_teacher():
    with bench(2) as it:
        teacher = it.teacher(Echo())
        until(lambda: it.owner.control.teachers[0].phase is Phase.COLLECTING, "collecting")
        it.owner.end_training()
        assert teacher.join() == 0


def test_a_record_tells_whether_the_process_lives_that_has_signed_in_last(it):
    record = it.owner.control.teachers[0]
    assert record.is_alive() is None
    child = it.start(record.sign_in)
    child.join()
    assert record.is_alive() is False
    record.sign_in()
    assert record.is_alive() is True


# The owner


def test_a_dead_owner_is_noticed_and_its_objects_can_be_reclaimed(it):
    read, write = os.pipe()

    def body() -> None:
        with bench() as other:
            os.write(write, str(other.token).encode())
            os.kill(os.getpid(), 9)

    child = it.start(body)
    child.join()
    token = Token.parse(os.read(read, 64).decode())
    session = RankSession(token, 0)
    with pytest.raises(LauncherDied, match=f"pid {child.pid}"):
        session.wait_ready(30)
    with owner.lock_if_dead(it.token.session_id) as dead:
        assert not dead, "a live session is never taken"
    with owner.lock_if_dead(token.session_id) as dead:
        assert dead
        assert owner.unlink_session(token.session_id) == 4
    assert token.session_id not in owner.objects()


def test_a_cleaner_between_create_and_lock_does_not_hurt(monkeypatch):
    """The starter finds its control segment unlinked under its lock, and takes a new session id."""
    flock, stolen = fcntl.flock, []

    def cleaner_first(fd: int, how: int) -> None:
        if not stolen:
            name = os.readlink(f"/proc/self/fd/{fd}")
            stolen.append(name)
            posix_ipc.unlink_shared_memory("/" + name.rsplit("/", 1)[1])
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", cleaner_first)
    with bench() as it:
        assert stolen and it.owner.session_id not in stolen[0]
        assert it.owner.session_id in owner.objects()


def test_a_full_shared_memory_is_a_plan_error(it):
    big = Offer((OutputSpec("out", "float64", ("seq", 2**40)),), "m")
    with pytest.raises(PlanError, match=r"/dev/shm has .* MiB free, segment .*Lower ring\.max_tokens"):
        it.owner.create_replies(big)


fallocate = os.posix_fallocate


class FullShm:
    """/dev/shm that has no room for the creation of one object: the `at`-th from now on."""

    def __init__(self, monkeypatch) -> None:
        self.at = 0
        for module, name in ((posix_ipc, "SharedMemory"), (posix_ipc, "Semaphore"), (os, "posix_fallocate")):
            monkeypatch.setattr(module, name, self._counting(getattr(module, name)))

    def _counting(self, create):
        def counted(*args, **kwargs):
            if create is fallocate or args[1:2] == (posix_ipc.O_CREX,):
                self.at -= 1
                if self.at == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return create(*args, **kwargs)

        return counted

    def tries(self, session_id: str, create, unchanged=lambda: None):
        """Fail the first object of `create`, the second, ... until it succeeds: how often it was tried, and what it gave."""
        before, tried = owner.objects(session_id), 0
        while True:
            tried += 1
            self.at = tried
            try:
                return tried, create()
            except PlanError as error:
                assert re.search(r"/dev/shm has .* MiB free.*--shm-size", str(error))
                assert owner.objects(session_id) == before
                unchanged()


def test_a_generation_that_cannot_be_created_changes_nothing_and_the_next_one_works(it, monkeypatch):
    """Whichever of its objects is the first without room: lanes and doorbells, then reply memory and the head."""
    full, session = FullShm(monkeypatch), it.owner
    offer = Offer(OFFER.outputs, "m", head=HeadSpec("float32", 8, 4))
    teacher = TeacherSession(it.token)

    def unchanged() -> None:
        assert (session.generation, len(session.lanes), session.control.words[layout.ControlWord.LANES]) == (1, 1, 1)
        teacher.attach(1)
        assert teacher.lanes
        session.ring_all()

    tried, token = full.tries(session.session_id, lambda: session.start_generation(3), unchanged)
    assert tried == 1 + 3 * (1 + 2)
    assert [RankSession(token, lane).lane.index for lane in range(3)] == [0, 1, 2]
    tried, _ = full.tries(session.session_id, lambda: session.create_replies(offer))
    assert tried == 1 + 2 * (1 + 3)
    full.at = 0
    session.start_generation(1)
    session.create_replies(offer)


# A teacher and its generations


@pytest.fixture
def teacher(it):
    """One whose replies have memory."""
    made = TeacherSession(it.token)
    made.publish(OFFER)
    it.owner.create_replies(OFFER)
    return made


def test_a_generation_that_ends_while_a_teacher_attaches_to_it_is_skipped(it, teacher, monkeypatch):
    attach = Lane.attach

    def late(token, shape, index):
        if token.generation == 1:
            it.owner.end_training()
            it.owner.start_generation(2)
            it.owner.create_replies(OFFER)
        return attach(token, shape, index)

    monkeypatch.setattr(Lane, "attach", late)
    assert teacher.next_generation()
    assert (teacher.generation, len(teacher.lanes)) == (2, 2)
    teacher.leave()
    assert teacher._to_be_served() is None, "it would attach to the same generation again"


def test_a_generation_whose_lanes_are_gone_is_an_error_while_it_is_current(it, teacher):
    os.unlink(shm(it.owner.names.lane(1, 0)))
    with pytest.raises(AttachError, match="lane0"):
        teacher.next_generation()


def test_an_offer_that_is_larger_than_its_field_is_refused(it):
    with pytest.raises(PlanError, match=r"at most 16384 fit"):
        TeacherSession(it.token).publish(Offer((), "m" * 16384))
