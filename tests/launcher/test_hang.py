"""The hang report: who is named in snapshots of every kind, and of real processes that are stopped, busy, dead, or in
a collective."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from launcher.hang import rules, snapshot
from launcher.hang import stacks as hang_stacks
from launcher.hang.report import Report, make, write
from launcher.hang.snapshot import LaneState, Participant, Snapshot
from launcher.hang.stacks import Stacks
from launcher.process import shim
from shmbridge.rank.bridge import Bridge
from shmbridge.shm import process
from shmbridge.shm.heartbeat import Heartbeat
from shmbridge.shm.participant_record import Phase
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher.main import serve
from tests.harness import Bench, Child, Echo, bench, until

IDS = torch.ones((1, 4), dtype=torch.int64)
C10D = "/venv/lib/python3.11/site-packages/torch/distributed"


@pytest.fixture
def hasty(monkeypatch):
    """A second's standstill is one, and so is a heartbeat that has been missed twice."""
    monkeypatch.setattr(snapshot, "STILL_S", 0.2)
    monkeypatch.setattr(rules, "STALE_S", 2.5)


# Of snapshots that are made up


def at(*frames: str) -> Stacks:
    """Stacks whose main thread is at `FILE:LINE function`, the innermost first."""
    lines = ["Current thread 0x01 (most recent call first):"]
    for frame in frames:
        where, function = frame.split(" ")
        lines.append('  File "{}", line {} in {}'.format(*where.rsplit(":", 1), function))
    return hang_stacks.parse("\n".join(lines))


BARRIER = at(
    f"{C10D}/distributed_c10d.py:5356 barrier", f"{C10D}/c10d_logger.py:83 wrapper", "/u/checkpoint.py:41 save"
)
REDUCE = at(f"{C10D}/distributed_c10d.py:3252 all_reduce", f"{C10D}/c10d_logger.py:83 wrapper", "/u/train.py:88 step")
READING = at("/u/data.py:8 tokenise", "/u/train.py:80 main")


def teacher(phase="collecting", rank=0, who="teacher", **more) -> Participant:
    values = {"pid": 10 + rank, "process": "sleeping", "phase_s": 41.0, "still_s": 41.0} | more
    return Participant(role="teacher", rank=rank, who=who, phase=phase, **values)


def trainer(rank, phase="training", stacks=REDUCE, **more) -> Participant:
    values = {"pid": 100 + rank, "process": "sleeping", "phase_s": 41.0, "still_s": 41.0, "heartbeat_s": 0.5} | more
    return Participant(role="trainer", rank=rank, who=f"rank {rank}", phase=phase, stacks=stacks, **values)


def waiter(rank, **more) -> Participant:
    return trainer(rank, "waiting", at(), **more)


def lane(rank, **more) -> LaneState:
    """One with a request that is not answered."""
    return LaneState(rank=rank, **{"requested": 8, "replied": 7, "released": 7, "oldest_s": 41.0} | more)


def idle(rank) -> LaneState:
    return LaneState(rank=rank, requested=7, replied=7, released=7)


def seen(*participants: Participant, lanes=(), **more) -> Snapshot:
    ranks = [participant for participant in participants if participant.role == "trainer"]
    lanes = lanes or [idle(rank.rank) for rank in ranks]
    values = {"session_id": "ab" * 16, "generation": 1, "launcher_pid": 1} | more
    return Snapshot(participants=participants, lanes=tuple(lanes), **values)


EVAL = {"declared": "eval", "declared_left_s": 859.0}
EVAL_OVER = {"declared": "eval", "declared_left_s": -5.0}
CHUNKS = {"chunks": 3, "streamed": 5, "consumed": 2}  # all are full
ASLEEP = {"attached": False, "pid": 0, "process": "", "phase": "absent", "still_s": 0.0}
LATE = {"ready": False, "done": 3, "total": 4}
LOADER = at("/x/torch/utils/data/dataloader.py:9 _try_get_data", "/u/train.py:5 main")
TWO = (teacher("collecting", 0, "teacher 0"), teacher("forward", 1, "teacher 1"))
KEPT = {"kept": True, "over": True}


