"""What the command promises when something breaks, on whole runs with torchrun and torch."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from shmbridge.shm import owner
from tests.harness import until
from tests.launcher.running import Launched, launch, told

TEACHER = """
import os, signal, time, torch
from pathlib import Path
from train import LETHAL, RAISES, TOO_LARGE, WORDS, did, wait_for
class Forward:
    vocab_size = WORDS
    def __call__(self, batch):
        if (batch.input_ids == LETHAL).any() and not Path("killed").exists():
            Path("killed").touch()
            did("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        if (batch.input_ids == RAISES).any():
            raise ArithmeticError("the batch is bad")
        if len(batch.input_ids) > 1 and (batch.input_ids == TOO_LARGE).any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"logits": torch.eye(WORDS)[batch.input_ids]}
def build(settings):
    print("the teacher is process", os.getpid(), flush=True)
    return Forward()
def broken(settings):
    wait_for("here0", "here1")
    did("raised while loading")
    raise RuntimeError("the weights are made of cheese")
def slow(settings):
    time.sleep(600)
"""

# Each function is a way to train, named on the command line.
TRAIN = """
import ctypes, os, signal, sys, time, torch, shmbridge
import torch.distributed as dist
from pathlib import Path
from shmbridge.errors import TeacherDied, TeacherError
WORDS, LETHAL, RAISES, TOO_LARGE = 128, 113, 114, 115
rank = int(os.environ.get("LOCAL_RANK", 0))
generation = int(os.environ.get("SHMBRIDGE_SESSION", "@1").rpartition("@")[2])

def did(what):
    print(f"{time.monotonic():.6f} {what}", flush=True)

def wait_for(*names):
    while not all(Path(name).exists() for name in names):
        time.sleep(0.002)

def meet():
    Path(f"here{rank}").touch()
    wait_for("here0", "here1")

def learn(steps):
    for step in steps:
        ids = (torch.arange(8).view(2, 4) + 3 * step + rank) % 11
        assert torch.equal(bridge.exchange(ids, step=step).logits, torch.eye(WORDS)[ids])

def barrier():
    meet()
    did("waits")
    try:
        bridge.wait_ready()
    except TeacherDied:
        did("raised TeacherDied")
        raise

def loop():
    print(f"rank {rank} is process {os.getpid()}", flush=True)
    step = 0
    while not Path("enough").exists():
        learn([step])
        step += 1
        if step == 5:
            print("at step 5", flush=True)

def dies_in_flight():
    begin = 4 * (generation - 1)
    learn(range(begin, begin + 4))
    if generation == 3:
        return
    if rank == 1:
        pending = bridge.submit(torch.ones(2, 4, dtype=torch.int64), step=begin + 4)
        held = pending.wait() if generation == 2 else None
        did(f"dies in generation {generation}")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)

def asks_for_death():
    learn(range(6))
    meet()
    try:
        bridge.exchange(torch.full((2, 4), LETHAL), step=6)
        did("answered")
    except TeacherDied as error:
        assert "step 6, sequence 7" in str(error), error
        did("raised TeacherDied")
        raise

def asks_for_an_error():
    too_large, raises = torch.full((2, 4), TOO_LARGE), torch.full((2, 4), RAISES)
    assert torch.equal(bridge.exchange(too_large).logits, torch.eye(WORDS)[too_large])
    try:
        bridge.exchange(raises)
    except TeacherError:
        learn(range(3))
    bridge.exchange(raises, step=3)

def sends_a_word_too_many():
    learn(range(3))
    bridge.submit(torch.tensor([[5, WORDS]]), step=3)

def has_fewer_words():
    bridge.wait_ready(vocab_size=WORDS - 28)

def late():
    did("waits")
    dist.barrier()

def load_the_data():
    wait_for("here0")
    print(f"rank {rank} is process {os.getpid()}", flush=True)
    time.sleep(600)

def holds_the_gil():
    learn(range(5))
    if rank == 1:
        native_call()
    dist.barrier()
    learn(range(5, 10))

