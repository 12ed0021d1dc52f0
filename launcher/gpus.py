"""Which GPUs there are, and what each job sees of them. No torch: nvidia-smi is asked.

A user's numbers count within what CUDA_VISIBLE_DEVICES allows, as Slurm and containers set it: with `4,5,6,7`, GPU 0 of
the command line is the fourth of the machine. A job sees the GPUs on the other side of its bridge too, because a CUDA IPC
handle opens only on a device that the opener can see; it has its own first, so that its cuda:0 is its own.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shmbridge.errors import ConfigError

_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free", "--format=csv,noheader,nounits"]
_QUERY_TIMEOUT_S = 10


class Gpu(NamedTuple):
    """One GPU that this run may use."""

    number: int  # the user's number: the position within what is visible
    visible: str  # how CUDA_VISIBLE_DEVICES names it: an index of the machine or a UUID
    total_bytes: int
    free_bytes: int


def discover(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that `environment` allows, in the user's numbering; empty where there is no driver. Raises ConfigError."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return select_visible(answer.stdout, environment.get("CUDA_VISIBLE_DEVICES"))


def select_visible(table: str, visible: str | None) -> list[Gpu]:
    """The rows of nvidia-smi's `table` that a value of CUDA_VISIBLE_DEVICES allows; None allows all.

    As in CUDA, the first entry that names no GPU ends the list.

    Raises:
        ConfigError: an entry is a MIG slice.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.count(",") == 3]
    names = [row[0] for row in rows] if visible is None else [name.strip() for name in visible.split(",")]
    found: list[Gpu] = []
    for name in names:
        row = next((row for row in rows if _names(name, row)), None)
        if name.startswith("MIG-"):
            raise ConfigError(f"CUDA_VISIBLE_DEVICES names {name}: MIG slices are not supported; give whole GPUs.")
        if row is None:
            break
        found.append(Gpu(len(found), name, _mebibytes(row[2]), _mebibytes(row[3])))
    return found


def parse(text: str, setting: str, shared: bool = False) -> list[int]:
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
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice and not shared:
        raise ConfigError(f"{setting} is {text!r}: GPU {twice[0]} is given twice.")
    in_turn = _in_turn(numbers)
    if numbers != in_turn:
        raise ConfigError(
            f"{setting} is {text!r}: ranks that share GPUs take them in turn, so that LOCAL_RANK tells a rank its GPU. Write "
            f"{','.join(map(str, in_turn))}."
        )
    return numbers


def check(teacher: Sequence[int], train: Sequence[int], gpus: Sequence[Gpu]) -> None:
    """Raises ConfigError where a GPU does not exist."""
    for setting, numbers in (("teacher.gpus", teacher), ("train.gpus", train)):
        missing = [number for number in numbers if number >= len(gpus)]
        if missing:
            raise ConfigError(f"{setting} names GPU {missing[0]}, which does not exist; {_what_there_is(gpus)}")


def visible(own: Sequence[int], others: Sequence[int], gpus: Sequence[Gpu]) -> str:
    """CUDA_VISIBLE_DEVICES of a job: its own GPUs, then those across the bridge, each once. Without GPUs of its own it sees
    none."""
    return ",".join(gpus[number].visible for number in dict.fromkeys((*own, *others))) if own else ""


def _in_turn(numbers: Sequence[int]) -> list[int]:
    """The same GPUs for as many ranks, rank i on GPU i % GPUs."""
    cards = list(dict.fromkeys(numbers))
    return [cards[rank % len(cards)] for rank in range(len(numbers))]


def _names(name: str, row: Sequence[str]) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES means this row; a UUID may be shortened to a prefix."""
    return name == row[0] if name.isdigit() else name.startswith("GPU-") and row[1].startswith(name)


def _mebibytes(cell: str) -> int:
    return int(cell) * 2**20 if cell.isdigit() else 0


def _what_there_is(gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return "nvidia-smi finds none that this process may see. Without GPUs use --cpu 2."
    numbers = "is GPU 0" if len(gpus) == 1 else f"are GPUs 0 to {len(gpus) - 1}"
    return f"there {numbers} (of the machine: {', '.join(gpu.visible for gpu in gpus)})."