def case(name, found, *scene, has="", **more):
    """`found`: the kind of what is found, and who is named. `has`: words that the report has, between two bars."""
    return pytest.param(seen(*scene, **more), *found.split(": "), has.split(" | "), id=name)


SCENES = [
    case(
        *("lockstep waits for a rank in a barrier", "lockstep: rank 2", teacher()),
        *(waiter(0), waiter(1), trainer(2, stacks=BARRIER), waiter(3)),
        lanes=[lane(0), lane(1), idle(2), lane(3)],
        lockstep=True,
        has="at barrier() in save (checkpoint.py:41) for 41.0 s | waiting: ranks 0-1,3",
    ),
    case("lockstep, nobody asks", "standstill: rank 0, rank 1", teacher(), trainer(0), trainer(1), lockstep=True),
    case(
        *("alone at a collective", "standstill: rank 2", teacher()),
        *(trainer(i, stacks=BARRIER if i == 2 else REDUCE) for i in range(4)),
        has="is at barrier() | ranks 0-1,3 are at all_reduce() in step (train.py:88)",
    ),
    case(
        *("at no collective, of two", "standstill: rank 1", teacher(), trainer(0), trainer(1, stacks=READING)),
        has="is in tokenise (data.py:8) for 41.0 s",
    ),
    case(
        *("at no collective, of four", "standstill: rank 1", teacher()),
        *(trainer(i, stacks=READING if i == 1 else REDUCE) for i in range(4)),
    ),
    case(
        *("at two collectives", "standstill: rank 0, rank 1", teacher(), trainer(0, stacks=BARRIER), trainer(1)),
        has="Every rank must call a collective",
    ),
    case(
        *("at one collective", "standstill: rank 0, rank 1", teacher(), trainer(0), trainer(1)),
        has="No rank is missing",
    ),
    case(
        *("at a collective without one that has closed", "standstill: rank 0", teacher(), trainer(0)),
        trainer(1, "closed"),
        has="Every rank must call a collective",
    ),
    case(
        *("a stopped rank", "stopped: rank 0", teacher(), trainer(0, process="stopped"), trainer(1)),
        has="(pid 100) is stopped, not dead | waiting: rank 1 | kill -CONT 100",
    ),
    case(
        *("a stopped teacher", "stopped: teacher", teacher("forward", process="stopped"), waiter(0)),
        lanes=[lane(0)],
        has="waiting: rank 0",
    ),
    case(
        *("two stopped ranks", "stopped: rank 0, rank 1", teacher()),
        *(trainer(i, process="stopped") for i in range(2)),
        has="kill -CONT 100 | kill -CONT 101",
    ),
    case(
        *("a stopped rank that has not attached", "stopped: rank 1", teacher(), trainer(0)),
        trainer(1, attached=False, process="stopped"),
    ),
    case(
        *("a stale heartbeat", "stalled: rank 0", teacher()),
        *(trainer(0, stacks=READING, process="running", heartbeat_s=41.0), trainer(1)),
        has="has not run Python for 41.0 s, in tokenise (data.py:8): native code holds the GIL;",
    ),
    case(
        *("a stale heartbeat in a declared phase", "standstill: rank 0", teacher()),
        *(trainer(0, stacks=READING, heartbeat_s=41.0, **EVAL), trainer(1)),
    ),
    case(
        *("a dead rank", "dead: rank 1", teacher(), trainer(0), trainer(1, process="gone")),
        has="pid 101 | in phase training",
    ),
    case("a zombie", "dead: rank 1", teacher(), trainer(0), trainer(1, process="zombie")),
    case("an end after closing", "standstill: rank 0", teacher(), trainer(0), trainer(1, "closed", process="gone")),
    case(
        *("a forward", "reply: teacher", teacher("forward", stacks=at("/u/model.py:12 forward")), waiter(0)),
        lanes=[lane(0)],
        has="in phase forward, in forward (model.py:12) for 41.0 s | sequence 7 | max_batch_tokens",
    ),
    case(
        *("a request that is not taken, of a full ring, given up", "reply: teacher", teacher(), waiter(0)),
        lanes=[lane(0, requested=9, abandoned=8)],
        has="all slots in use | given up | in phase collecting | keep this report",
    ),
    case(
        *("the second of two teachers", "reply: teacher 1", *TWO, waiter(0), waiter(1)),
        lanes=[idle(0), lane(1, teacher=1)],
    ),
    case(
        *("a young request beside a rank that stands still", "standstill: rank 0", teacher()),
        *(waiter(0, still_s=0.1), trainer(1, stacks=BARRIER)),
        lanes=[lane(0, oldest_s=0.1), idle(1)],
    ),
    case(
        *("a stream that nobody reads", "unread: rank 0", teacher(), trainer(0, stacks=READING)),
        lanes=[lane(0, **CHUNKS)],
        has="in tokenise (data.py:8)",
    ),
    case("a full stream whose rank waits", "reply: teacher", teacher(), waiter(0), lanes=[lane(0, **CHUNKS)]),
    case(
        *("a teacher that loads", "loading: teacher", teacher("loading", **LATE), trainer(0, "barrier", at())),
        has="in phase loading 3/4; waiting: rank 0",
    ),
    case(
        *("a teacher that has not attached", "loading: teacher", teacher(ready=False, **ASLEEP)),
        trainer(0, "barrier", at()),
        has="not attached",
    ),
    case("a kept teacher that loads", "loading: teacher", teacher("loading", **LATE), **KEPT),
    case("a kept teacher that drains", "draining: teacher", teacher("forward"), **KEPT, has="in phase forward"),
    case("a kept teacher that idles", "closed: ", teacher("idle"), **KEPT),
    case(
        *("a missing rank", "missing: rank 1", teacher(), trainer(0)),
        trainer(1, attached=False, stacks=READING),
        has="pid 101, in tokenise (data.py:8) | rank 0 is at all_reduce()",
    ),
    case("no rank", "missing: rank 0, rank 1", teacher(), *(trainer(i, stacks=at(), **ASLEEP) for i in range(2))),
    case("nobody at all", "closed: ", teacher(ready=False, **ASLEEP), trainer(0, stacks=at(), **ASLEEP)),
    case(
        *("a declared phase", "standstill: rank 0", teacher(), trainer(0, stacks=READING, **EVAL), trainer(1)),
        has="training: eval (14 min 19 s left), in tokenise | Nothing, while",
    ),
    case(
        *("a declared phase that is over", "standstill: rank 0", teacher(), trainer(1)),
        trainer(0, stacks=READING, **EVAL_OVER),
        has="eval (5.0 s over) | Every rank must call a collective",
    ),
    case(
        *("a declared phase under lockstep", "lockstep: rank 1", teacher(), waiter(0), trainer(1, **EVAL)),
        lanes=[lane(0), idle(1)],
        lockstep=True,
        has="Nothing, while",
    ),
    case(
        *("what is excused comes last", "reply: teacher 1", *TWO, waiter(0), trainer(1, **EVAL), waiter(2)),
        lanes=[lane(0), idle(1), lane(2, teacher=1)],
        lockstep=True,
    ),
    case("a loop that moves", "moving: ", teacher(), trainer(0, still_s=0.2), trainer(1, still_s=2.0), has="2.0 s"),
    case("a DataLoader", "standstill: rank 0", teacher(), trainer(0, stacks=LOADER), has="waiting for its DataLoader"),
    case("garbled cursors", "garbled: rank 0", teacher(), trainer(0), lanes=[lane(0, garbled="x")]),
]


