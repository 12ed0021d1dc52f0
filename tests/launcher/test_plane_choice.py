"""Which plane a run has, why, and what the user is told of it; the command with a made-up nvidia-smi."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher.planning import jobs, plane_choice, summary
from launcher.planning.jobs import TEACHER, TRAIN
from launcher.planning.plane_choice import PlaneChoice
from shmbridge import config
from shmbridge.errors import ConfigError, PlanError
from tests.harness import until
from tests.launcher import fake_gpus
from tests.launcher.running import Launched, launch
from tests.launcher.test_cli import TEACHER as TOY
from tests.launcher.test_planning import EIGHT, MACHINE, make, specs

GPUS = ["teacher.gpus='7'", "train.gpus=0-6"]
SEVEN = plane_choice.gpu_pairs([EIGHT[7:]], EIGHT[:7])


def described(planned: jobs.Plan, **base: str) -> str:
    return summary.describe(planned, planned.jobs(Path("runs/x"), "TOKEN@1"), base)


def headed(planned: jobs.Plan, **base: str) -> list[str]:
    return summary.header(planned, "TOKEN@1", Path("runs/x"), base).splitlines()


# What the settings alone decide


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (GPUS, "cuda_ipc, if a trial at the start passes"),
        ([*GPUS, "plane=cuda_ipc"], "cuda_ipc, if a trial at the start passes"),
        ([*GPUS, "plane=host"], "host: as the settings say"),
        (["train.cpu_ranks=2"], "host: no GPUs on both sides (the teacher and training are on the CPU)"),
        (["train.gpus=0-6"], "host: no GPUs on both sides (the teacher is on the CPU)"),
        (["teacher.gpus='7'", "train.cpu_ranks=2"], "host: no GPUs on both sides (training is on the CPU)"),
    ],
)
def test_the_plane_before_a_trial(overrides, line):
    planned = make(*overrides)
    assert str(planned.plane) == line
    assert planned.config.plane == planned.plane.plane, "never auto"
    assert f"\n\nplane\n  {line}\n\n" in described(planned)


def test_gpu_memory_without_gpus_is_refused():
    with pytest.raises(
        ConfigError, match=r"needs GPUs on both sides: the teacher is on the CPU\. Give --teacher-gpu and"
    ):
        make("plane=cuda_ipc", "train.gpus=0-6")


def test_without_a_bridge_there_is_no_plane():
    planned = make(*GPUS, "enabled=false", "plane=cuda_ipc")
    assert planned.plane is None
    assert "plane" not in described(planned)
    assert not any(line.startswith("plane") for line in headed(planned))


# What the trial decides


NO_ACCESS = "GPU 7 and GPU 3: no peer access"


def test_a_trial_that_passes_is_told_with_its_gpus():
    chosen = plane_choice.by_trial(config.load(), SEVEN, lambda: None)
    assert chosen == PlaneChoice("cuda_ipc", "opened, read and checked between GPU 7 and GPUs 0-6")


def test_a_trial_that_fails_leaves_the_host_or_is_an_error_where_gpu_memory_was_asked_for():
    assert plane_choice.by_trial(config.load(), SEVEN, lambda: NO_ACCESS) == PlaneChoice("host", NO_ACCESS)
    with pytest.raises(
        PlanError, match=f"(?s)its trial failed: {NO_ACCESS}.*between GPU 7 and GPUs 0-6.*set plane=host"
    ):
        plane_choice.by_trial(config.load(overrides=["plane=cuda_ipc"]), SEVEN, lambda: NO_ACCESS)


def test_what_was_chosen_is_what_is_planned():
    settings = config.load(overrides=["teacher.model=toy:build", *GPUS])
    chosen = PlaneChoice("host", NO_ACCESS)
    planned = jobs.plan(settings, ["-m", "x"], MACHINE, chosen)
    assert planned.config.plane == "host"
    assert f"plane     host: {NO_ACCESS}" in headed(planned)
    assert not any("handles" in item.what for item in planned.memory.items)
    planned = jobs.plan(settings, ["-m", "x"], MACHINE, PlaneChoice("cuda_ipc", "tried"))
    assert any("handles" in item.what for item in planned.memory.items)


def test_pairs_are_those_of_the_lanes():
    found = plane_choice.gpu_pairs([EIGHT[4:6], EIGHT[6:]], (EIGHT[2], EIGHT[0], EIGHT[1]))
    assert [(str(pair), pair.replica, pair.device) for pair in found] == [
        ("GPU 4 and GPU 2", 0, 0),
        ("GPU 4 and GPU 1", 0, 2),
        ("GPU 6 and GPU 0", 1, 1),
    ]
    repeated = plane_choice.gpu_pairs([EIGHT[7:]], (EIGHT[0], EIGHT[0], EIGHT[1]))
    assert [pair.device for pair in repeated] == [0, 1], "as CUDA_VISIBLE_DEVICES lists each once"
    assert plane_choice.between(found) == "GPU 4 and GPUs 2,1, GPU 6 and GPU 0"


# The allocator

OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize("name", [OLD, NEW])
@pytest.mark.parametrize(
    ("value", "kept", "stripped"),
    [
        ("expandable_segments:True", None, ["expandable_segments:True"]),
        ("backend:cudaMallocAsync", None, ["backend:cudaMallocAsync"]),
        (
            "max_split_size_mb:128, expandable_segments : true,garbage_collection_threshold:0.8",
            "max_split_size_mb:128,garbage_collection_threshold:0.8",
            ["expandable_segments : true"],
        ),
        (
            "roundup_power2_divisions:[256:1,512:2,>:4],expandable_segments:True",
            "roundup_power2_divisions:[256:1,512:2,>:4]",
            ["expandable_segments:True"],
        ),
        ("expandable_segments:False,backend:native", "expandable_segments:False,backend:native", None),
        ("", "", None),
    ],
)
def test_options_that_hide_memory_are_taken_out(name, value, kept, stripped):
    base = {name: value, "HF_HOME": "x"}
    rest = {"HF_HOME": "x"} if kept is None else {"HF_HOME": "x", name: kept}
    assert jobs.shareable(base) == (rest, {name: stripped} if stripped else {})
    assert base[name] == value


def test_the_teacher_alone_loses_them_and_the_header_says_so():
    base = {OLD: "expandable_segments:True,max_split_size_mb:64", NEW: "backend:cudaMallocAsync"}
    planned = make(*GPUS)
    found = specs(planned)
    teacher = found[TEACHER].environment(base)
    assert (teacher.get(OLD), teacher.get(NEW)) == ("max_split_size_mb:64", None)
    assert {name: found[TRAIN].environment(base)[name] for name in base} == base
    (line,) = [line for line in headed(planned, **base) if line.startswith("allocator")]
    assert line == (
        f"allocator  the teacher runs without backend:cudaMallocAsync of {NEW} and expandable_segments:True of {OLD}, under "
        "which ranks cannot open its memory"
    )
    assert f"  without expandable_segments:True in {OLD}\n" in described(planned, **base)
    assert not any(line.startswith("allocator") for line in headed(planned))


@pytest.mark.parametrize("overrides", [[*GPUS, "plane=host"], ["train.cpu_ranks=2"], [*GPUS, "enabled=false"]])
def test_on_the_host_plane_everybody_keeps_them(overrides):
    base = {OLD: "expandable_segments:True"}
    planned = make(*overrides)
    assert all(spec.environment(base)[OLD] == "expandable_segments:True" for spec in specs(planned).values())
    assert not any(line.startswith("allocator") for line in headed(planned, **base))
    assert "expandable" not in described(planned, **base)


# GPUs that processes share


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["teacher.gpus='0'", "train.gpus='0'"], ["GPU 0: the teacher's and training's"]),
        (
            ["teacher.gpus='0'", "train.gpus=0,0"],
            ["GPU 0: the teacher's and training's; 2 ranks on GPU 0", "set_device(LOCAL_RANK % 1)", "gloo"],
        ),
        (["teacher.gpus='7'", "train.gpus=0-1,0"], ["  3 ranks on GPUs 0-1", "set_device(LOCAL_RANK % 2)", "gloo"]),
        (GPUS, []),
        (["train.cpu_ranks=2"], []),
    ],
)
def test_the_header_says_what_sharing_a_gpu_means(overrides, parts):
    lines = [line for line in headed(make(*overrides)) if line.startswith("sharing")]
    assert len(lines) == bool(parts)
    assert all(part in lines[0] for part in parts)


# The command. nvidia-smi finds two GPUs; torch finds none.

SMI = f"#!/bin/sh\n{fake_gpus.rows(2)}\n"
SLEEPER = """#!/bin/sh
echo up > up
exec sleep 600
"""
COMMAND = ["--teacher", "toy:build", "--teacher-gpu", "1", "--train-gpus", "0", "ring.max_tokens=64"]


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "train.py").write_text("")
    for name, text in (("nvidia-smi", SMI), ("sleeper", SLEEPER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def command(directory: Path, *more: str) -> Launched:
    path = f"{directory}:{os.environ['PATH']}"
    return launch(directory, *COMMAND, *more, "--", "train.py", PATH=path, CUDA_VISIBLE_DEVICES="0,1")


def test_a_dry_run_tries_nothing(directory):
    with command(directory, "--dry-run", f"teacher.python={directory}/sleeper") as run:
        assert run.wait() == 0
        assert "cuda_ipc, if a trial at the start passes" in run.text
        assert not (directory / "up").exists()


def test_a_trial_without_cuda_refuses_before_anything_is_created(directory):
    with command(directory, "--plane", "cuda_ipc") as run:
        assert run.wait() == 2
        assert "[launcher] trying CUDA IPC between GPU 1 and GPU 0\n" in run.text
        assert "shmbridge-launch: plane is cuda_ipc, and its trial failed: torch 2." in run.text
        assert "finds no CUDA device in the teacher's environment" in run.text
        assert run.session is None
        assert not (directory / "runs").exists()


@pytest.mark.slow
def test_a_trial_without_cuda_leaves_the_host_and_says_why(directory):
    """The teacher has no GPU then; what matters here is what the session was made with."""
    with command(directory) as run:
        run.says("plane     host: torch 2.")
        (written,) = until(lambda: list((directory / "runs").glob("*/config.yaml")), "the settings of the run")
        run.signal(signal.SIGTERM)
        run.wait()
        assert "plane: host" in written.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_trial_ends_the_launcher(directory, number, code):
    with command(directory, f"teacher.python={directory}/sleeper") as run:
        run.says("trying CUDA IPC")
        until((directory / "up").exists, "the process of the trial")
        run.signal(number)
        assert run.wait() == code
        assert f"[launcher] stopped by {number.name}\n" in run.text
        assert "Traceback" not in run.text
        assert not (directory / "runs").exists()


def test_a_launcher_that_is_killed_takes_the_trial_along(directory):
    with command(directory, f"teacher.python={directory}/sleeper") as run:
        until((directory / "up").exists, "the process of the trial")
        run.signal(signal.SIGKILL)
        run.process.wait()
        until(lambda: not run.processes(), "the end of the trial")
