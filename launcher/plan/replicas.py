"""How many copies of the teacher a run has, and which GPUs and lanes each of them gets. Pure.

Replica i takes the i-th contiguous share of the teacher's GPUs, and serves the lanes i, i + replicas, i + 2 x replicas,
...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from launcher.console.text import listed
from shmbridge.config import TeacherConfig
from shmbridge.errors import ConfigError

T = TypeVar("T")


def count(teacher: TeacherConfig, gpus: int, ranks: int) -> int:
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


def home(lane: int, replicas: int) -> int:
    """The replica that a lane belongs to."""
    return lane % replicas


def called(replica: int, replicas: int) -> str:
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
