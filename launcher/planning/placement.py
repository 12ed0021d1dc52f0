"""Which GPUs and lanes each process has: lists of GPUs, replicas of the teacher, what each job sees. Pure.

Replica i takes the i-th contiguous share of the teacher's GPUs, and serves the lanes i, i + replicas, i + 2 x replicas,
... A job sees the GPUs on the other side of its bridge too, because a CUDA IPC handle opens only on a device that the
process sees. Its own GPUs come first, so that cuda:0 is one of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from launcher.console.text import listed, ranges
from launcher.planning.gpus import Gpu
from shmbridge.config import Config, TeacherConfig
from shmbridge.errors import ConfigError

T = TypeVar("T")


def teacher_and_train_gpus(config: Config, gpus: Sequence[Gpu]) -> tuple[list[Gpu], list[Gpu]]:
    """The teacher's GPUs, and the GPU of each rank, among the machine's `gpus`. An empty list means the CPU, or that the
    bridge is off.

    Raises:
        ConfigError: the settings name no ranks, or ranks on GPUs and on the CPU; a GPU does not exist, or its mode does not
            allow what the run does with it.
    """
    if config.train.gpus and config.train.cpu_ranks:
        raise ConfigError(
            f"train.gpus is {config.train.gpus!r} and train.cpu_ranks is {config.train.cpu_ranks}: train on GPUs or on the CPU."
        )
    if not config.train.gpus and not config.train.cpu_ranks:
        raise ConfigError("no training ranks: give --train-gpus 0-6, or --cpu 2 for two ranks on the CPU.")
    teacher = parse_gpus(config.teacher.gpus, "teacher.gpus") if config.teacher.gpus and config.enabled else []
    train = parse_gpus(config.train.gpus, "train.gpus", shared=True) if config.train.gpus else []
    for setting, numbers in (("teacher.gpus", teacher), ("train.gpus", train)):
        for number in numbers:
            if number >= len(gpus):
                there_is = "this process sees none (`shmbridge-launch doctor` tells why). Without GPUs use --cpu 2."
                if gpus:
                    of_machine = ", ".join(gpu.visible for gpu in gpus)
                    there_is = f"this process sees {gpu_names(range(len(gpus)))} (of the machine: {of_machine})."
                raise ConfigError(f"{setting} names GPU {number}, which does not exist; {there_is}")
            problem = unusable(gpus[number], [*teacher, *train].count(number))
            if problem:
                raise ConfigError(f"{setting} names GPU {number}. {problem}")
    return [gpus[number] for number in teacher], [gpus[number] for number in train]


def parse_gpus(text: str, setting: str, shared: bool = False) -> list[int]:
    """The numbers of `0-6`, `7` or `0,2,5`, in the order given; `shared`: one GPU may have several ranks, as in `0,0`.

    Raises:
        ConfigError: the list is empty or garbled, names a GPU twice that is not shared, or ranks do not share GPUs in turn;
            names `setting`.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found:
            raise ConfigError(f"{setting} is {text!r}: {part!r} is no GPU. Write 7, 0-6 or 0,2,5.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ConfigError(f"{setting} is {text!r}: the range {part.strip()} runs backwards and holds no GPU.")
        numbers += range(first, last + 1)
    cards = list(dict.fromkeys(numbers))
    if not shared and len(cards) < len(numbers):
        twice = next(number for number in cards if numbers.count(number) > 1)
        raise ConfigError(f"{setting} is {text!r}: GPU {twice} is given twice.")
    in_turn = [cards[rank % len(cards)] for rank in range(len(numbers))]
    if numbers != in_turn:
        raise ConfigError(
            f"{setting} is {text!r}: ranks that share GPUs take them in turn, so that LOCAL_RANK tells a rank its GPU. Write "
            f"{','.join(map(str, in_turn))}."
        )
    return numbers


def unusable(gpu: Gpu, processes: int) -> str | None:
    """Why `processes` cannot use a GPU, with the remedy; None where its mode allows them."""
    if gpu.mig:
        return (
            f"{gpu} has MIG enabled, and MIG slices are not supported: name another GPU, or turn MIG off "
            f"(`sudo nvidia-smi -i {gpu.visible} -mig 0`)."
        )
    if gpu.compute_mode == "Prohibited" or (gpu.compute_mode.startswith("Exclusive") and processes > 1):
        return (
            f"{gpu.mode}, and {processes} process{'es' if processes > 1 else ''} would use it: name another GPU, or allow "
            f"it (`sudo nvidia-smi -i {gpu.visible} -c 0`)."
        )
    return None


def visible(own: Sequence[Gpu], others: Sequence[Gpu]) -> str:
    """CUDA_VISIBLE_DEVICES of a job: its own GPUs, then the other job's, each once. A job without GPUs sees none."""
    return ",".join(gpu.visible for gpu in dict.fromkeys((*own, *others))) if own else ""


def gpu_names(numbers: Sequence[int]) -> str:
    """`GPU 3`, `GPUs 0-6`."""
    return f"GPU{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def replica_count(teacher: TeacherConfig, gpus: int, ranks: int) -> int:
    """teacher.replicas if it is set; else one for each of the `gpus` GPUs, or one on the CPU.

    Raises:
        ConfigError: a replica would be without a GPU, would have more GPUs than another, or would have no rank to serve.
    """
    replicas = teacher.replicas or max(gpus, 1)
    fitting = [number for number in range(1, min(gpus, ranks) + 1) if gpus % number == 0]
    if gpus % replicas:
        why = "each replica needs its own GPU" if replicas > gpus else f"{replicas} does not divide {gpus}"
        raise ConfigError(
            f"teacher.replicas is {replicas}, and teacher.gpus names {gpus} GPU{'s' if gpus > 1 else ''} "
            f"({teacher.gpus}): {why}. Set teacher.replicas to {listed(list(map(str, fitting)), 'or')}, or name other GPUs."
        )
    if replicas <= ranks:
        return replicas
    given = f"teacher.replicas is {replicas}" if teacher.replicas else f"teacher.gpus names {gpus} GPUs, a replica each"
    there = "is 1 training rank" if ranks == 1 else f"are {ranks} training ranks"
    instead = f"Set teacher.replicas to {ranks} or less."
    if gpus:
        each = f"each over {gpus // fitting[-1]} GPUs" if gpus > fitting[-1] else "a GPU each"
        instead = f"Set teacher.replicas to {fitting[-1]} ({each}), or name fewer GPUs in teacher.gpus."
    raise ConfigError(
        f"{given}, and there {there}: a rank is served by one replica, so {replicas - ranks} would be idle. {instead}"
    )


def shares(items: Sequence[T], replicas: int) -> tuple[tuple[T, ...], ...]:
    """`items` in `replicas` contiguous shares of equal size. `replicas` divides their number, or is 0."""
    each = len(items) // max(replicas, 1)
    return tuple(tuple(items[i * each : (i + 1) * each]) for i in range(replicas))


def lanes(replica: int, replicas: int, ranks: int) -> range:
    """The lanes that a replica serves."""
    return range(replica, ranks, replicas)


def replica_of(lane: int, replicas: int) -> int:
    """The replica that a lane belongs to."""
    return lane % replicas


def teacher_name(replica: int, replicas: int) -> str:
    """The name of a replica in messages: `teacher 1`, or `teacher` if it is the only one."""
    return "teacher" if replicas == 1 else f"teacher {replica}"


def imbalance(ranks: int, replicas: int) -> str:
    """A remark if replicas serve different numbers of ranks; else empty."""
    over = ranks % replicas if replicas else 0
    if not over:
        return ""
    served = listed([str(len(lanes(i, replicas, ranks))) for i in range(replicas)])
    return (
        f"{ranks} ranks over {replicas} replicas: {served}. The slowest replica sets the step; "
        f"{ranks - over} or {ranks - over + replicas} ranks would be even"
    )