def native_call():
    pipe = os.open("pipe", os.O_RDWR)
    did("calls")
    ctypes.PyDLL(None).read(pipe, ctypes.create_string_buffer(1), 1)

def skips_an_exchange():
    learn(range(5))
    if rank == 1:
        save()
    learn(range(5, 10))

def save():
    did("saves")
    dist.barrier()

if __name__ == "__main__":
    torch.set_num_threads(1)
    body = globals()[sys.argv[1]]
    if body in (late, holds_the_gil, skips_an_exchange):
        dist.init_process_group("gloo")
    if body is late and rank == 1:
        load_the_data()
    with shmbridge.connect() as bridge:
        if body not in (barrier, has_fewer_words):
            bridge.wait_ready()
            Path(f"here{rank}").touch() if body is late else None
        body()
        if dist.is_initialized():
            dist.barrier()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(TEACHER)
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def run_of(directory: Path, body: str, *more: str, teacher: str = "build", **variables: str) -> Any:
    flags = ["--teacher", f"toy:{teacher}", "--cpu", "2", "ring.max_tokens=64", "timeouts.shutdown_s=5", *more]
    return launch(directory, *flags, "--", "train.py", body, **variables)


def hang(run: Launched, number: int) -> dict[str, Any]:
    """The n-th hang report, as the run directory keeps it."""
    found: dict[str, Any] = json.loads((run.path / f"hang-{number}.json").read_text())
    return found


def stack(report: dict[str, Any], who: str) -> str:
    return next(json.dumps(one["stacks"]["threads"]) for one in report["facts"]["participants"] if one["who"] == who)


# Until training begins


@pytest.mark.promise(1, within="1 s")
def test_a_teacher_that_raises_while_loading_stops_the_ranks_and_shows_its_traceback(directory, promise):
    with run_of(directory, "barrier", teacher="broken") as run:
        (raised,) = run.moments("raised while loading")
        named = run.says("; stopping")
        took_s = max(named, *run.moments("raised TeacherDied", 2)) - raised
        cause = run.cause(1)
        assert (cause["who"], cause["phase"]) == ("teacher", "loading")
        assert 'raise RuntimeError("the weights are made of cheese")' in run.text
        assert "DeadlineExceeded" not in run.text
    promise.kept(f"its traceback; {told(cause)}", took_s, 1)


@pytest.mark.promise(3, within="D+2 s", D=2)
def test_a_teacher_that_is_not_ready_at_the_deadline_is_named(directory, promise):
    """D is timeouts.startup_s, 600 s by default. The ranks count it from the barrier on with one clock, so that 2 s show the same
    as 600 s; the 2 s after it do not depend on D."""
    with run_of(directory, "barrier", "timeouts.startup_s=2", "timeouts.shutdown_s=1", teacher="slow") as run:
        waits = max(run.moments("waits", 2))
        took_s = run.says("; stopping") - waits
        cause = run.cause(1)
        assert (cause["role"], cause["phase"]) == ("trainer", "barrier")
        assert re.search(r"teacher 0 .* is in phase loading for [\d.]+ s after 2 s", cause["reason"])
        assert re.search(r"teacher loads the model, [\d.]+ s", run.text)
    promise.kept(f"its progress; {told(cause)}", took_s, 1)


@pytest.mark.promise(4, within="D+2 s", D=4)
def test_a_rank_that_never_attaches_is_named_with_its_stack(directory, promise):
    """D is timeouts.startup_s. test_monitor.py shows the same at the default of 600 s, over a clock that it turns."""
    with run_of(directory, "late", "timeouts.report_s=2", "timeouts.startup_s=4", "timeouts.shutdown_s=1") as run:
        (waits,) = run.moments("waits")
        pid = run.pid_of("rank 1")
        reported = run.says("rank 1 has not attached") - waits
        took_s = run.says("; stopping") - waits
        cause = run.cause(1)
        assert (cause["who"], cause["phase"], cause["pid"]) == ("rank 1", "absent", pid)
        assert "load_the_data" in cause["traceback"] or "nanosleep" in cause["traceback"], (
            "py-spy, or the kernel's stack"
        )
    promise.kept(f"hang report after {reported:.1f} s; {told(cause)}; its stack", took_s, 1)


