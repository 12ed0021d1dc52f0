"""Config, training command and machine to job specs; nothing is started."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launcher.planning import gpus, jobs, placement, summary, torchrun
from launcher.planning.gpus import Gpu
from launcher.planning.jobs import TEACHER, TRAIN
from launcher.planning.machine import Machine
from shmbridge import config
from shmbridge.errors import ConfigError

GIB = 2**30
EIGHT = tuple(Gpu(i, str(i), 80 * GIB, 79 * GIB) for i in range(8))
MACHINE = Machine(cores=8, shm_free=64 * GIB, ram_free=512 * GIB, gpus=EIGHT)


def make(*overrides: str, machine: Machine = MACHINE, script: tuple[str, ...] = ("-m", "package.train")) -> jobs.Plan:
    return jobs.plan(config.load(overrides=["teacher.model=toy:build", *overrides]), script, machine)


def specs(planned: jobs.Plan) -> dict[str, jobs.JobSpec]:
    return {spec.name: spec for spec in planned.jobs(Path("runs/x"), "TOKEN@1")}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("7", [7]),
        ("0-6", [0, 1, 2, 3, 4, 5, 6]),
        ("4-5, 1", [4, 5, 1]),
        ("0,0", [0, 0]),
        ("0-1,0-1", [0, 1, 0, 1]),
        ("5,3,5", [5, 3, 5]),
    ],
)
def test_a_list_of_gpus_has_a_rank_for_each_entry(text, numbers):
    planned = make(f"train.gpus='{text}'")
    assert ([gpu.number for gpu in planned.train_gpus], planned.ranks) == (numbers, len(numbers))


@pytest.mark.parametrize(
    ("teacher", "train", "teacher_sees", "training_sees"),
    [
        ("0", "0", "0", "0"),
        ("0", "0,0", "0", "0"),
        ("7", "0,1,0,1", "7,0,1", "0,1,7"),
        ("2", "0-3", "2,0,1,3", "0,1,2,3"),
        ("2-3", "3,2", "2,3", "3,2"),
        ("7", "0-6", "7,0,1,2,3,4,5,6", "0,1,2,3,4,5,6,7"),
        ("7", "", "7", ""),
        ("", "", "", ""),
    ],
)
def test_a_job_sees_its_own_gpus_first_and_then_those_across_the_bridge(teacher, train, teacher_sees, training_sees):
    ranks = f"train.gpus='{train}'" if train else "train.cpu_ranks=2"
    found = specs(make(f"teacher.gpus='{teacher}'", ranks, "teacher.replicas=1"))
    assert found[TEACHER].set["CUDA_VISIBLE_DEVICES"] == teacher_sees
    assert found[TRAIN].set["CUDA_VISIBLE_DEVICES"] == training_sees
    assert {spec.set["CUDA_DEVICE_ORDER"] for spec in found.values()} == {"PCI_BUS_ID"}


TABLE = "".join(
    f"{number}, {uuid}, 81559, 81000, Default, Disabled, 550.54.15, NVIDIA H100\n"
    for number, uuid in enumerate(["GPU-aaa", "GPU-abc", "GPU-bbb"])
)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        ("GPU-bbb,GPU-ab", ["GPU-bbb", "GPU-ab"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,9,0", ["1"]),
    ],
)
def test_gpus_are_counted_within_cuda_visible_devices(visible, names):
    found = gpus.select_visible(TABLE, visible)
    assert [gpu.visible for gpu in found] == names
    assert [gpu.number for gpu in found] == list(range(len(names)))
    assert placement.visible(found, []) == ",".join(names), "as Slurm named them"


def test_mig_slices_are_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"names MIG-1f2e: MIG slices are not supported. Set CUDA_VISIBLE_DEVICES to whole GPUs"
    ):
        gpus.select_visible(TABLE, "MIG-1f2e")


ON_CPU = "train.cpu_ranks=2"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "no training ranks"),
        (["train.gpus=0-1", ON_CPU], "train on GPUs or on the CPU"),
        *[([f"train.gpus='{text}'"], r"train\.gpus is .* is no GPU") for text in (",", "0,,1", "a", "-1")],
        (["train.gpus=3-1"], "runs backwards"),
        (["train.gpus=0-2,1"], "take them in turn, .* Write 0,1,2,0"),
        (["train.gpus=0,0,1"], "take them in turn, .* Write 0,1,0"),
        (["teacher.gpus=0-2,1", ON_CPU], r"teacher\.gpus is .* is given twice"),
        (["teacher.gpus='8'", "train.gpus=0-3"], "teacher.gpus names GPU 8, which does not exist; .* GPUs 0-7"),
        (["train.gpus=0-9"], "train.gpus names GPU 8"),
        (["teacher.python=/nope/python", ON_CPU], "teacher.python is /nope/python; expected an executable file"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(*overrides)


def test_without_a_driver_the_message_names_the_cpu():
    with pytest.raises(ConfigError, match="--cpu 2"):
        make("train.gpus=0-1", machine=MACHINE._replace(gpus=()))


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [
        (["train.cpu_ranks=2"], (4, 2)),
        (["train.cpu_ranks=2", "teacher.cpu_threads=6"], (6, 1)),
        (["train.cpu_ranks=2", "train.cpu_threads=3"], (4, 3)),
        (["train.cpu_ranks=16"], (4, 1)),
        (["train.cpu_ranks=2", "enabled=false"], (None, 4)),
        (["train.gpus=0-6", "teacher.gpus='7'"], (None, None)),
        (["train.gpus=0-6", "teacher.gpus='7'", "train.cpu_threads=8"], (None, 8)),
    ],
)
def test_jobs_on_the_cpu_divide_the_cores(overrides, threads):
    planned = make(*overrides)
    assert planned.threads == threads
    for name, count in ((TEACHER, threads[0]), (TRAIN, threads[1])):
        if count:
            variables = specs(planned)[name].set
            assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == str(count)


def test_the_teacher_is_a_rank_of_no_world():
    rank = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"]
    base = dict.fromkeys([*rank, "TORCHELASTIC_RUN_ID", "PET_NNODES", "PATH", "HF_HOME"], "x")
    found = specs(make("train.cpu_ranks=2"))
    teacher = found[TEACHER].environment(base)
    assert {"PATH", "HF_HOME"} <= set(teacher)
    assert not set(teacher) & {*rank, "TORCHELASTIC_RUN_ID", "PET_NNODES"}
    training = found[TRAIN].environment(base)
    assert "SLURM_PROCID" in training
    assert "PET_NNODES" not in training


def test_output_is_unbuffered_unless_the_user_says_otherwise():
    spec = specs(make(ON_CPU))[TRAIN]
    assert spec.environment({})["PYTHONUNBUFFERED"] == "1"
    assert spec.environment({"PYTHONUNBUFFERED": ""})["PYTHONUNBUFFERED"] == ""


def test_the_command_lines():
    found = specs(make("train.cpu_ranks=2", "teacher.python=/bin/sh", "train.torchrun_args=--tee 3"))
    assert found[TEACHER].argv[:3] == ("/bin/sh", "-m", "shmbridge.teacher.main")
    command = shlex.join(found[TRAIN].argv)
    assert command.endswith("-- --standalone --local-addr=127.0.0.1 --nproc-per-node 2 --tee 3 -m package.train")
    assert found[TEACHER].set["SHMBRIDGE_SESSION"] == found[TRAIN].set["SHMBRIDGE_SESSION"] == "TOKEN@1"


def test_logs_go_to_the_run_directory_unless_torchrun_was_told_otherwise():
    def command(args: str) -> str:
        return shlex.join(torchrun.command(torchrun.split(args), 2, ["t.py"], Path("logs"), patience_s=30))

    assert "--log-dir logs --redirects 3" in command("")
    for own in ("--tee 3", "--t 3", "-t3", "-r 3", "--redirects=3", "--log_dir /x"):
        assert "--log-dir logs" not in command(own)


def test_without_a_teacher_there_is_one_job_and_the_bridge_is_off():
    planned = make("train.cpu_ranks=2", "enabled=false", "teacher.model=''")
    assert planned.memory is None
    assert {name: spec.set["SHMBRIDGE_SESSION"] for name, spec in specs(planned).items()} == {TRAIN: "off"}


@pytest.mark.parametrize(
    "args",
    [
        "--max-restarts 3",
        "--max_restarts=1",
        "--nnodes=2",
        "--nproc-per-node 4",
        "--nproc_per_node=4",
        "--np 4",
        "--nn=2",
        "--v",
    ],
)
def test_flags_that_are_the_launchers_are_refused(args):
    with pytest.raises(ConfigError, match="which shmbridge-launch refuses"):
        make(ON_CPU, f"train.torchrun_args={args}")


@pytest.mark.parametrize("args", ["--max-restarts 0", "--nnodes=1", "--nnodes 1:1", "--standalone", "--no-python"])
def test_flags_that_change_nothing_are_not(args):
    make(ON_CPU, f"train.torchrun_args={args}")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([], "the training command is missing"),
        (["python", "train.py"], "give the script alone"),
        (["torchrun", "train.py"], "starts torchrun itself"),
        (["nowhere.py"], "'nowhere.py' does not exist"),
        (["-m"], "without a module"),
    ],
)
def test_training_commands_that_are_refused(script, message):
    with pytest.raises(ConfigError, match=message):
        make("train.cpu_ranks=2", script=tuple(script))


def test_a_description_shows_no_variable_but_ours():
    planned = make("train.cpu_ranks=2")
    base = {"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "secret", "SLURM_JWT": "secret", "RANK": "3"}
    text = summary.describe(planned, planned.jobs(Path("runs/x"), "TOKEN@1"), base)
    assert "secret" not in text
    assert "without RANK SLURM_JWT" in text
    assert "OMP_NUM_THREADS=4" in text
