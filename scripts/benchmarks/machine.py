"""Cores to pin to, and the facts that stand above every table."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "numpy", "pyzmq", "posix_ipc", "shmbridge")


def physical_cores() -> list[int]:
    """One allowed CPU of each physical core: hardware threads of one core share its caches and its wake-ups."""
    allowed = sorted(os.sched_getaffinity(0))
    seen: set[str] = set()
    cores = []
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text().strip() if siblings.exists() else str(cpu)
        if core not in seen:
            seen.add(core)
            cores.append(cpu)
    return cores


def facts() -> dict[str, str | int]:
    """CPU model, cores, virtualisation, memory, kernel."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cpus_allowed": len(os.sched_getaffinity(0)),
        "physical_cores_allowed": len(physical_cores()),
        "virtual_machine": "yes" if re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.M) else "no",
        "memory_gib": round(pages * page / 2**30),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that carry something here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def load() -> list[float]:
    """The load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]
