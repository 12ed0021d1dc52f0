"""The real launcher on GPUs: which card each process takes, what is equal, which plane was chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


def launch(
    directory: Path, model: Path, *arguments: str, script: str = "train.py", **variables: str
) -> tuple[str, list[dict[str, object]]]:
    """What a run of a script of tests/gpu printed, and what each rank told."""
    command = ["--", str(ROOT / "tests" / "gpu" / script), str(model), str(directory)]
    settings = ["payload.logits.dtype=float32", "ring.max_tokens=1024", f"run_dir={directory}/runs"]
    done = subprocess.run(
        [sys.executable, "-m", "shmbridge.launch", "--teacher", str(model), *arguments, *settings, *command],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout, [json.loads(file.read_text()) for file in sorted(directory.glob("rank-*.json"))]


def right(told: list[dict[str, object]], ranks: int, plane: str) -> None:
    assert len(told) == ranks
    assert [(rank["equal"], rank["plane"], rank["world"]) for rank in told] == [(20, plane, ranks)] * ranks


ONE_CARD = ("--teacher-gpu", "0", "--train-gpus", "0,0")
READS = pytest.mark.parametrize("read", ["copy", "in_place"])


@READS
def test_teacher_and_ranks_on_one_card(tmp_path, model, read):
    _, told = launch(tmp_path, model, *ONE_CARD, "--plane", "cuda_ipc", f"cuda.read={read}")
    right(told, 2, "cuda_ipc")


def test_auto_takes_cuda_ipc_where_its_trial_passes(tmp_path, model):
    printed, told = launch(tmp_path, model, *ONE_CARD)
    right(told, 2, "cuda_ipc")
    assert "opened, read and checked" in printed


def test_the_host_plane(tmp_path, model):
    _, told = launch(tmp_path, model, *ONE_CARD, "--plane", "host")
    right(told, 2, "host")


def test_expandable_segments_are_taken_from_the_teacher_alone(tmp_path, model):
    printed, told = launch(tmp_path, model, *ONE_CARD, **{ALLOCATOR: "expandable_segments:True"})
    right(told, 2, "cuda_ipc")
    assert "the teacher runs without expandable_segments:True" in printed


@pytest.mark.parametrize("devices", [("--teacher-gpu", "0", "--cpu", "1"), ("--train-gpus", "0")])
def test_a_teacher_on_the_gpu_and_training_on_the_cpu_and_the_other_way_round(tmp_path, model, devices):
    launch(tmp_path, model, *devices, "teacher.collect=lockstep", script="ask.py")


# Two cards


@pytest.mark.gpus(2)
@READS
@pytest.mark.parametrize("segments", [{}, {ALLOCATOR: "expandable_segments:True"}], ids=["", "expandable"])
def test_a_rank_reads_the_other_cards_memory(tmp_path, model, read, segments):
    """Training keeps expandable segments; the launcher takes them from the teacher alone."""
    cards = ("--teacher-gpu", "1", "--train-gpus", "0")
    _, told = launch(tmp_path, model, *cards, "--plane", "cuda_ipc", f"cuda.read={read}", **segments)
    right(told, 1, "cuda_ipc")


@pytest.mark.gpus(2)
@pytest.mark.parametrize("replicas", ["1", "2"])
def test_a_model_over_two_cards_and_two_replicas(tmp_path, model, replicas):
    cards = ("--teacher-gpu", "0,1", "--teacher-replicas", replicas, "--train-gpus", "0,1")
    _, told = launch(tmp_path, model, *cards)
    right(told, 2, "cuda_ipc")
    assert [rank["card"] for rank in told] == [0, 1]


@pytest.mark.gpus(2)
def test_slots_are_used_again_across_cards(start):
    """The lane's stream on one card, the rank's on the other; peer access without which nothing here works."""
    for read in ("copy", "in_place"):
        session = start(2, "plane=cuda_ipc", f"cuda.read={read}", "ring.depth=2")
        session.teacher("teach_table", device="cuda:0")
        ranks = [session.rank(lane, "compare_table", device=f"cuda:{lane}", steps=300, ahead=2) for lane in range(2)]
        assert [rank.result()["wrong"] for rank in ranks] == [0, 0]
