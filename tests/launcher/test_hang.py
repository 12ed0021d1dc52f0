"""The hang report: its verdict on facts of every kind, and on real processes that are stopped, busy, dead, or in a collective."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch.distributed as dist

from launcher.hang import places, rules, snapshot
from launcher.hang import stacks as hang_stacks
from launcher.hang.report import Report
from launcher.hang.snapshot import Facts, LaneState, Participant
from launcher.hang.stacks import Stacks
from launcher.process import shim
from shmbridge.shm import process, stacks
from tests.harness import Child, Echo, until
from tests.launcher.scene import IDS, scene

C10D = "/venv/lib/python3.11/site-packages/torch/distributed"


@pytest.fixture
def hasty(monkeypatch):
    """A second's standstill is one, and so is a heartbeat that has been missed twice."""
    monkeypatch.setattr(rules, "STILL_S", 0.2)
    monkeypatch.setattr(rules, "STALE_S", 2.5)


# The verdict, of facts


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


def lane(rank, asked=True, **more) -> LaneState:
    values = {"requested": 7 + asked, "replied": 7, "released": 7, "oldest_s": 41.0 if asked else None} | more
    return LaneState(rank=rank, **values)


def of(*participants: Participant, lanes=(), lockstep=False) -> rules.Verdict:
    made = Facts(
        session_id="ab" * 16,
        generation=1,
        launcher_pid=1,
        participants=participants,
        lanes=tuple(lanes) or tuple(lane(one.rank, asked=False) for one in participants if one.role == "trainer"),
        lockstep=lockstep,
    )
    found = rules.of(made)
    assert Report("12:00:00", "a test asks", "", "run", found, made).facts is made
    return found


def test_the_rank_that_lockstep_waits_for_is_named_with_its_collective():
    ranks = [trainer(i, "waiting") for i in (0, 1, 3)]
    found = of(
        teacher(),
        *ranks[:2],
        trainer(2, stacks=BARRIER),
        ranks[2],
        lanes=[lane(i, i != 2) for i in range(4)],
        lockstep=True,
    )
    assert found.sentence == (
        "rank 2 is at barrier() in save (checkpoint.py:41) for 41.0 s; ranks 0, 1 and 3 wait for the teacher, the teacher "
        "waits for rank 2's request (teacher.collect is lockstep)"
    )
    assert found.suspects == ("rank 2",)


def test_a_rank_alone_at_a_collective_is_the_suspect():
    ranks = [trainer(i, stacks=BARRIER if i == 2 else REDUCE) for i in range(4)]
    found = of(teacher(), *ranks)
    assert found.suspects == ("rank 2",)
    assert found.sentence == (
        "rank 2 is at barrier() in save (checkpoint.py:41) for 41.0 s, alone; ranks 0, 1 and 3 are at all_reduce() in step "
        "(train.py:88) for 41.0 s"
    )


@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_that_the_others_wait_for_in_a_collective_is_the_suspect(count):
    found = of(teacher(), *[trainer(i, stacks=READING if i == 1 else REDUCE) for i in range(count)])
    assert found.suspects == ("rank 1",)
    assert found.sentence.startswith("rank 1 is in tokenise (data.py:8) for 41.0 s; rank")
    assert found.sentence.endswith(
        "at all_reduce() in step (train.py:88) and wait for it" if count == 4 else "and waits for it"
    )


def test_two_ranks_at_different_collectives_are_both_suspects():
    found = of(teacher(), trainer(0, stacks=BARRIER), trainer(1))
    assert found.suspects == ("rank 0", "rank 1")
    assert found.sentence.startswith("the ranks wait for each other: rank 0 is at barrier()")


def test_all_ranks_at_one_collective_miss_nobody():
    found = of(teacher(), trainer(0), trainer(1))
    assert found.sentence.startswith("the collective does not end: ranks 0 and 1 are at all_reduce()")


def test_a_stopped_process_comes_before_what_its_loop_does():
    found = of(teacher(), trainer(0, process="stopped"), trainer(1))
    assert found.kind == "stopped"
    assert "rank 0 (pid 100) is stopped, not dead" in found.sentence
    assert "rank 1 waits for it" in found.sentence
    assert "kill -CONT 100" in found.action


def test_a_stopped_teacher_is_waited_for_by_its_ranks():
    found = of(teacher("forward", process="stopped"), trainer(0, "waiting"), lanes=[lane(0)])
    assert found.sentence.startswith("the teacher (pid 10) is stopped, not dead")
    assert found.sentence.endswith("; rank 0 waits for it")


def test_a_stale_heartbeat_is_a_stall():
    found = of(teacher(), trainer(0, stacks=READING, process="running", heartbeat_s=41.0), trainer(1))
    assert found.kind == "stalled"
    assert found.sentence.startswith(
        "rank 0 has not run Python for 41.0 s, in tokenise (data.py:8): native code holds the GIL;"
    )


