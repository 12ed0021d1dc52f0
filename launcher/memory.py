"""The memory plan: what the run will take, where, and whether it fits. Checked before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from launcher.gpus import Gpu
from launcher.machine import Machine
from launcher.model_card import ModelCard
from launcher.text import size, table
from shmbridge import layout, offer
from shmbridge.config import Config, is_builder
from shmbridge.errors import PlanError
from shmbridge.offer import OutputSpec

SHM, RAM = "/dev/shm", "RAM"
_REMEDY = {
    SHM: "Lower ring.max_tokens (now {ring.max_tokens}) or ring.depth (now {ring.depth}), or give /dev/shm more "
    "(docker run --shm-size; Docker and Kubernetes give 64 MB unless told otherwise).",
    RAM: "Lower ring.max_tokens (now {ring.max_tokens}) or ring.depth (now {ring.depth}), take a smaller teacher.model, "
    "or raise the memory limit; /dev/shm counts as RAM.",
    "GPU": "The model goes whole to the first GPU of teacher.gpus. Set teacher.dtype=bfloat16, take a smaller teacher.model, "
    "or free that GPU.",
}


class Item(NamedTuple):
    """One row of the plan; `nbytes` is None where it is known only once the teacher has loaded."""

    what: str
    where: str
    nbytes: int | None


class MemoryPlan(NamedTuple):
    """Items, and the free bytes of each place."""

    items: tuple[Item, ...]
    free: dict[str, int]
    config: Config

    def needed(self, place: str) -> int:
        """Known bytes that `place` must hold. Shared memory is held by RAM."""
        return sum(item.nbytes or 0 for item in self.items if item.where == place or (place, item.where) == (RAM, SHM))

    def check(self) -> None:
        """Raises PlanError, with the table and the setting to change, where a place is too small."""
        for place, free in self.free.items():
            needed = self.needed(place)
            if needed > free:
                remedy = _REMEDY[place.split()[0]].format(ring=self.config.ring)
                raise PlanError(
                    f"the run needs {size(needed)} of {place}, and {size(free)} are free.\n\n{self}\n\n{remedy}"
                )

    def __str__(self) -> str:
        rows = [
            (item.what, item.where, "known once it has loaded" if item.nbytes is None else size(item.nbytes))
            for item in self.items
        ]
        totals = [
            (f"{place}", f"needs {size(self.needed(place))}", f"{size(free)} free") for place, free in self.free.items()
        ]
        return table(rows) + "\n\n" + table(totals)


def plan(config: Config, ranks: int, card: ModelCard, teacher_gpus: Sequence[Gpu], machine: Machine) -> MemoryPlan:
    """What a session of `ranks` lanes with this teacher takes."""
    ring = config.ring
    lane = layout.LaneLayout(ring.depth, ring.max_tokens)
    reply = _reply_bytes(config, card)
    gpu = teacher_gpus[0] if teacher_gpus else None  # the model goes whole to the first
    place = f"GPU {gpu.number}" if gpu else RAM
    items = (
        Item("control segment", SHM, layout.control_bytes(1)),
        Item(f"lanes: {ranks} ranks x {size(lane.nbytes)}", SHM, ranks * lane.nbytes),
        Item(_replies(config, ranks, reply), SHM, None if reply is None else ranks * reply),
        Item("teacher's weights", place, card.weight_bytes),
    )
    free = {SHM: machine.shm_free, RAM: machine.ram_free}
    if gpu and gpu.free_bytes:
        free[place] = gpu.free_bytes
    return MemoryPlan(items, free, config)


def check_replies(config: Config, ranks: int, outputs: tuple[OutputSpec, ...], machine: Machine) -> None:
    """Check the reply memory by itself, once a loaded teacher has told its outputs. Raises PlanError."""
    item = Item(_replies(config, ranks, _bytes_of(outputs, config)), SHM, ranks * _bytes_of(outputs, config))
    MemoryPlan((item,), {SHM: machine.shm_free, RAM: machine.ram_free}, config).check()


def _reply_bytes(config: Config, card: ModelCard) -> int | None:
    """Reply memory of one rank in bytes, where the teacher's outputs are known."""
    declared = tuple(OutputSpec(name, out.dtype, out.shape) for name, out in config.teacher.outputs.items())
    if not declared and card.vocab_size and not is_builder(config.teacher.model):
        declared = (OutputSpec("logits", config.payload.logits.dtype, ("seq", card.vocab_size)),)
    if not declared:
        return None
    return _bytes_of(declared, config)


def _bytes_of(outputs: tuple[OutputSpec, ...], config: Config) -> int:
    slot = offer.slot_bytes(outputs, config.ring.max_tokens, config.ring.max_batch)
    return layout.reply_bytes(config.ring.depth, slot)


def _replies(config: Config, ranks: int, reply: int | None) -> str:
    return (
        "replies"
        if reply is None
        else f"replies: {ranks} ranks x {config.ring.depth} slots x {size(reply / config.ring.depth)}"
    )
