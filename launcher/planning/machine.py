"""What this machine has, as far as a plan needs it, and what the kernel counts in this process's cgroup, version 1 or 2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from launcher.planning import gpus
from launcher.planning.gpus import Gpu

_MOUNT = Path("/sys/fs/cgroup")
_LIMIT_AND_USAGE = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


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
    available = _field(Path("/proc/meminfo"), "MemAvailable:")
    assert available is not None
    limits = [left for cgroup in _cgroups() if (left := _left_in(cgroup)) is not None]
    ram_free = min([available * 1024, *limits])
    return Machine(len(os.sched_getaffinity(0)), shm.f_bavail * shm.f_frsize, ram_free, found)


def oom_kills() -> int | None:
    """How many processes of the cgroup the kernel has killed because memory ran out; None if that cannot be read."""
    files = [directory / name for directory in _cgroups() for name in ("memory.events", "memory.oom_control")]
    return next((count for file in files if (count := _field(file, "oom_kill")) is not None), None)


def oom_kills_since(before: int | None) -> int | None:
    """The increase of `oom_kills` since `before`; None if either could not be read."""
    now = oom_kills()
    return None if now is None or before is None else now - before


def _cgroups() -> list[Path]:
    """The process's cgroup and its parents; inside a container the mount is often the cgroup itself."""
    found: list[Path] = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        mount = _MOUNT if number == "0" else _MOUNT / "memory"
        own = mount / path.lstrip("/")
        found += [own, *(parent for parent in own.parents if parent.is_relative_to(mount))]
    return found


def _left_in(cgroup: Path) -> int | None:
    """Bytes until the memory limit of a cgroup; None if it has none."""
    for names in _LIMIT_AND_USAGE:
        limit, usage = (_read(cgroup / name).strip() for name in names)
        if limit.isdigit() and usage.isdigit():
            # The kernel gives up file cache before it kills anything.
            return max(0, int(limit) - int(usage) + (_field(cgroup / "memory.stat", "inactive_file") or 0))
    return None


def _field(path: Path, key: str) -> int | None:
    """The number that follows `key` in a file with a key and a number on each line; None if there is none."""
    for line in _read(path).splitlines():
        words = line.split()
        if words[:1] == [key] and words[1:] and words[1].isdigit():
            return int(words[1])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
