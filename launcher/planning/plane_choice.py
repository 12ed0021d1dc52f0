"""Which plane a run uses, and why. Pure: process/cuda_ipc_trial.py makes the trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from launcher.console.text import listed
from launcher.planning.gpus import Gpu
from launcher.planning.placement import gpu_names, replica_of
from shmbridge.config import Config
from shmbridge.errors import ConfigError, PlanError


class PlaneChoice(NamedTuple):
    """A plane and the reason for it. If there is no reason yet, a trial must confirm it."""

    plane: Literal["cuda_ipc", "host"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.plane}: {self.reason}" if self.reason else f"{self.plane}, if a trial at the start passes"


class GpuPair(NamedTuple):
    """A training GPU, and the GPU of the teacher that its ranks read from."""

    replica: int
    teacher: Gpu
    train: Gpu
    device: int  # the training GPU's number within the training job

    def __str__(self) -> str:
        return f"{self.teacher} and {self.train}"


def by_settings(config: Config, teacher: Sequence[Gpu], train: Sequence[Gpu]) -> PlaneChoice:
    """The choice that follows from the settings alone.

    Raises:
        ConfigError: plane is cuda_ipc, and a job has no GPU.
    """
    if config.plane == "host":
        return PlaneChoice("host", "as the settings say")
    on_cpu = [job for job, own in (("the teacher", teacher), ("training", train)) if not own]
    if not on_cpu:
        return PlaneChoice("cuda_ipc")
    where = f"{listed(on_cpu)} {'are' if len(on_cpu) > 1 else 'is'} on the CPU"
    if config.plane == "cuda_ipc":
        raise ConfigError(
            f"plane is cuda_ipc, which needs GPUs on both sides: {where}. Give --teacher-gpu and --train-gpus, or leave "
            "plane out."
        )
    return PlaneChoice("host", f"no GPUs on both sides ({where})")


def by_trial(config: Config, pairs: Sequence[GpuPair], trial: Callable[[], str | None]) -> PlaneChoice:
    """The plane of a run with GPUs on both sides. `trial` returns None, or one line that tells why cuda_ipc does not
    work.

    Raises:
        PlanError: plane is cuda_ipc, and the trial failed.
    """
    reason = trial()
    if reason is None:
        return PlaneChoice("cuda_ipc", f"opened, read and checked between {between(pairs)}")
    gpus = [gpu for pair in pairs for gpu in (pair.teacher, pair.train)]
    exclusive = next((gpu for gpu in gpus if gpu.compute_mode.startswith("Exclusive")), None)
    if exclusive:
        reason += f"; {exclusive.mode} (`sudo nvidia-smi -c 0` allows several)"
    if config.plane == "cuda_ipc":
        raise PlanError(
            f"plane is cuda_ipc, and its trial failed: {reason}.\n\nExpected: training opens the teacher's memory and reads what "
            f"was written there, between {between(pairs)}. Mend what the reason names, or set plane=host (replies go through "
            "host memory), or plane=auto (cuda_ipc where the trial passes)."
        )
    return PlaneChoice("host", reason)


def gpu_pairs(teachers: Sequence[Sequence[Gpu]], train: Sequence[Gpu]) -> list[GpuPair]:
    """Each pair of GPUs that a lane connects, once. A replica's replies lie on its first GPU."""
    numbers = {gpu: number for number, gpu in enumerate(dict.fromkeys(train))}
    pairs = set()
    for lane, gpu in enumerate(train):
        replica = replica_of(lane, len(teachers))
        pairs.add(GpuPair(replica, teachers[replica][0], gpu, numbers[gpu]))
    return sorted(pairs, key=lambda pair: (pair.replica, pair.device))


def between(pairs: Sequence[GpuPair]) -> str:
    """`GPU 7 and GPUs 0-6`."""
    trained: dict[Gpu, list[int]] = {}
    for pair in pairs:
        trained.setdefault(pair.teacher, []).append(pair.train.number)
    return ", ".join(f"{teacher} and {gpu_names(numbers)}" for teacher, numbers in trained.items())