@pytest.mark.parametrize(("snapshot", "kind", "who", "words"), SCENES)
def test_who_is_waited_for(snapshot, kind, who, words):
    first, *also = found = rules.verdict(snapshot)
    assert {finding.kind for finding in found} == {kind}
    assert ", ".join(name for finding in found for name in finding.suspects) == who
    text = " ".join(str(Report("12:00:00", "a test asks", "", "run", first, snapshot, also)).split())
    assert text.startswith("report" if kind in rules.HEALTHY else "hang report")
    assert all(word in text for word in words)


@pytest.mark.parametrize(
    ("snapshot", "timed"),
    [
        (seen(teacher(), waiter(0, process="gone"), lanes=[lane(0)]), []),
        (seen(teacher("loading", heartbeat_s=41.0, **LATE)), [("stalled", "startup_s", False)]),
        (
            seen(teacher(), trainer(0, **EVAL), trainer(1, stacks=at(), **ASLEEP)),
            [("missing", "report_s", True), ("standstill", "report_s", True)],
        ),
        (
            seen(teacher(), trainer(0, "closed"), trainer(1), lanes=[lane(0, closed=True), idle(1)]),
            [("standstill", "report_s", False)],
        ),
        (seen(teacher(), trainer(0), lanes=[lane(0, **CHUNKS)]), [("unread", "report_s", False)]),
        (
            seen(teacher(), waiter(0), trainer(1, stacks=at(), **ASLEEP), lanes=[lane(0), idle(1)], lockstep=True),
            [("missing", "report_s", False)],
        ),
    ],
    ids=[
        "a dead rank's request",
        "the GIL while loading",
        "a missing rank in another's evaluation",
        "a closed lane",
        "an unread stream",
        "a missing rank under lockstep",
    ],
)
def test_what_is_timed(snapshot, timed):
    """The kind, the timeout, and whether the time stands still."""
    found = [finding for finding in rules.find(snapshot) if finding.report_after]
    assert [(finding.kind, finding.report_after, finding.excused) for finding in found] == timed


