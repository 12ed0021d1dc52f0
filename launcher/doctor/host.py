"""Checks that start no process and import nothing heavy. They are quick enough for every failure report."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shutil
import signal
import socket
import sys
from importlib import metadata
from pathlib import Path

from launcher.console.text import ranges, size
from launcher.doctor.checks import Check, Finding, fault, ok, warning
from launcher.sessions import dead
from shmbridge.shm import owner

OLDEST_TORCH = (2, 6)
SMALL_SHM = 2**30  # bytes; a run of any size needs more
FULL_SHM = 256 * 2**20
_OF_TEACHERS = ("transformers", "accelerate")  # a teacher that is a module of the user's needs neither
_REQUIRED = (*_OF_TEACHERS, "numpy", "posix_ipc", "msgspec", "PyYAML")
_OPTIONAL = ("gguf", "liger-kernel", "flash-attn", "py-spy", "shtab")
_PID_NAMESPACE_OF_THE_MACHINE = "pid:[4026531836]"  # a constant of the kernel

_PROC, _SYS, _DEV = Path("/proc"), Path("/sys"), Path("/dev")


def python() -> Finding:
    machine = platform.machine()
    found = f"{platform.python_version()}, {machine}, {platform.system()} {platform.release()}"
    if machine != "x86_64":
        return fault(found, "Run on x86-64: the shared-memory ring relies on its order of stores.")
    return ok(found)


def torch() -> Finding:
    """The installed version; nothing is imported."""
    version = _version("torch")
    if not version:
        return fault(f"not installed for {sys.executable}", "pip install torch")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < OLDEST_TORCH:
        return fault(version, f"Install torch {'.'.join(map(str, OLDEST_TORCH))} or later.")
    return ok(version)


def driver() -> Finding:
    """The version of the kernel module, and whether there are GPUs that it does not drive."""
    version = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", _read(_PROC / "driver/nvidia/version"))
    if version:
        return ok(version[1])
    if driver_is_loaded():
        return ok("loaded, of unknown version")
    cards = len(_nvidia_cards())
    if cards:
        return warning(
            f"none, though the PCI bus has {cards} NVIDIA GPU{'s' if cards > 1 else ''}",
            "Install NVIDIA's driver; in a container start it with the GPUs: docker run --gpus all.",
        )
    return ok("none, and no NVIDIA GPU")


def driver_is_loaded() -> bool:
    """Whether this process sees NVIDIA's kernel module or WSL's device."""
    return any(path.exists() for path in (_PROC / "driver/nvidia/version", _DEV / "nvidiactl", _DEV / "dxg"))


def shm() -> Finding:
    directory = str(owner.SHM_DIRECTORY)
    mounts = [line.split() for line in _read(_PROC / "self/mounts").splitlines()]
    kind = next((mount[2] for mount in reversed(mounts) if mount[1] == directory), "not mounted by itself")
    try:
        stat = os.statvfs(directory)
    except OSError as error:
        return fault(f"{directory}: {error.strerror}", f"mount -t tmpfs tmpfs {directory}")
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    found = f"{directory}: {size(total)}, {size(free)} free, {kind}"
    if stat.f_flag & os.ST_RDONLY or not os.access(directory, os.W_OK | os.X_OK):
        return fault(f"{found}, not writable", f"Make it writable: mount -o remount,rw,mode=1777 {directory}")
    if kind != "tmpfs":
        return warning(found, f"Mount a tmpfs, so that it is memory: mount -t tmpfs tmpfs {directory}")
    if total < SMALL_SHM:
        return warning(found, "Give it more: docker run --shm-size=16g; Kubernetes: an emptyDir with medium Memory.")
    if free < FULL_SHM:
        return warning(found, f"See what fills it: ls -lS {directory}; `shmbridge-launch clean` removes dead sessions.")
    return ok(found)


def memlock() -> Finding:
    """The limit of locked memory, which InfiniBand needs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return ok("unlimited")
    if (_DEV / "infiniband").exists():
        return warning(
            f"{size(limit)}, and this machine has InfiniBand",
            "ulimit -l unlimited; docker run --ulimit memlock=-1 (NCCL registers memory with the adapter).",
        )
    return ok(size(limit))


