"""Which GPUs there are. nvidia-smi lists them, or torch in a separate process.

A user's numbers count within what CUDA_VISIBLE_DEVICES allows, as Slurm and containers set it: with `4,5,6,7`, GPU 0 of
the command line is GPU 4 of the machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from shmbridge.errors import ConfigError
from shmbridge.plane import devices
from shmbridge.plane.devices import Devices

_FIELDS = "index,uuid,memory.total,memory.free,compute_mode,mig.mode.current,driver_version,name"
_QUERY = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
# Without persistence mode the driver initialises every GPU for each caller: some seconds for each.
NVIDIA_SMI_LIMIT_S = 60.0
TORCH_LIMIT_S = 120.0  # the import of torch from a cold disk, and a CUDA context on each GPU
_REAP_S = 1.0  # a driver that hangs keeps its callers in the kernel, where SIGKILL does not reach them
SLOW_DRIVER = (
    "Turn persistence mode on (`sudo nvidia-smi -pm 1`), so that the driver stays loaded; if it hangs still, look for NVRM "
    "and Xid in `dmesg`."
)
_NO_DRIVER = (
    "Mend the driver: a new one wants a reboot, and a container wants the GPUs (docker run --gpus all). Without GPUs use "
    "--cpu 2."
)


class Gpu(NamedTuple):
    """One GPU that this run may use."""

    number: int  # the user's number: the position within what is visible
    visible: str  # how CUDA_VISIBLE_DEVICES names it: an index of the machine or a UUID
    total_bytes: int
    free_bytes: int
    compute_mode: str = ""  # Default, Exclusive_Process or Prohibited; empty where only torch was asked, as below
    mig: bool = False  # it is divided into slices
    driver: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"GPU {self.number}"

    @property
    def mode(self) -> str:
        """A compute mode that excludes processes, and what it means."""
        allows = "no process" if self.compute_mode == "Prohibited" else "one process at a time"
        return f"{self} is in compute mode {self.compute_mode}, which allows {allows}"


class NvidiaSmiError(ConfigError):
    """nvidia-smi did not list GPUs that can be used."""

    def __init__(self, cause: Literal["hangs", "fails", "MIG"], problem: str, remedy: str) -> None:
        super().__init__(f"{problem}. {remedy}")
        self.cause, self.problem, self.remedy = cause, problem, remedy


def discover(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that `environment` allows, in the user's numbering; empty where there is no driver.

    Raises:
        ConfigError: nvidia-smi hangs, or it fails and torch finds no GPU either, or an entry of CUDA_VISIBLE_DEVICES is a
            MIG slice.
    """
    try:
        return of_nvidia_smi(environment)
    except NvidiaSmiError as error:
        found = of_torch(ask_torch(environment)) if error.cause == "fails" else []
        if not found:
            raise
        return found
    except OSError:
        return [] if environment.get("CUDA_VISIBLE_DEVICES") == "" else of_torch(ask_torch(environment))


def of_nvidia_smi(environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that nvidia-smi lists and `environment` allows.

    Raises:
        OSError: there is no nvidia-smi on PATH.
        NvidiaSmiError: it hangs or fails, or an entry of CUDA_VISIBLE_DEVICES is a MIG slice.
    """
    try:
        code, out, last_words = _ask(_QUERY, environment, NVIDIA_SMI_LIMIT_S)
    except TimeoutError as error:
        raise NvidiaSmiError("hangs", str(error), SLOW_DRIVER) from None
    if code != 0:
        raise NvidiaSmiError("fails", f"nvidia-smi failed (exit code {code}): {last_words}", _NO_DRIVER)
    return select_visible(out.decode(errors="replace"), environment.get("CUDA_VISIBLE_DEVICES"))


def ask_torch(environment: Mapping[str, str]) -> Devices:
    """The GPUs that torch sees, from a separate process, in the order that the jobs use.

    Raises:
        ConfigError: the process hangs or fails.
    """
    argv = [sys.executable, "-m", devices.__name__]
    try:
        code, out, last_words = _ask(argv, {**environment, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, TORCH_LIMIT_S)
    except TimeoutError:
        raise ConfigError(f"torch did not tell its GPUs within {TORCH_LIMIT_S:g} s. {SLOW_DRIVER}") from None
    found = devices.parse(out)
    if found is None:
        raise ConfigError(f"torch could not be asked for its GPUs (exit code {code}): {last_words}")
    return found


def _ask(argv: Sequence[str], environment: Mapping[str, str], limit_s: float) -> tuple[int, bytes, str]:
    """Run `argv` until it ends: its exit code, its stdout, and the last line that it printed anywhere. Everything that it
    started is killed after `limit_s` seconds, or if an exception comes.

    Raises:
        OSError: there is no such program.
        TimeoutError: it did not end in time.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    )
    assert process.stdout and process.stderr
    try:
        out, err = process.communicate(timeout=limit_s)
    except BaseException as error:
        try:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_REAP_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
        process.stdout.close()
        process.stderr.close()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"{argv[0]} gave no answer within {limit_s:g} s") from None
        raise
    lines = (out + b"\n" + err).decode(errors="replace").splitlines()
    return process.returncode, out, next((line.strip() for line in reversed(lines) if line.strip()), "")


def of_torch(found: Devices) -> list[Gpu]:
    """The GPUs that torch sees; CUDA_VISIBLE_DEVICES has been applied to them."""
    return [
        Gpu(number, gpu.uuid, gpu.total_bytes, gpu.free_bytes, name=gpu.name)
        for number, gpu in enumerate(found.devices)
    ]


def select_visible(table: str, visible: str | None) -> list[Gpu]:
    """The rows of nvidia-smi's `table` that a value of CUDA_VISIBLE_DEVICES allows; None allows all. A UUID may be
    shortened to a prefix. As in CUDA, the first entry that names no GPU ends the list.

    Raises:
        NvidiaSmiError: an entry is a MIG slice.
    """
    last = _FIELDS.count(",")  # a name may have commas
    rows = [[cell.strip() for cell in line.split(",", last)] for line in table.splitlines() if line.count(",") >= last]
    names = [row[0] for row in rows] if visible is None else [name.strip() for name in visible.split(",")]
    found: list[Gpu] = []
    for name in names:
        if name.startswith("MIG-"):
            problem = f"CUDA_VISIBLE_DEVICES names {name}: MIG slices are not supported"
            raise NvidiaSmiError("MIG", problem, "Set CUDA_VISIBLE_DEVICES to whole GPUs.")
        by_uuid = name.startswith("GPU-")
        row = next((row for row in rows if row[0] == name or (by_uuid and row[1].startswith(name))), None)
        if row is None:
            break
        total, free = (int(cell) * 2**20 if cell.isdigit() else 0 for cell in row[2:4])
        found.append(Gpu(len(found), name, total, free, row[4], row[5] == "Enabled", row[6], row[7]))
    return found