# Where a stack stands


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (
            "distributed_c10d.py all_gather < c10d_logger.py wrapper < distributed_c10d.py all_gather_object",
            "at all_gather_object()",
        ),
        (
            "distributed_c10d.py _store_based_barrier < distributed_c10d.py init_process_group",
            "at init_process_group()",
        ),
        ("distributed_c10d.py monitored_barrier", "at monitored_barrier()"),
        ("_functional_collectives.py wait_tensor < tensor/_dispatch.py dispatch", "at wait_tensor()"),
        (
            "distributed_c10d.py all_gather_into_tensor < fsdp/_flat_param.py _gather",
            "at all_gather_into_tensor() of FSDP",
        ),
        ("fsdp/_fully_shard/_fsdp_param_group.py wait_for_unshard", "at wait_for_unshard() of FSDP"),
        ("../cuda/__init__.py synchronize", "at torch.cuda.synchronize(), which waits for the GPU,"),
        ("../autograd/graph.py _engine_run_backward", "at backward()"),
    ],
)
def test_a_collective_is_recognised(frames, told):
    pairs = (frame.split() for frame in frames.split(" < "))
    named = [f"{os.path.normpath(f'{C10D}/{file}')}:1 {function}" for file, function in pairs]
    assert at(*named, "/u/train.py:5 main").place.text == f"{told} in main (train.py:5)"


@pytest.mark.parametrize(
    ("code", "told"),
    [("work.wait()", "at wait()"), ("x = loss.item()", "at .item(), which waits for the GPU,"), ("pass", "")],
)
def test_calls_that_leave_no_frame_are_read_from_the_source(tmp_path, code, told):
    file = tmp_path / "train.py"
    file.write_text(f"def main():\n    {code}\n")
    assert at(f"{file}:2 main").place.text == f"{told} in main (train.py:2)".strip()


