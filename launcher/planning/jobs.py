"""Config, training command and machine to job specs and a memory plan. Nothing is started or created here."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from launcher.planning import memory, model_card, placement, plane_choice, torchrun
from launcher.planning.gpus import Gpu
from launcher.planning.machine import Machine
from launcher.planning.memory import MemoryPlan
from launcher.planning.plane_choice import PlaneChoice
from shmbridge.config import Config
from shmbridge.errors import ConfigError
from shmbridge.shm.session import OFF, SESSION_VARIABLE, Token

TEACHER, TRAIN, TORCHRUN = "teacher", "train", "torchrun"

# What tells a process that it is a rank of some world. The teacher is a rank of none.
_OF_A_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_*", "TORCHELASTIC_*", "PET_*", "SLURM_*"),
    *("OMPI_COMM_WORLD_*", "PMI_*", "PMIX_*", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
)
# Of torchrun: defaults for its flags, which train.torchrun_args is the way to set; and what tells its ranks, which it is none of.
_OF_TORCHRUN = ("PET_*", "LOCAL_RANK")
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch 2.9 and later reads the first too
_UNSHAREABLE = ("expandable_segments:true", "backend:cudamallocasync")


@dataclass(frozen=True)
class JobSpec:
    """One job: what is executed, and how its environment differs from the launcher's."""

    name: str  # teacher, or teacher0, teacher1, ... where there are several; TRAIN
    who: str  # as people are told: `teacher`, `teacher 1`, TORCHRUN
    replica: int | None  # which teacher it is; None for training
    argv: tuple[str, ...]
    set: Mapping[str, str]
    removed: tuple[str, ...]  # patterns of variable names
    log: Path  # stdout and stderr of the job's first process
    reads_terminal: bool = False  # has the launcher's stdin where that is a terminal; all others read /dev/null
    exports: bool = False  # CUDA memory, so that the allocator must be one whose memory others can open

    def within(self, token: Token) -> JobSpec:
        """The same job for another generation."""
        return replace(self, set={**self.set, SESSION_VARIABLE: str(token)})

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of the job, from the launcher's."""
        removed = self.removes(base)
        kept = {name: value for name, value in base.items() if name not in removed}
        if self.exports:
            kept, _ = shareable(kept)
        return {"PYTHONUNBUFFERED": "1", **kept, **self.set}  # so that a log shows a line when it is printed

    def removes(self, base: Mapping[str, str]) -> list[str]:
        """Variables of `base` that the job does not get."""
        return sorted(name for name in base if any(fnmatchcase(name, pattern) for pattern in self.removed))

    def strips(self, base: Mapping[str, str]) -> dict[str, list[str]]:
        """Options that are removed for the job, by the variable of `base` that has them."""
        return shareable(base)[1] if self.exports else {}


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs, before anything is started."""

    config: Config  # its plane is the choice's
    script: tuple[str, ...]  # the training command
    ranks: int
    teachers: tuple[tuple[Gpu, ...], ...]  # the GPUs of each replica, none on the CPU; empty where the bridge is off
    train_gpus: tuple[Gpu, ...]
    threads: tuple[int | None, int | None]  # of each teacher, of each rank; None: torch's or torchrun's default
    memory: MemoryPlan | None  # None where the bridge is off
    plane: PlaneChoice | None  # None where the bridge is off

    def jobs(self, run: Path, session: str) -> tuple[JobSpec, ...]:
        """The jobs of a run in directory `run`; `session` is the text of SHMBRIDGE_SESSION."""
        teachers = [self._teacher(i, run, session) for i in range(len(self.teachers))]
        return (*teachers, self._train(run, session if self.config.enabled else OFF))

    def _teacher(self, replica: int, run: Path, session: str) -> JobSpec:
        python, own = self.config.teacher.python or sys.executable, self.teachers[replica]
        argv = (python, "-m", "shmbridge.teacher.main", "--teacher-index", str(replica), "--gpus", str(len(own)))
        variables = _variables(session, placement.visible(own, self.train_gpus), self.threads[0])
        if own:  # a stream for each lane; streams that share one of CUDA's connections hold each other up
            variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
        who = placement.teacher_name(replica, len(self.teachers))
        name = who.replace(" ", "")
        log = run / f"{name}.log"
        return JobSpec(name, who, replica, argv, variables, _OF_A_RANK, log, exports=self.config.plane == "cuda_ipc")

    def _train(self, run: Path, session: str) -> JobSpec:
        args = torchrun.split(self.config.train.torchrun_args)
        timeouts = self.config.timeouts
        patience_s = timeouts.save_s + timeouts.shutdown_s  # the launcher ends the ranks earlier
        command = torchrun.command(args, self.ranks, self.script, run / "train", patience_s)
        teacher_gpus = list(itertools.chain(*self.teachers))
        variables = _variables(session, placement.visible(self.train_gpus, teacher_gpus), self.threads[1])
        alone = self.ranks == 1  # a debugger in one of several ranks would read for all
        argv, log = (sys.executable, *command), run / "torchrun.log"
        return JobSpec(TRAIN, TORCHRUN, None, argv, variables, _OF_TORCHRUN, log, reads_terminal=alone)


def plan(config: Config, script: Sequence[str], machine: Machine, chosen: PlaneChoice | None = None) -> Plan:
    """The plan for the plane that was `chosen`, or for the one that the settings imply.

    Raises:
        ConfigError: settings contradict each other, or a GPU, the teacher's interpreter or a local model does not exist.
        PlanError: the payload is not one that the model can give.
    """
    torchrun.check_script(script, torchrun.split(config.train.torchrun_args))
    teacher, train = placement.teacher_and_train_gpus(config, machine.gpus)
    ranks = len(train) or config.train.cpu_ranks
    replicas = placement.replica_count(config.teacher, len(teacher), ranks) if config.enabled else 0
    teachers = placement.shares(teacher, replicas)
    counted = None
    if replicas:
        if not shutil.which(config.teacher.python or sys.executable):
            raise ConfigError(
                f"teacher.python is {config.teacher.python}; expected an executable file, the Python interpreter of the teacher's "
                "environment. Correct the path, or leave teacher.python out to use the launcher's."
            )
        chosen = chosen or plane_choice.by_settings(config, teacher, train)
        config = msgspec.structs.replace(config, plane=chosen.plane)
        counted = memory.plan(config, model_card.read(config.teacher), teachers, machine, train)
    threads = _threads(config, machine.cores, ranks, replicas)
    return Plan(config, tuple(script), ranks, teachers, tuple(train), threads, counted, chosen)


def _variables(session: str, visible: str, threads: int | None) -> dict[str, str]:
    variables = {SESSION_VARIABLE: session, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
    if threads is not None:
        variables["OMP_NUM_THREADS"] = variables["MKL_NUM_THREADS"] = str(threads)
    return variables


def _threads(config: Config, cores: int, ranks: int, teachers: int) -> tuple[int | None, int | None]:
    """CPU threads of each teacher and of each rank. Jobs on the CPU divide the cores."""
    teacher = config.teacher.cpu_threads
    if teacher is None and teachers and not config.teacher.gpus:
        teacher = max(1, cores // 2 // teachers)
    rank = config.train.cpu_threads
    if rank is None and not config.train.gpus:
        rank = max(1, (cores - teachers * (teacher or 0)) // ranks)
    return teacher, rank


def shareable(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """`environment` without options of torch's CUDA allocator under which other processes cannot open its memory, and these
    options by the variable that has them. Training often needs them and the teacher rarely does, so they are removed for
    the teacher alone. A variable that becomes empty is removed."""
    kept, stripped = dict(environment), {}
    for name in _ALLOCATOR_VARIABLES:
        # Split at every comma, also within brackets; joining the rest restores them.
        options = [option.strip() for option in environment.get(name, "").split(",") if option.strip()]
        refused = [option for option in options if option.replace(" ", "").lower() in _UNSHAREABLE]
        if not refused:
            continue
        stripped[name] = refused
        kept[name] = ",".join(option for option in options if option not in refused)
        if not kept[name]:
            del kept[name]
    return kept, stripped
