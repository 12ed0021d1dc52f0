"""Config, training command and machine to job specs and a memory plan. Nothing is started or created here."""

from __future__ import annotations

import fnmatch
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import gpus, memory, model_card, torchrun
from launcher.gpus import Gpu
from launcher.machine import Machine
from launcher.memory import MemoryPlan
from launcher.text import table
from shmbridge.config import Config
from shmbridge.errors import ConfigError
from shmbridge.session import OFF, SESSION_VARIABLE

TEACHER, TRAIN = "teacher", "train"

# What tells a process that it is a rank of some world. The teacher is a rank of none.
OF_A_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_*", "TORCHELASTIC_*", "PET_*", "SLURM_*"),
    *("OMPI_COMM_WORLD_*", "PMI_*", "PMIX_*", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
)
# Defaults for torchrun's flags; train.torchrun_args is the way to set those.
_OF_TORCHRUN = ("PET_*",)


@dataclass(frozen=True)
class JobSpec:
    """One job: what is executed, and how its environment differs from the launcher's."""

    name: str  # TEACHER or TRAIN
    argv: tuple[str, ...]
    set: Mapping[str, str]
    removed: tuple[str, ...]  # patterns of variable names
    log: Path  # stdout and stderr of the job's first process

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The job's whole environment, made of the launcher's."""
        kept = {name: value for name, value in base.items() if not _matches(name, self.removed)}
        return {"PYTHONUNBUFFERED": "1", **kept, **self.set}  # so that a log shows a line when it is printed

    def removes(self, base: Mapping[str, str]) -> list[str]:
        """Names in `base` that the job does not get."""
        return sorted(name for name in base if _matches(name, self.removed))


@dataclass(frozen=True)
class Plan:
    """A run before anything of it exists."""

    config: Config
    script: tuple[str, ...]  # the training command
    ranks: int
    teacher_gpus: tuple[Gpu, ...]
    train_gpus: tuple[Gpu, ...]
    visible: tuple[str, str]  # CUDA_VISIBLE_DEVICES of teacher and training
    threads: tuple[int | None, int | None]  # of the teacher, of each rank; None: torch's or torchrun's default
    memory: MemoryPlan | None  # None where the bridge is off

    def jobs(self, run: Path, session: str) -> tuple[JobSpec, ...]:
        """The jobs of a run in directory `run`; `session` is the text of SHMBRIDGE_SESSION."""
        train = self._train(run, session if self.config.enabled else OFF)
        return (self._teacher(run, session), train) if self.config.enabled else (train,)

    def _teacher(self, run: Path, session: str) -> JobSpec:
        python = self.config.teacher.python or sys.executable
        argv = (python, "-m", "shmbridge.teacher_job", "--teacher-index", "0")
        return JobSpec(TEACHER, argv, self._variables(0, session), OF_A_RANK, run / "teacher.log")

    def _train(self, run: Path, session: str) -> JobSpec:
        args = torchrun.split(self.config.train.torchrun_args)
        command = torchrun.command(args, self.ranks, self.script, run / "train", run / "train" / "failures.json")
        variables = self._variables(1, session)
        return JobSpec(TRAIN, (sys.executable, *command), variables, _OF_TORCHRUN, run / "torchrun.log")

    def _variables(self, job: int, session: str) -> dict[str, str]:
        variables = {
            SESSION_VARIABLE: session,
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": self.visible[job],
        }
        threads = self.threads[job]
        if threads is not None:
            variables["OMP_NUM_THREADS"] = variables["MKL_NUM_THREADS"] = str(threads)
        return variables


def make(config: Config, script: Sequence[str], machine: Machine) -> Plan:
    """Raises ConfigError for what contradicts itself, names a GPU that is not there, or a local model that is not."""
    torchrun.check_script(script, torchrun.split(config.train.torchrun_args))
    teacher, train = _gpu_numbers(config)
    visible = gpus.assign(teacher, train, machine.gpus)
    ranks = len(train) or config.train.cpu_ranks
    teacher_gpus = tuple(machine.gpus[i] for i in teacher)
    planned = None
    if config.enabled:
        planned = memory.plan(config, ranks, model_card.read(config.teacher), teacher_gpus, machine)
    return Plan(
        config=config,
        script=tuple(script),
        ranks=ranks,
        teacher_gpus=teacher_gpus,
        train_gpus=tuple(machine.gpus[i] for i in train),
        visible=visible,
        threads=_threads(config, machine.cores, ranks),
        memory=planned,
    )


def describe(plan: Plan, jobs: Sequence[JobSpec], base: Mapping[str, str]) -> str:
    """The command lines, what is set and removed in their environment, and the memory plan. No other variable is shown."""
    parts = []
    for job in jobs:
        rows = [(f"{name}={shlex.quote(value)}",) for name, value in job.set.items()]
        removed = job.removes(base)
        if removed:
            rows.append((f"without {' '.join(removed)}",))
        parts.append(f"{job.name}\n  {shlex.join(job.argv)}\n\n{table(rows)}\n\n  log {job.log}")
    if plan.memory:
        parts.append(f"memory\n{plan.memory}")
    return "\n\n".join(parts) + "\n"


def _gpu_numbers(config: Config) -> tuple[list[int], list[int]]:
    teacher, train = config.teacher.gpus, config.train.gpus
    if train and config.train.cpu_ranks:
        raise ConfigError(
            f"train.gpus is {train!r} and train.cpu_ranks is {config.train.cpu_ranks}: train on GPUs or on the CPU."
        )
    if not train and not config.train.cpu_ranks:
        raise ConfigError("no training ranks: give --train-gpus 0-6, or --cpu 2 for two ranks on the CPU.")
    with_teacher = bool(teacher) and config.enabled
    return (
        gpus.parse(teacher, "teacher.gpus") if with_teacher else [],
        gpus.parse(train, "train.gpus") if train else [],
    )


def _threads(config: Config, cores: int, ranks: int) -> tuple[int | None, int | None]:
    """CPU threads of the teacher and of each rank: jobs on the CPU share the cores, so that they do not fight."""
    teacher = config.teacher.cpu_threads
    if teacher is None and config.enabled and not config.teacher.gpus:
        teacher = max(1, cores // 2)
    rank = config.train.cpu_threads
    if rank is None and not config.train.gpus:
        rank = max(1, (cores - (teacher or 0 if config.enabled else 0)) // ranks)
    return teacher, rank


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