@pytest.mark.parametrize("process", ["gone", "zombie"])
def test_a_dead_process_that_has_not_closed_is_told(process):
    found = of(teacher(), trainer(0), trainer(1, process=process))
    assert found.sentence == "rank 1 is dead: pid 101 ended without closing the bridge, in phase training"
    assert of(teacher(), trainer(0), trainer(1, "closed", process=process)).kind != "dead"


def test_a_teacher_in_its_forward_is_slow_and_not_blamed_for_more():
    found = of(teacher("forward", stacks=at("/u/model.py:12 forward")), trainer(0, "waiting"), lanes=[lane(0)])
    assert found.sentence == (
        "the teacher is alive and in its forward for 41.0 s, in forward (model.py:12); rank 0 waits for a reply for 41.0 s "
        "(sequence 7)"
    )


def test_a_teacher_that_loads_is_told_with_its_progress():
    found = of(teacher("loading", ready=False, done=3, total=4), trainer(0, "barrier"))
    assert found.sentence.startswith("the teacher is not ready: in phase loading (3 of 4) for 41.0 s")
    assert found.sentence.endswith("; rank 0 waits for it")


def test_a_rank_that_has_not_attached_is_named():
    found = of(teacher(), trainer(0), trainer(1, attached=False, stacks=READING))
    assert found.sentence == (
        "rank 1 (pid 101, in tokenise (data.py:8)) has not attached to the session; rank 0 is at all_reduce() in step "
        "(train.py:88) for 41.0 s"
    )
    assert found.suspects == ("rank 1",)


def test_a_full_ring_and_abandoned_requests_are_told():
    found = of(teacher(), trainer(0, "waiting"), lanes=[lane(0, requested=9, abandoned=8, oldest_s=41.0)])
    assert "(sequence 7, ring full of rank 0, abandoned by rank 0)" in found.sentence
    assert "the teacher is in phase collecting" in found.sentence


def test_a_streamed_reply_that_nobody_reads_is_the_ranks():
    found = of(teacher(), trainer(0, stacks=READING), lanes=[lane(0, chunks=3, streamed=5, consumed=2)])
    assert found.sentence.startswith("rank 0 does not read what the teacher streams")


def test_a_declared_phase_is_named_and_excuses():
    ranks = [trainer(0, stacks=READING, declared="eval", declared_left_s=859.0), trainer(1)]
    found = of(teacher(), *ranks)
    assert "rank 0 is in its declared phase eval (14 min 19 s left), in tokenise" in found.sentence
    assert found.action == "Nothing, while rank 0 keeps to what it has declared."
    over = of(teacher(), trainer(0, stacks=READING, declared="eval", declared_left_s=-5.0), trainer(1))
    assert "eval (5.0 s over)" in over.sentence
    assert "Nothing" not in over.action


def test_what_moves_does_not_hang():
    found = of(teacher(), trainer(0, still_s=0.2), trainer(1, still_s=2.0))
    assert found.sentence == "nothing hangs: every rank has moved within the last 2.0 s"


def test_a_rank_that_waits_for_its_loader_is_told():
    loader = at(
        "/lib/python3.11/queue.py:180 get", "/x/torch/utils/data/dataloader.py:9 _try_get_data", "/u/train.py:5 main"
    )
    found = of(teacher(), trainer(0, stacks=loader))
    assert (
        found.sentence
        == "nobody waits for the bridge: rank 0 is waiting for its DataLoader in main (train.py:5) for 41.0 s"
    )


def test_garbled_cursors_are_told():
    assert "rank 0's lane is garbled" in of(teacher(), trainer(0), lanes=[lane(0, garbled="the cursors")]).sentence


# Where a stack stands


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (
            [
                f"{C10D}/distributed_c10d.py:1 all_gather",
                f"{C10D}/c10d_logger.py:2 wrapper",
                f"{C10D}/distributed_c10d.py:3 all_gather_object",
            ],
            "at all_gather_object()",
        ),
        (
            [f"{C10D}/distributed_c10d.py:1 _store_based_barrier", f"{C10D}/distributed_c10d.py:2 init_process_group"],
            "at init_process_group()",
        ),
        ([f"{C10D}/distributed_c10d.py:1 monitored_barrier"], "at monitored_barrier()"),
        ([f"{C10D}/distributed_c10d.py:1 reduce_scatter_tensor"], "at reduce_scatter_tensor()"),
        ([f"{C10D}/distributed_c10d.py:1 broadcast"], "at broadcast()"),
        (
            [
                f"{C10D}/distributed_c10d.py:1 all_gather_into_tensor",
                f"{C10D}/fsdp/_flat_param.py:2 _all_gather_flat_param",
            ],
            "at all_gather_into_tensor() of FSDP",
        ),
        ([f"{C10D}/fsdp/_fully_shard/_fsdp_param_group.py:2 wait_for_unshard"], "at wait_for_unshard() of FSDP"),
        (
            ["/x/site-packages/torch/cuda/__init__.py:9 synchronize"],
            "at torch.cuda.synchronize(), which waits for the GPU,",
        ),
        (["/x/site-packages/torch/autograd/graph.py:9 _engine_run_backward"], "at backward()"),
    ],
)
def test_a_collective_is_recognised(frames, told):
    assert str(places.of(at(*frames, "/u/train.py:5 main"))) == f"{told} in main (train.py:5)"


