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
from typing import NamedTuple

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
NO_DRIVER = "Mend the driver: a new one wants a reboot, and a container wants the GPUs (docker run --gpus all)."


class Answer(NamedTuple):
    """How a program ended, and what it printed."""

    code: int
    out: bytes
    err: bytes

    @property
    def last_words(self) -> str:
        """The last line that says something, of stderr or else of stdout."""
        lines = [line.strip() for text in (self.out, self.err) for line in text.decode(errors="replace").splitlines()]
        return next(filter(None, reversed(lines)), "")


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


def discover(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that `environment` allows, in the user's numbering; empty where there is no driver.

    Raises:
        ConfigError: nvidia-smi hangs, or it fails and torch finds no GPU either, or an entry of CUDA_VISIBLE_DEVICES is a
            MIG slice.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    try:
        answer = ask_nvidia_smi(environment)
    except TimeoutError as error:
        raise ConfigError(f"{error}. {SLOW_DRIVER}") from None
    except OSError:
        return [] if visible == "" else of_torch(ask_torch(environment))
    if answer.code == 0:
        return select_visible(answer.out.decode(errors="replace"), visible)
    found = of_torch(ask_torch(environment))
    if not found:
        raise ConfigError(
            f"nvidia-smi failed with exit code {answer.code}: {answer.last_words}\n\n{NO_DRIVER} Without GPUs use --cpu 2."
        )
    return found


def ask_nvidia_smi(environment: Mapping[str, str]) -> Answer:
    """The table of all GPUs, for select_visible.

    Raises:
        OSError: there is no nvidia-smi on PATH.
        TimeoutError: it gave no answer in time.
    """
    return _ask(_QUERY, environment, NVIDIA_SMI_LIMIT_S)


def ask_torch(environment: Mapping[str, str]) -> Devices:
    """The GPUs that torch sees, from a separate process, in the order that the jobs use.

    Raises:
        ConfigError: the process hangs or fails.
    """
    argv = [sys.executable, "-m", devices.__name__]
    try:
        answer = _ask(argv, {**environment, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, TORCH_LIMIT_S)
    except TimeoutError:
        raise ConfigError(f"torch did not tell its GPUs within {TORCH_LIMIT_S:g} s. {SLOW_DRIVER}") from None
    found = devices.parse(answer.out)
    if found is None:
        raise ConfigError(f"torch could not be asked for its GPUs (exit code {answer.code}): {answer.last_words}")
    return found


def _ask(argv: Sequence[str], environment: Mapping[str, str], limit_s: float) -> Answer:
    """Run `argv` until it ends. Everything that it started is killed after `limit_s` seconds, or if an exception comes.

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
    return Answer(process.returncode, out, err)


def of_torch(found: Devices) -> list[Gpu]:
    """The GPUs that torch sees; CUDA_VISIBLE_DEVICES has been applied to them."""
    return [
        Gpu(number, gpu.uuid, gpu.total_bytes, gpu.free_bytes, name=gpu.name)
        for number, gpu in enumerate(found.devices)
    ]


def select_visible(table: str, visible: str | None) -> list[Gpu]:
    """The rows of nvidia-smi's `table` that a value of CUDA_VISIBLE_DEVICES allows; None allows all.

    As in CUDA, the first entry that names no GPU ends the list. Columns that are missing at the end of a row are empty.

    Raises:
        ConfigError: an entry is a MIG slice.
    """
    width = len(_FIELDS.split(","))
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.count(",") >= 3]
    rows = [row + [""] * (width - len(row)) for row in rows]
    names = [row[0] for row in rows] if visible is None else [name.strip() for name in visible.split(",")]
    found: list[Gpu] = []
    for name in names:
        row = next((row for row in rows if _names(name, row)), None)
        if name.startswith("MIG-"):
            raise ConfigError(f"CUDA_VISIBLE_DEVICES names {name}: MIG slices are not supported; give whole GPUs.")
        if row is None:
            break
        memory = _mebibytes(row[2]), _mebibytes(row[3])
        found.append(Gpu(len(found), name, *memory, row[4], row[5] == "Enabled", row[6], ",".join(row[7:])))
    return found


def _names(name: str, row: Sequence[str]) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES means this row; a UUID may be shortened to a prefix."""
    return name == row[0] if name.isdigit() else name.startswith("GPU-") and row[1].startswith(name)


def _mebibytes(cell: str) -> int:
    return int(cell) * 2**20 if cell.isdigit() else 0
