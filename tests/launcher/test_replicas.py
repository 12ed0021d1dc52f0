"""Several teachers in one run: how they are counted and placed; then the real supervisor over fake replicas."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher.planning import placement, summary
from launcher.planning.jobs import TRAIN
from shmbridge.config import TeacherConfig
from shmbridge.errors import ConfigError
from tests.harness import until
from tests.launcher.running import faked, launch
from tests.launcher.test_planning import MACHINE, make, specs

# Counting and placing


@pytest.mark.parametrize(
    ("wanted", "gpus", "ranks", "found"),
    [(None, 0, 2, 1), (None, 1, 7, 1), (None, 4, 4, 4), (2, 4, 4, 2), (1, 4, 4, 1), (3, 0, 3, 3)],
)
def test_without_a_number_each_gpu_has_a_replica(wanted, gpus, ranks, found):
    assert placement.replica_count(TeacherConfig(replicas=wanted), gpus, ranks) == found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["teacher.replicas=3", "teacher.gpus=4-7", "train.gpus=0-3"],
            r"teacher\.replicas is 3, and teacher\.gpus names 4 GPUs \(4-7\): 3 does not divide 4\. .* 1, 2 or 4",
        ),
        (
            ["teacher.replicas=5", "teacher.gpus=4-7", "train.gpus=0-3"],
            r"is 5, and teacher\.gpus names 4 GPUs \(4-7\): each replica needs its own GPU\. .* 1, 2 or 4",
        ),
        (
            ["teacher.gpus=4-7", "train.gpus=0-2"],
            r"names 4 GPUs, a replica each, and there are 3 training ranks: .* 1 would be idle\. "
            r"Set teacher\.replicas to 2 \(each over 2 GPUs\), or name fewer GPUs",
        ),
        (
            ["teacher.replicas=3", "train.cpu_ranks=1"],
            r"is 3, and there is 1 training rank: .* 2 would be idle\. Set teacher\.replicas to 1 or less",
        ),
        (["teacher.replicas=3", "teacher.gpus=4-7", "train.gpus=0-2"], r"Set teacher\.replicas to 1 or 2, or name"),
        (["teacher.gpus=6-9", "train.gpus=0-1"], "names GPU 8, which does not exist"),
    ],
)
def test_numbers_that_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(*overrides)


def test_each_replica_has_its_own_gpu_first_and_then_the_trainings():
    found = specs(make("teacher.gpus=4-7", "train.gpus=0-3"))
    teachers = [found[f"teacher{i}"] for i in range(4)]
    assert [spec.set["CUDA_VISIBLE_DEVICES"] for spec in teachers] == [f"{4 + i},0,1,2,3" for i in range(4)]
    assert [spec.argv[1:] for spec in teachers] == [
        ("-m", "shmbridge.teacher.main", "--teacher-index", str(i), "--gpus", "1") for i in range(4)
    ]
    assert [(spec.who, spec.log) for spec in teachers] == [
        (f"teacher {i}", Path(f"runs/x/teacher{i}.log")) for i in range(4)
    ]
    assert found[TRAIN].set["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"


def test_fewer_replicas_than_gpus_have_contiguous_shares():
    found = specs(make("teacher.gpus=4-7", "teacher.replicas=2", "train.gpus=0-1"))
    assert found["teacher0"].set["CUDA_VISIBLE_DEVICES"] == "4,5,0,1"
    assert found["teacher1"].set["CUDA_VISIBLE_DEVICES"] == "6,7,0,1"
    assert found["teacher1"].argv[-2:] == ("--gpus", "2")


def test_a_single_replica_is_called_as_ever_and_may_have_several_gpus():
    found = specs(make("teacher.gpus=4-7", "teacher.replicas=1", "train.gpus=0-3"))
    assert set(found) == {"teacher", TRAIN}
    assert found["teacher"].argv[-4:] == ("--teacher-index", "0", "--gpus", "4")
    assert (found["teacher"].who, found["teacher"].log.name) == ("teacher", "teacher.log")


def test_replicas_on_the_cpu_share_half_of_the_cores():
    planned = make("train.cpu_ranks=3", "teacher.replicas=3")
    assert planned.threads == (1, 1)
    found = specs(make("train.cpu_ranks=2", "teacher.replicas=2"))
    assert [found[f"teacher{i}"].set["OMP_NUM_THREADS"] for i in range(2)] == ["2", "2"]
    assert found[TRAIN].set["OMP_NUM_THREADS"] == "2"
    assert found["teacher1"].argv[-2:] == ("--gpus", "0")


def test_ranks_that_do_not_divide_are_told():
    line = "7 ranks over 4 replicas: 2, 2, 2 and 1. The slowest replica sets the step; 4 or 8 ranks would be even"
    planned = make("train.cpu_ranks=7", "teacher.replicas=4")
    assert placement.imbalance(7, 4) == line
    assert f"lanes     {line}" in summary.header(planned, "TOKEN@1", Path("runs/x"), {})
    assert line in summary.describe(planned, planned.jobs(Path("runs/x"), "TOKEN@1"), {})
    assert [list(placement.lanes(i, 4, 7)) for i in range(4)] == [[0, 4], [1, 5], [2, 6], [3]]


@pytest.mark.parametrize(("ranks", "teachers"), [(8, 4), (4, 4), (7, 1), (7, 0)])
def test_ranks_that_divide_are_not_worth_a_line(ranks, teachers):
    assert placement.imbalance(ranks, teachers) == ""


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["teacher.gpus='7'", "train.gpus=0-6"], "toy:build on GPU 7"),
        (["teacher.gpus=4-7", "train.gpus=0-3"], "toy:build, 4 replicas on GPU 4, 5, 6 and 7"),
        (["teacher.gpus=4-7", "teacher.replicas=2", "train.gpus=0-3"], "toy:build, 2 replicas on GPU 4,5 and 6,7"),
        (["teacher.replicas=2", "train.cpu_ranks=2"], "toy:build, 2 replicas on the CPU, 2 threads each"),
    ],
)
def test_the_header_tells_where_the_replicas_are(overrides, where):
    lines = summary.header(make(*overrides, machine=MACHINE), "TOKEN@1", Path("runs/x"), {}).splitlines()
    assert f"teacher   {where}" in lines


def test_the_flag_and_a_dry_run(tmp_path):
    flags = ["--teacher", "toy:build", "--cpu", "3", "--teacher-replicas", "2", "--dry-run"]
    with launch(tmp_path, *flags, "--", "-m", "this") as run:
        assert run.wait() == 0
        assert "--teacher-index 1 --gpus 0" in run.text
        assert "3 ranks over 2 replicas: 2 and 1" in run.text


# Running


def replica(run, index: int) -> list[int]:
    return run.processes(f"fake_teacher.py ok {index}")


def test_both_are_ready_and_end_and_have_logs_of_their_own(tmp_path):
    with faked(tmp_path, teacher="ok,ok") as run:
        assert run.wait() == 0
        assert "teachers 0 and 1 ready in" in run.text or run.text.count(" ready in") == 2
        for index in range(2):
            assert f"[teacher {index}] teacher up" in run.text
            assert "teacher up" in (run.path / f"teacher{index}.log").read_text()
        assert run.text.count("reply memory") == 1


def test_reply_memory_waits_for_the_last_to_load(tmp_path):
    with faked(tmp_path, teacher="ok,loading", training="wait") as run:
        run.says("teacher 1 loads the model: 25 %; teacher 0 waits for the others")
        assert "reply memory" not in run.text
        assert "ready in" not in run.text
        run.signal(signal.SIGTERM)
        assert run.wait() == 143


def test_one_that_is_killed_is_named_and_the_other_ends(tmp_path):
    with faked(tmp_path, teacher="ok,ok", training="wait") as run:
        run.says(" up", times=4)
        os.kill(run.below_shim("fake_teacher.py ok 1"), signal.SIGKILL)
        cause = run.cause(137)
        assert (cause["role"], cause["rank"], cause["who"]) == ("teacher", 1, "teacher 1")
        assert [Path(path).name for path in run.report["log_paths"]] == ["teacher1.log"]
        assert "SIGKILL for" not in run.text


def test_one_that_fails_does_not_wait_for_another_that_still_loads(tmp_path):
    """The ranks are at the barrier and have a grace of five minutes; the other replica needs none."""
    with faked(tmp_path, teacher="loading,loading", training="wait", grace_s=300) as run:
        run.says("teacher loading", times=2)
        until(lambda: run.ranks_signed_in, "both ranks at the barrier")
        os.kill(run.below_shim("fake_teacher.py loading 1"), signal.SIGKILL)
        assert run.wait() == 137
        assert "teacher 1 was killed by SIGKILL" in run.text


def test_one_whose_ranks_have_closed_ends_before_the_other(tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with faked(tmp_path, teacher="ok,ok", training="leaves", FAKE_GATE=str(gate)) as run:
        run.says(" up", times=4)
        until(lambda: not replica(run, 0), "the end of teacher 0")
        assert replica(run, 1)
        assert run.process.poll() is None
        gate.write_bytes(b"")
        assert run.wait() == 0


def test_replicas_that_offer_different_things_are_refused(tmp_path):
    with faked(tmp_path, teacher="ok,wide", training="wait") as run:
        assert run.wait() == 2
        assert "teacher 1 offers" in run.text
        assert "replicas load the same model" in run.text