# Of real processes


class Scene:
    """A session whose teacher and ranks have heartbeats and stacks, as the launcher starts them."""

    def __init__(self, on: Bench, run: Path) -> None:
        self.bench = on
        self.owner = on.owner
        self.run = run
        run.mkdir()
        on.owner.describe(msgspec.structs.replace(on.settings, run_dir=str(run)))

    def teacher(self) -> Child:
        """One that has opened the barrier."""
        self.bench._teach = self._teach
        child = self.bench.teacher(Echo())
        until(lambda: self.owner.control.teachers[0].ready, "the teacher")
        return child

    def _teach(self, forward) -> None:
        torch.set_num_threads(1)
        session = TeacherSession(self.bench.token)
        process.write_stacks_on_signal(self.run)
        Heartbeat(session.record)
        serve(session, forward, torch.device("cpu"))

    def rank(self, lane: int, body: Callable[[Bridge], object]) -> Child:
        """One that is past the barrier when `body` begins."""

        def train() -> None:
            session = RankSession(self.bench.token, lane)
            process.write_stacks_on_signal(self.run)
            Heartbeat(session.record)
            with Bridge(session) as bridge:
                bridge.wait_ready()
                body(bridge)

        return self.bench.start(train)

    def report(self) -> Report:
        return write(make(self.owner, self.run, "a test asks"), self.run)

    def stands(self, kind: str) -> Report:
        """The report, once its first finding is of this kind: who has just moved stands still a little later."""

        def found() -> Report | None:
            made = make(self.owner, self.run, "a test asks")
            return made if made.verdict.kind == kind else None

        return until(found, f"the finding {kind!r}")


@contextmanager
def scene(tmp_path: Path, lanes: int = 1, *overrides: str) -> Iterator[Scene]:
    with bench(lanes, *overrides) as on:
        yield Scene(on, tmp_path / "run")


def sleep() -> None:
    time.sleep(600)


def stands(report: Report, who: str, function, lines=1) -> str:
    """Where `who` is, in so many lines below the first of `function`, without the file."""
    (found,) = [one for one in report.snapshot.participants if one.who == who]
    told, _, at = found.stacks.place.text.rpartition(" ")
    assert at == f"(test_hang.py:{function.__code__.co_firstlineno + lines})"
    return told


def test_a_rank_that_sits_in_a_barrier_is_named_with_every_stack(tmp_path, hasty):
    """With torch's own barrier."""
    with scene(tmp_path, 3, "teacher.collect=lockstep") as on:
        on.teacher()

        def save():
            dist.barrier()

        def body(bridge):
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=bridge.rank, world_size=3)
            if bridge.rank == 2:
                save()
            bridge.exchange(IDS, step=41)

        for rank in range(3):
            on.rank(rank, body)
        until(
            lambda: all(on.owner.lanes[i].records[0].phase is Phase.WAITING for i in (0, 1)),
            "ranks 0 and 1 in their wait",
        )
        until(lambda: "barrier()" in on.stands("lockstep").verdict.sentence, "rank 2 at the barrier")
        report = on.report()
        assert report.verdict.suspects == ("rank 2",)
        assert stands(report, "rank 2", save) == "at barrier() in save"
        text = (on.run / "hang-1.txt").read_text()
        assert text == f"{report}\n"
        order = [
            "rank 2 is at barrier()",
            "next ",
            "> rank 2",
            "oldest unanswered",
            "\nrank 2, pid",
            "dist.barrier()",
            "\nteacher, pid",
            "ranks 0-1, pid",
        ]
        assert sorted(order, key=text.index) == order
        assert all(one.stacks.source == "faulthandler" for one in report.snapshot.participants)
        assert msgspec.json.decode((on.run / "hang-1.json").read_bytes(), type=Report) == report
        assert Path(on.report().path).name == "hang-2.txt"