# What one batch breaks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "told_of"),
    [
        pytest.param("asks_for_an_error", "(?s)TeacherError: .*the batch is bad", marks=pytest.mark.promise(16)),
        pytest.param("sends_a_word_too_many", r"RequestRefused: .*\[0, 1\] is 128", marks=pytest.mark.promise(17)),
        pytest.param("has_fewer_words", "ParityError: .*128 .*100", marks=pytest.mark.promise(21)),
    ],
)
def test_an_error_of_one_batch_that_a_rank_does_not_catch_ends_the_run(directory, promise, body, told_of):
    """The rank's own error, with its traceback. What was in between is answered; a batch that is out of memory is halved."""
    with run_of(directory, body, "--cpu", "1", "payload.logits={}") as run:
        cause = run.cause(1)
        assert cause["who"] == "rank 0"
        assert re.search(told_of, cause["reason"])
        assert f"in {body}" in cause["traceback"]
    promise.kept(f"not caught: {told(cause)}", exit_code=1)


# SIGKILL


@pytest.mark.slow
@pytest.mark.promise(6, within="1 s")
def test_ranks_killed_after_a_submit_and_holding_a_lease_leave_nothing_in_the_teachers_way(directory, promise):
    with run_of(directory, "dies_in_flight", "--train-restarts", "2") as run:
        took = []
        for generation in (1, 2):
            (died,) = run.moments(f"dies in generation {generation}")
            old = f"-g{generation}-"
            until(
                lambda old=old: not any(old in name for name in run.objects), "the end of the old generation's memory"
            )
            took.append(time.monotonic() - died)
        assert run.wait() == 0
        assert run.text.count("ready in") == 1, "one teacher served all three generations"
    promise.kept("its generation's memory is gone; one teacher served two more generations", max(took), 0)


@pytest.mark.promise(7, within="1 s")
def test_a_teacher_killed_in_a_forward_is_raised_in_every_rank(directory, promise):
    with run_of(directory, "asks_for_death") as run:
        (killed,) = run.moments("killed")
        named = run.says("; stopping")
        took_s = max(named, *run.moments("raised TeacherDied", 2)) - killed
        cause = run.cause(137)
        assert (cause["who"], cause["phase"], cause["step"]) == ("teacher", "forward", 6)
        assert cause["reason"] == "killed by SIGKILL" and cause["sequence"] is not None
    promise.kept(f"TeacherDied in both ranks; {told(cause)}", took_s, 137)


@pytest.mark.slow
@pytest.mark.promise(7)
def test_a_teacher_killed_in_a_forward_is_replaced_where_it_may_be(directory, promise):
    with run_of(directory, "asks_for_death", "--teacher-restarts", "1") as run:
        run.moments("answered", 2)
        assert run.wait() == 0
    promise.kept("with --teacher-restarts 1 both ranks got their answers", exit_code=0)


@pytest.mark.slow
@pytest.mark.promise(12, within="2 s")
def test_kill_9_of_torchrun_takes_the_ranks_along(directory, promise):
    with run_of(directory, "loop") as run:
        run.says("at step 5", 2)
        killed = time.monotonic()
        os.kill(run.below_shim("elastic.py"), signal.SIGKILL)
        until(lambda: not run.processes("train.py"), "the end of the ranks")
        took_s = time.monotonic() - killed
        cause = run.cause(137)
        assert (cause["who"], cause["reason"]) == ("torchrun", "killed by SIGKILL")
    promise.kept(f"the ranks and the teacher ended; {cause['who']}: {cause['reason']}", took_s, 137)


@pytest.mark.slow
@pytest.mark.promise(13, within="2 s")
def test_kill_9_of_the_launcher_ends_both_jobs_and_the_next_start_reclaims_the_rest(directory, promise):
    with run_of(directory, "loop") as run:
        run.says("at step 5", 2)
        killed = run.signal(signal.SIGKILL)
        until(lambda: not run.processes(), "the end of both jobs")
        took_s = time.monotonic() - killed
        left = len(run.objects)
        (directory / "empty.py").touch()
        with launch(directory, "--no-teacher", "--cpu", "1", "--", "empty.py") as following:
            assert following.wait() == 0
        assert left and run.session not in owner.objects()
    promise.kept(f"both jobs ended; the next start reclaimed {left} objects", took_s)


