"""The memory limit and the oom_kill counter of this process's cgroup, version 1 or 2. None where they cannot be
read."""

from __future__ import annotations

from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_LIMIT_AND_USAGE = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def available_bytes() -> int | None:
    """Bytes left until the tightest memory limit of the cgroup and its parents; None where there is no limit."""
    rooms = [room for directory in _directories() if (room := _room_in(directory)) is not None]
    return min(rooms, default=None)


def oom_kills() -> int | None:
    """How many processes of the cgroup the kernel has killed because memory ran out."""
    for directory in _directories():
        for name in ("memory.events", "memory.oom_control"):
            count = _field(directory / name, "oom_kill")
            if count is not None:
                return count
    return None


def oom_kills_since(before: int | None) -> int | None:
    """The increase of `oom_kills` since `before`; None if either could not be read."""
    now = oom_kills()
    return None if now is None or before is None else now - before


def _room_in(directory: Path) -> int | None:
    for limit_name, usage_name in _LIMIT_AND_USAGE:
        limit, usage = _number(directory / limit_name), _number(directory / usage_name)
        if limit is not None and usage is not None:
            # The kernel gives up file cache before it kills anything.
            return max(0, limit - usage + (_field(directory / "memory.stat", "inactive_file") or 0))
    return None


def _directories() -> list[Path]:
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


def _field(path: Path, key: str) -> int | None:
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