def test_a_stopped_rank_is_not_dead_and_goes_on(tmp_path, monkeypatch):
    """Its environment is not in the report."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no py-spy
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_a_test")
    with scene(tmp_path) as on:
        on.teacher()
        gate = tmp_path / "gate"
        child = on.rank(0, lambda bridge: until(gate.exists, "the gate"))
        until(lambda: on.owner.lanes[0].records[0].phase is Phase.TRAINING, "the rank in its loop")
        child.kill(signal.SIGSTOP)
        until(lambda: process.state(child.pid) == "stopped", "the stop")
        report = on.report()
        assert report.verdict.kind == "stopped"
        stopped = report.snapshot.ranks[0]
        assert stopped.stacks.missing == "stopped: its interpreter cannot answer; py-spy is not installed"
        assert "no stack: stopped" in str(report)
        kept = [file.read_text() for file in on.run.glob("hang-1.*")]
        assert len(kept) == 2 and not any("hf_secret" in text for text in kept)
        assert report.snapshot.teachers[0].stacks.threads
        child.kill(signal.SIGCONT)
        gate.touch()
        assert child.join() == 0


def test_a_rank_that_holds_the_gil_tells_its_stack(tmp_path, hasty):
    """Its heartbeat is stale, and faulthandler answers all the same."""
    with scene(tmp_path, 1) as on:
        on.teacher()

        def count():
            sum(itertools.repeat(0))

        on.rank(0, lambda bridge: count())
        report = on.stands("stalled")
        assert report.verdict.suspects == ("rank 0",)
        assert stands(report, "rank 0", count) == "in count"


def test_being_asked_for_stacks_disturbs_nobody(tmp_path):
    """In a blocking read, in a sleep, and between them."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with scene(tmp_path) as on:
        on.teacher()

        def body(bridge):
            slept = time.monotonic()
            time.sleep(1.0)
            assert time.monotonic() - slept >= 1.0
            assert fifo.read_bytes() == b"on"

        child = on.rank(0, body)
        until(lambda: on.owner.lanes[0].records[0].phase is Phase.TRAINING, "the rank in its loop")
        for _ in range(5):
            assert on.report().snapshot.ranks[0].stacks.threads
        until(lambda: "read_bytes" in str(on.report()), "the rank at the fifo")
        fifo.write_bytes(b"on")
        assert child.join() == 0


# Stacks


@contextmanager
def running(*bodies: Callable[[], object]) -> Iterator[list[Child]]:
    children = [Child(body) for body in bodies]
    try:
        yield children
    finally:
        for child in children:
            child.end()


def ready(run: Path, child: Child) -> process.Identity:
    until(lambda: hang_stacks._cannot_answer(child.pid, run) == "", "a process that listens")
    found = process.identity(child.pid)
    assert found
    return found


def test_eight_processes_of_which_one_is_stopped_take_a_few_seconds(tmp_path):
    def listens() -> None:
        process.write_stacks_on_signal(tmp_path)
        sleep()

    with running(*[listens] * 8) as children:
        who = [ready(tmp_path, child) for child in children]
        children[3].kill(signal.SIGSTOP)
        until(lambda: process.state(children[3].pid) == "stopped", "the stop")
        began = time.monotonic()
        found = [hang_stacks.collect(who, tmp_path)[one.pid].threads for one in who]
        assert time.monotonic() - began < 10
        assert [bool(threads) for threads in found] == [i != 3 for i in range(8)]
        assert all("listens" in [f.function for f in threads[0].frames] for threads in found if threads)


def test_a_process_that_does_not_listen_is_left_alone(tmp_path):
    """The signal's default action would end it."""
    with running(sleep) as (child,):
        who = process.identity(child.pid)
        process.stacks_path(tmp_path, child.pid).parent.mkdir()
        process.stacks_path(tmp_path, child.pid).touch()  # of an earlier process with this pid
        assert "has not connected to the bridge" in hang_stacks.collect([who], tmp_path)[child.pid].missing
        assert child.poll() is None