@pytest.mark.promise(20, within="1 s")
def test_a_live_sessions_name_is_refused_and_the_session_trains_on(directory, promise):
    with run_of(directory, "loop", "--name", "exp", XDG_RUNTIME_DIR=str(directory)) as run:
        run.says("at step 5", 2)
        objects, began = sorted(run.objects), time.monotonic()
        with run_of(directory, "loop", "--name", "exp", XDG_RUNTIME_DIR=str(directory)) as second:
            assert second.wait() == 2
            took_s = time.monotonic() - began
            assert f"held by a live launcher (pid {run.process.pid}" in second.text
        assert sorted(run.objects) == objects
        (directory / "enough").touch()
        assert run.wait() == 0
    promise.kept("the second launcher is told the first one's pid; the first trained on", took_s, 2)


# Nobody has died, and nothing moves


@pytest.mark.slow
@pytest.mark.promise(9, within="D+2 s", D=3)
def test_a_rank_and_a_teacher_that_are_stopped_are_not_dead_and_go_on(directory, promise):
    with run_of(directory, "loop", "timeouts.report_s=3") as run:
        run.says("at step 5", 2)
        sentences, took = [], []
        for number, (who, is_who) in enumerate((("rank 1", "rank 1"), ("teacher", "the teacher")), 1):
            pid, stopped = run.pid_of(is_who), time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            took.append(run.says("\nhang report", number) - stopped)
            os.kill(pid, signal.SIGCONT)
            verdict = hang(run, number)["verdict"]
            assert (verdict["kind"], verdict["suspects"]) == ("stopped", [who])
            assert f"(pid {pid}) is stopped, not dead" in verdict["sentence"]
            sentences.append(verdict["sentence"].split(" (SIGSTOP")[0])
        (directory / "enough").touch()
        assert run.wait() == 0
    promise.kept(f"{'; '.join(sentences)}; continued, both trained to the end", max(took), 0)


@pytest.mark.slow
@pytest.mark.promise(10, within="D+2 s", D=6)
def test_a_rank_that_holds_the_gil_is_named_with_its_stack_and_goes_on(directory, promise):
    os.mkfifo(directory / "pipe")
    with run_of(directory, "holds_the_gil", "timeouts.report_s=6") as run:
        (calls,) = run.moments("calls")
        took_s = run.says("\nhang report") - calls
        (directory / "pipe").write_bytes(b"x")
        report = hang(run, 1)
        assert (report["verdict"]["kind"], report["verdict"]["suspects"]) == ("stalled", ["rank 1"])
        assert "native_call" in stack(report, "rank 1")
        assert run.wait() == 0
    promise.kept(f"{report['verdict']['sentence']}; its stack; let go, it trained to the end", took_s, 0)


@pytest.mark.slow
@pytest.mark.promise(11, within="D+2 s", D=3)
def test_a_rank_in_a_collective_while_the_others_wait_for_it_is_named_with_every_stack(directory, promise):
    flags = "teacher.collect=lockstep", "timeouts.report_s=3", "timeouts.shutdown_s=1"
    with run_of(directory, "skips_an_exchange", *flags) as run:
        (saves,) = run.moments("saves")
        took_s = run.says("\nhang report") - saves
        report = hang(run, 1)
        assert report["verdict"]["suspects"] == ["rank 1"]
        assert report["verdict"]["sentence"].lower().startswith("rank 1 is at barrier() in save")
        assert {one["who"]: one["step"] for one in report["facts"]["participants"]}["rank 0"] == 5
        assert all(stack(report, who) != "[]" for who in ("rank 0", "rank 1", "teacher"))
        run.signal(signal.SIGINT)
        assert run.wait() == 130
    promise.kept(f"{report['verdict']['sentence']}; every stack; then Ctrl-C", took_s, 130)