@pytest.mark.parametrize(
    ("code", "told"),
    [("work.wait()", "at wait()"), ("x = loss.item()", "at .item(), which waits for the GPU,"), ("pass", "")],
)
def test_calls_that_leave_no_frame_are_read_from_the_source(tmp_path, code, told):
    file = tmp_path / "train.py"
    file.write_text(f"def main():\n    {code}\n")
    assert str(places.of(at(f"{file}:2 main"))) == f"{told} in main (train.py:2)".strip()


# Of real processes


def test_a_rank_that_sits_in_a_barrier_is_named_with_every_stack(tmp_path, hasty):
    """With torch's own barrier."""
    with scene(tmp_path, 3, "teacher.collect=lockstep") as on:
        on.teacher()

        def save():
            dist.barrier()

        def body(bridge):
            on.join_group(bridge.rank)
            if bridge.rank == 2:
                save()
            bridge.exchange(IDS, step=41)

        for rank in range(3):
            on.rank(rank, body)
        on.waits(0)
        on.waits(1)
        until(lambda: "barrier()" in on.stands("lockstep").verdict.sentence, "rank 2 at the barrier")
        report = on.report()
        line = f"(test_hang.py:{save.__code__.co_firstlineno + 1})"
        assert report.verdict.sentence.startswith(f"rank 2 is at barrier() in save {line} for")
        assert report.verdict.suspects == ("rank 2",)
        text = (on.run / "hang-1.txt").read_text()
        assert text == f"{report}\n"
        order = [
            "Rank 2 is at barrier()",
            "next ",
            "> rank 2",
            "oldest unanswered",
            "\nrank 2, pid",
            "dist.barrier()",
            "\nteacher, pid",
            "ranks 0 and 1, pids",
        ]
        assert sorted(order, key=text.index) == order
        assert all(one.stacks.source == "faulthandler" for one in report.facts.participants)
        assert msgspec.json.decode((on.run / "hang-1.json").read_bytes(), type=Report) == report
        assert Path(on.report().path).name == "hang-2.txt"


def test_a_stopped_rank_is_not_dead_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no py-spy
    with scene(tmp_path) as on:
        on.teacher()
        gate = on.gate()
        child = on.rank(0, lambda bridge: gate.wait())
        until(lambda: on.owner.lanes[0].records[0].phase.name == "TRAINING", "the rank in its loop")
        child.kill(signal.SIGSTOP)
        until(lambda: process.state(child.pid) == "stopped", "the stop")
        report = on.report()
        assert report.verdict.kind == "stopped"
        stopped = report.facts.ranks[0]
        assert stopped.stacks.missing == "stopped: its interpreter cannot answer; py-spy is not installed"
        assert "no stack: stopped" in str(report)
        assert report.facts.teachers[0].stacks.threads
        child.kill(signal.SIGCONT)
        gate.passed()
        assert child.join() == 0


def test_a_rank_that_holds_the_gil_tells_its_stack(tmp_path, hasty):
    """Its heartbeat is stale, and faulthandler answers all the same."""
    with scene(tmp_path, 1) as on:
        on.teacher()

        def count():
            sum(itertools.repeat(0))

        on.rank(0, lambda bridge: count())
        report = on.stands("stalled")
        line = f"(test_hang.py:{count.__code__.co_firstlineno + 1})"
        assert report.verdict.sentence.startswith("rank 0 has not run Python for")
        assert f"in count {line}: native code holds the GIL" in report.verdict.sentence


def test_a_rank_that_was_killed_is_dead(tmp_path):
    with scene(tmp_path) as on:
        on.teacher()
        child = on.rank(0, lambda bridge: time.sleep(600))
        until(lambda: on.owner.lanes[0].records[0].phase.name == "TRAINING", "the rank in its loop")
        child.kill()
        until(lambda: child.poll() is not None, "its end")
        report = on.report()
        assert report.verdict.kind == "dead"
        assert report.facts.ranks[0].process == "gone"