def test_a_pid_that_is_another_process_by_now_is_not_signalled(tmp_path):
    with running(lambda: (process.write_stacks_on_signal(tmp_path), sleep())) as (child,):
        who = ready(tmp_path, child)
        found = hang_stacks.collect([who._replace(start=who.start - 1)], tmp_path)
        assert found[child.pid].missing == "the process has ended"
        assert process.stacks_path(tmp_path, child.pid).read_text() == ""


def test_py_spy_reads_what_cannot_answer(tmp_path, monkeypatch):
    spy(tmp_path, monkeypatch, f"echo '{json.dumps(DUMPED)}'")
    with running(sleep) as (child,):
        found = hang_stacks.collect([process.identity(child.pid)], None)[child.pid]
        assert found.source == "py-spy"
        assert found.place.text == "at barrier() in save (checkpoint.py:41)"
        assert [thread.name for thread in found.threads] == ["main thread", "loader"]


@pytest.mark.parametrize(
    ("script", "told"),
    [("echo 'no permission' >&2; exit 1", "py-spy: no permission"), ("exec sleep 600", "py-spy did not answer")],
)
def test_a_py_spy_that_fails_is_told(tmp_path, monkeypatch, script, told):
    spy(tmp_path, monkeypatch, script)
    monkeypatch.setattr(hang_stacks, "PATIENCE_S", 0.5)
    with running(sleep) as (child,):
        assert told in hang_stacks.collect([process.identity(child.pid)], None)[child.pid].missing


DUMPED = [
    {"pid": 7, "os_thread_id": 8, "thread_name": "loader", "frames": []},
    {
        "pid": 7,
        "os_thread_id": 7,
        "thread_name": "MainThread",
        "frames": [
            {"name": "barrier", "filename": f"{C10D}/distributed_c10d.py", "line": 9},
            {"name": "save", "filename": "/u/checkpoint.py", "line": 41},
        ],
    },
]


def spy(tmp_path, monkeypatch, script):
    tool = tmp_path / "py-spy"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_has_not_attached_is_found_by_its_environment(tmp_path, ranks):
    """Whoever started it: this session's launcher, or that of a group beside a kept teacher. Its workers are no
    ranks, nor is a teacher, nor a rank of another session."""
    worker = "import subprocess, sys; subprocess.Popen(['sleep', '600']); sys.stdin.read()"

    def started(token: str, *variables: str) -> subprocess.Popen:
        environment = {**os.environ, "SHMBRIDGE_SESSION": token, **dict(one.split("=") for one in variables)}
        command = [sys.executable, "-c", worker]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)

    with scene(tmp_path, ranks) as on:
        token = str(on.bench.token)
        mine = [started(token, f"LOCAL_RANK={rank}") for rank in reversed(range(ranks))][::-1]
        others = [started(token), started(f"{'0' * 32}@1", "LOCAL_RANK=0")]
        try:
            pids = [one.pid for one in mine]
            until(lambda: len(shim.descendants(os.getpid())) == 2 * len(mine + others), "every worker")
            assert [one.pid for one in snapshot.look(on.owner).ranks] == pids
            assert {who.pid for who in snapshot.identities(on.owner)} == set(pids)
        finally:
            for pid in shim.descendants(os.getpid()):
                os.kill(pid, signal.SIGKILL)
            for one in mine + others:
                one.communicate()


def test_where_reports_are_wanted_early_a_short_standstill_is_one(tmp_path):
    with scene(tmp_path, 1, "timeouts.report_s=0.4") as on:
        on.teacher()
        on.rank(0, lambda bridge: sleep())
        report = on.stands("standstill")
        assert report.snapshot.ranks[0].still_s < snapshot.STILL_S
