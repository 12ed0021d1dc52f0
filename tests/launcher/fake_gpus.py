"""A made-up nvidia-smi and a made-up torch, which programs find first on PATH and PYTHONPATH."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

ROW = "{number}, GPU-{letter}, 81559, 81000, {mode}, {mig}, 550.54.15, NVIDIA H100 80GB HBM3"

TORCH = """
import json, sys
cards, strangers = json.loads({cards!r}), json.loads({strangers!r})
__version__ = "2.9.0+cu128"
class Properties:
    def __init__(self, card):
        self.name, self.uuid, self.total_memory = card["name"], card["uuid"], card["total"]
class cuda:
    init = staticmethod(lambda: None)
    device_count = staticmethod(lambda: len(cards))
    get_device_properties = staticmethod(lambda index: Properties(cards[index]))
    mem_get_info = staticmethod(lambda index: (cards[index]["total"] - 2**30, cards[index]["total"]))
    can_device_access_peer = staticmethod(lambda a, b: [a, b] not in strangers)
class version:
    cuda, hip = "12.8", None
"""


def nvidia_smi(directory: Path, script: str) -> dict[str, str]:
    """The environment of a program that finds a shell script as nvidia-smi."""
    path = directory / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def rows(count: int, mode: str = "Default", mig: Sequence[int] = ()) -> str:
    """A script for nvidia_smi() that finds `count` GPUs, with MIG enabled on some."""
    table = [
        ROW.format(number=i, letter="abcdefgh"[i], mode=mode, mig="Enabled" if i in mig else "Disabled")
        for i in range(count)
    ]
    return "cat <<END\n" + "\n".join(table) + "\nEND"


def torch(directory: Path, count: int, strangers: Sequence[Sequence[int]] = ()) -> dict[str, str]:
    """The environment of a program that finds a torch with `count` GPUs; `strangers` have no peer access. No nvidia-smi is
    in it."""
    cards = [{"name": "NVIDIA H100", "uuid": f"0000-{i}", "total": 80 * 2**30} for i in range(count)]
    (directory / "torch.py").write_text(TORCH.format(cards=json.dumps(cards), strangers=json.dumps(strangers)))
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return {**environment, "PYTHONPATH": f"{directory}:{Path.cwd()}", "PATH": str(directory)}