def test_a_slow_forward_is_no_fault(tmp_path, hasty):
    class Slow(Echo):
        def __call__(self, batch):
            if batch.input_ids.shape == (3, 5):
                time.sleep(600)
            return super().__call__(batch)

    with scene(tmp_path) as on:
        on.teacher(Slow())
        on.rank(0, lambda bridge: bridge.exchange(IDS.new_ones((3, 5)), step=3))
        report = on.stands("slow")
        assert "the teacher is alive and in its forward for" in report.verdict.sentence
        assert "in __call__ (test_hang.py" in report.verdict.sentence
        assert "rank 0 waits for a reply" in report.verdict.sentence


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
        until(lambda: on.owner.lanes[0].records[0].phase.name == "TRAINING", "the rank in its loop")
        for _ in range(5):
            assert on.report().facts.ranks[0].stacks.threads
        until(lambda: "read_bytes" in str(on.report()), "the rank at the fifo")
        fifo.write_bytes(b"on")
        assert child.join() == 0


def test_the_environment_is_not_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_a_test")
    with scene(tmp_path) as on:
        on.teacher()
        on.rank(0, lambda bridge: time.sleep(600))
        on.report()
        assert all("hf_secret" not in file.read_text() for file in on.run.glob("hang-1.*"))
        assert len(list(on.run.glob("hang-1.*"))) == 2


# Stacks


def listener(run: Path) -> Child:
    def body():
        stacks.listen(run)
        time.sleep(600)

    return Child(body)


def ready(run: Path, child: Child) -> process.Identity:
    until(lambda: hang_stacks._cannot_answer(child.pid, run) == "", "a process that listens")
    found = process.identity(child.pid)
    assert found
    return found


def test_eight_processes_of_which_one_is_stopped_take_a_few_seconds(tmp_path):
    children = [listener(tmp_path) for _ in range(8)]
    try:
        who = [ready(tmp_path, child) for child in children]
        children[3].kill(signal.SIGSTOP)
        until(lambda: process.state(children[3].pid) == "stopped", "the stop")
        began = time.monotonic()
        found = hang_stacks.collect(who, tmp_path)
        assert time.monotonic() - began < 10
        assert [bool(found[one.pid].threads) for one in who] == [i != 3 for i in range(8)]
        assert all(
            "body" in [f.function for f in found[one.pid].threads[0].frames]
            for one in who
            if one.pid != children[3].pid
        )
    finally:
        for child in children:
            child.end()


def test_a_process_that_does_not_listen_is_left_alone(tmp_path):
    """The signal's default action would end it."""
    child = Child(lambda: time.sleep(600))
    try:
        who = process.identity(child.pid)
        stacks.path(tmp_path, child.pid).parent.mkdir()
        stacks.path(tmp_path, child.pid).touch()  # of an earlier process with this pid
        found = hang_stacks.collect([who], tmp_path)[child.pid]
        assert "has not connected to the bridge" in found.missing
        assert child.poll() is None
    finally:
        child.end()


def test_a_pid_that_is_another_process_by_now_is_not_signalled(tmp_path):
    child = listener(tmp_path)
    try:
        who = ready(tmp_path, child)
        assert (
            hang_stacks.collect([who._replace(start=who.start - 1)], tmp_path)[child.pid].missing
            == "the process has ended"
        )
        assert stacks.path(tmp_path, child.pid).read_text() == ""
    finally:
        child.end()


def test_py_spy_reads_what_cannot_answer(tmp_path, monkeypatch):
    spy(tmp_path, monkeypatch, f"echo '{json.dumps(DUMPED)}'")
    child = Child(lambda: time.sleep(600))
    try:
        found = hang_stacks.collect([process.identity(child.pid)], None)[child.pid]
        assert found.source == "py-spy"
        assert str(places.of(found)) == "at barrier() in save (checkpoint.py:41)"
        assert [thread.name for thread in found.threads] == ["main thread", "loader"]
    finally:
        child.end()


@pytest.mark.parametrize(
    ("script", "told"),
    [("echo 'no permission' >&2; exit 1", "py-spy: no permission"), ("exec sleep 600", "py-spy did not answer")],
)
def test_a_py_spy_that_fails_is_told(tmp_path, monkeypatch, script, told):
    spy(tmp_path, monkeypatch, script)
    monkeypatch.setattr(hang_stacks, "PATIENCE_S", 0.5)
    child = Child(lambda: time.sleep(600))
    try:
        assert told in hang_stacks.collect([process.identity(child.pid)], None)[child.pid].missing
    finally:
        child.end()


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
    """Whoever started it: this session's launcher, or that of a group beside a kept teacher. Its workers are no ranks, nor is
    a teacher, nor a rank of another session."""
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
        on.rank(0, lambda bridge: time.sleep(600))
        report = on.stands("still")
        assert report.facts.ranks[0].still_s < rules.STILL_S
