"""What this machine has, as far as a plan needs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from launcher.plan import cgroup, gpus
from launcher.plan.gpus import Gpu


class Machine(NamedTuple):
    """The facts of a machine that a plan depends on."""

    cores: int  # that this process may run on
    shm_free: int  # bytes in /dev/shm
    ram_free: int  # bytes, within the cgroup's limit
    gpus: tuple[Gpu, ...] = ()


def look(with_gpus: bool) -> Machine:
    """Read the facts of this machine. nvidia-smi is run only if GPUs are wanted: it takes a second, or many without
    persistence mode.

    Raises:
        ConfigError: the GPUs cannot be listed, see gpus.discover.
    """
    shm = os.statvfs("/dev/shm")
    found = tuple(gpus.discover()) if with_gpus else ()
    return Machine(len(os.sched_getaffinity(0)), shm.f_bavail * shm.f_frsize, _ram_free(), found)


def _ram_free() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = cgroup.available_bytes()
    return available if limit is None else min(available, limit)
