"""Which plane a run uses, and why. Pure: process/trial.py makes the trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from launcher.console.text import listed
from launcher.plan import placement
from launcher.plan.gpus import Gpu
from shmbridge.config import Config
from shmbridge.errors import ConfigError, PlanError


class PlaneChoice(NamedTuple):
    """A plane and the reason for it. If there is no reason yet, a trial must confirm it."""

    plane: Literal["cuda_ipc", "host"]
    reason: str = ""

    @property
    def untried(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return f"{self.plane}, if a trial at the start passes" if self.untried else f"{self.plane}: {self.reason}"


class GpuPair(NamedTuple):
    """A training GPU, and the GPU of the teacher that its ranks read from."""

    replica: int
    teacher: Gpu
    train: Gpu
    device: int  # the training GPU's number within the training job

    def __str__(self) -> str:
        return f"GPU {self.teacher.number} and GPU {self.train.number}"


def by_settings(config: Config, teachers: Sequence[Sequence[Gpu]], train: Sequence[Gpu]) -> PlaneChoice:
    """The choice that follows from the settings alone. Each teacher has its GPUs, each rank one of `train`.

    Raises:
        ConfigError: plane is cuda_ipc, and a job has no GPU.
    """
    if config.plane == "host":
        return PlaneChoice("host", "as the settings say")
    on_cpu = [job for job, own in (("the teacher", teachers[0]), ("training", train)) if not own]
    if not on_cpu:
        return PlaneChoice("cuda_ipc")
    where = f"{listed(on_cpu)} {'are' if len(on_cpu) > 1 else 'is'} on the CPU"
    if config.plane == "cuda_ipc":
        raise ConfigError(
            f"plane is cuda_ipc, which needs GPUs on both sides: {where}. Give --teacher-gpu and --train-gpus, or leave "
            "plane out."
        )
    return PlaneChoice("host", f"no GPUs on both sides ({where})")


def by_trial(config: Config, wanted: Sequence[GpuPair], trial: Callable[[], str | None]) -> PlaneChoice:
    """The plane of a run with GPUs on both sides. `trial` returns None, or one line that tells why cuda_ipc does not
    work.

    Raises:
        PlanError: plane is cuda_ipc, and the trial failed.
    """
    reason = trial()
    if reason is None:
        return PlaneChoice("cuda_ipc", f"opened, read and checked between {between(wanted)}")
    cards = [gpu for pair in wanted for gpu in (pair.teacher, pair.train)]
    exclusive = next((gpu for gpu in cards if gpu.compute_mode.startswith("Exclusive")), None)
    if exclusive:
        reason += f"; {placement.mode(exclusive)} (`sudo nvidia-smi -c 0` allows several)"
    if config.plane == "cuda_ipc":
        raise PlanError(
            f"plane is cuda_ipc, and its trial failed: {reason}.\n\nExpected: training opens the teacher's memory and reads what "
            f"was written there, between {between(wanted)}. Mend what the reason names, or set plane=host (replies go through "
            "host memory), or plane=auto (cuda_ipc where the trial passes)."
        )
    return PlaneChoice("host", reason)


def pairs(teachers: Sequence[Sequence[Gpu]], train: Sequence[Gpu]) -> tuple[GpuPair, ...]:
    """Each pair of GPUs that a lane connects, once. Lane i is served by replica i % replicas, on its first GPU."""
    cards = list(dict.fromkeys(train))
    found = {
        GpuPair(lane % len(teachers), teachers[lane % len(teachers)][0], gpu, cards.index(gpu))
        for lane, gpu in enumerate(train)
    }
    return tuple(sorted(found, key=lambda pair: (pair.replica, pair.device)))


def between(wanted: Sequence[GpuPair]) -> str:
    """`GPU 7 and GPUs 0-6`."""
    trained: dict[int, list[int]] = {}
    for pair in wanted:
        trained.setdefault(pair.teacher.number, []).append(pair.train.number)
    return ", ".join(f"GPU {number} and {placement.gpu_names(others)}" for number, others in trained.items())