def ptrace_scope() -> Finding:
    """Who may read other processes' memory. Only py-spy needs it, for the stacks of a process that is stopped or not
    connected yet."""
    scope = _read(_PROC / "sys/kernel/yama/ptrace_scope").strip()
    if not scope:
        return ok("not restricted by Yama")
    meaning = {"0": "all processes of a user", "1": "children alone", "2": "root alone"}.get(scope, "nobody")
    found = f"{scope} ({meaning})"
    if scope != "0" and os.geteuid() and (shutil.which("py-spy") or Path(sys.executable).with_name("py-spy").exists()):
        return warning(f"{found}: py-spy adds no stacks to hang reports", "sudo sysctl kernel.yama.ptrace_scope=0")
    return ok(found)


def pidfd() -> Finding:
    """The launcher signals and watches its jobs by pidfd."""
    try:
        fd = os.pidfd_open(os.getpid())
        try:
            signal.pidfd_send_signal(fd, 0)
        finally:
            os.close(fd)
    except OSError as error:
        return fault(
            f"refused: {error.strerror}",
            "Linux 5.3 or later, and a seccomp profile that allows pidfd_open and pidfd_send_signal.",
        )
    return ok("works")


def pid_namespace() -> Finding:
    """CUDA IPC and the identity of processes need teacher and ranks in one namespace."""
    mine, of_children = (os.readlink(_PROC / f"self/ns/{name}") for name in ("pid", "pid_for_children"))
    if mine != of_children:
        return warning(
            f"{mine}, and {of_children} for children", "Start from a process whose children stay in its namespace."
        )
    return ok(f"{mine}, {'the machine' if mine == _PID_NAMESPACE_OF_THE_MACHINE else 'a container'}'s")


def host_name() -> Finding:
    name = socket.gethostname()
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError as error:
        return warning(
            f"{name} does not resolve ({error.strerror})",
            f"echo '127.0.0.1 {name}' | sudo tee -a /etc/hosts (torchrun started by hand waits for it; gloo warns)",
        )
    return ok(f"{name} is {', '.join(sorted(addresses))}")


def numa() -> Finding:
    nodes = {int(path.name[4:]) for path in (_SYS / "devices/system/node").glob("node[0-9]*")}
    allowed, cpus = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    found = f"{len(nodes) or 1} node{'s' if len(nodes) > 1 else ''}, {allowed} of {cpus} CPUs allowed"
    if len(nodes) > 1:
        near = {int(text) for card in _nvidia_cards() if (text := _read(card / "numa_node").strip()).isdigit()}
        found += f", GPUs at node {ranges(sorted(near))}" if near else ""
    return ok(found)


def sessions() -> Finding:
    """Sessions of this user whose launcher was killed."""
    ended = dead()
    if ended:
        return warning(f"{len(ended)} dead, with objects in /dev/shm", "shmbridge-launch clean")
    return ok("none dead")


def packages() -> Finding:
    """What shmbridge needs besides torch."""
    missing = [name for name in _REQUIRED if not _version(name)]
    found = ", ".join(f"{name} {_version(name)}" for name in _REQUIRED if name not in missing)
    if missing:
        finding = warning if set(missing) <= set(_OF_TEACHERS) else fault
        return finding(f"without {', '.join(missing)}; {found}", f"pip install {' '.join(missing)}")
    return ok(found)


def optional() -> Finding:
    """Optional packages that are installed."""
    return ok(", ".join(f"{name} {_version(name) or '-'}" for name in _OPTIONAL))


CHECKS: tuple[Check, ...] = (
    *(python, torch, driver, shm, memlock, ptrace_scope, pidfd, pid_namespace, host_name, numa, sessions),
    *(packages, optional),
)


def _version(package: str) -> str:
    """The installed version; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        module = {"PyYAML": "yaml"}.get(package, package.replace("-", "_"))
        return "of unknown version" if importlib.util.find_spec(module) else ""


def _nvidia_cards() -> list[Path]:
    """NVIDIA's display and 3D controllers on the PCI bus, also where no driver is loaded."""
    return [
        device
        for device in sorted((_SYS / "bus/pci/devices").glob("*"))
        if _read(device / "vendor").strip() == "0x10de" and _read(device / "class").startswith("0x03")
    ]


def _read(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
