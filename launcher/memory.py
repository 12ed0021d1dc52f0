"""The memory plan: what the run will take, where, and whether it fits. Checked before anything loads."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from launcher import expected, remedy
from launcher.gpus import Gpu
from launcher.machine import Machine
from launcher.model_card import ModelCard
from launcher.replicas import called
from launcher.text import size, table
from shmbridge import layout
from shmbridge.config import Config
from shmbridge.errors import PlanError
from shmbridge.offer import HeadSpec, Offer, OutputSpec
from shmbridge.session import Shape

SHM, RAM = "/dev/shm", "RAM"


class Kind(enum.Enum):
    """What a row is about, and so what would make it smaller."""

    REQUESTS = enum.auto()
    HEAD = enum.auto()
    REPLIES = enum.auto()
    WEIGHTS = enum.auto()


class Item(NamedTuple):
    """One row of the plan; `nbytes` is None where it is known only once the teacher has loaded."""

    kind: Kind
    what: str
    where: str
    nbytes: int | None


class MemoryPlan(NamedTuple):
    """Items, and the free bytes of each place."""

    items: tuple[Item, ...]
    free: dict[str, int]
    config: Config
    outputs: tuple[OutputSpec, ...] | None  # of a reply
    replicas: int

    def needed(self, place: str, without: Sequence[Kind] = ()) -> int:
        """Known bytes that `place` must hold. Shared memory is held by RAM."""
        items = [item for item in self.items if item.kind not in without]
        return sum(item.nbytes or 0 for item in items if item.where == place or (place, item.where) == (RAM, SHM))

    def check(self) -> None:
        """Raises PlanError, with the table and the setting to change, where a place is too small."""
        for place, free in self.free.items():
            needed = self.needed(place)
            if needed > free:
                raise PlanError(
                    f"the run needs {size(needed)} of {place}, and {size(free)} are free.\n\n{self}\n\n{self._remedy(place)}"
                )

    def _remedy(self, place: str) -> str:
        if place == RAM:
            return remedy.ram(self.config, self.outputs, self.replicas)
        if place != SHM:
            gpus = sum(item.kind is Kind.WEIGHTS for item in self.items)
            return remedy.gpu(self.config, gpus, self.replicas)
        if self.needed(SHM, without=[Kind.HEAD, Kind.REPLIES]) > self.free[SHM]:
            return remedy.lanes(self.config)
        if self.needed(SHM, without=[Kind.REPLIES]) > self.free[SHM]:
            return remedy.head(next(size(item.nbytes or 0) for item in self.items if item.kind is Kind.HEAD))
        return remedy.replies(self.config, self.outputs)

    def __str__(self) -> str:
        rows = [
            (item.what, item.where, "known once it has loaded" if item.nbytes is None else size(item.nbytes))
            for item in self.items
        ]
        totals = [
            (f"{place}", f"needs {size(self.needed(place))}", f"{size(free)} free") for place, free in self.free.items()
        ]
        return table(rows) + "\n\n" + table(totals)


def plan(
    config: Config, ranks: int, card: ModelCard, teachers: Sequence[Sequence[Gpu]], machine: Machine
) -> MemoryPlan:
    """What a session of `ranks` lanes takes with a teacher on each share of GPUs; an empty share is the CPU.

    Raises:
        PlanError: the payload is not one that this model can give.
    """
    shape = Shape.of(config, ranks, len(teachers))
    outputs = expected.outputs(config, card)
    lane = shape.lane_layout.nbytes
    items = (
        Item(Kind.REQUESTS, "control segment", SHM, layout.control_bytes(shape.teachers)),
        Item(Kind.REQUESTS, f"lanes: {ranks} ranks x {size(lane)}", SHM, ranks * lane),
        *_head(config, expected.head(config, card)),
        _replies(shape, outputs),
        *_weights(card.weight_bytes, teachers),
    )
    of_gpus = {_place(gpu): gpu.free_bytes for own in teachers for gpu in own if gpu.free_bytes}
    return MemoryPlan(items, _free(machine) | of_gpus, config, outputs, shape.teachers)


def check_replies(config: Config, ranks: int, agreed: Offer, machine: Machine) -> None:
    """Check the memory of replies and head by itself, once all teachers have loaded. Raises PlanError."""
    shape = Shape.of(config, ranks)
    items = (*_head(config, agreed.head), _replies(shape, agreed.outputs))
    MemoryPlan(items, _free(machine), config, agreed.outputs, 1).check()


def _free(machine: Machine) -> dict[str, int]:
    return {SHM: machine.shm_free, RAM: machine.ram_free}


def _head(config: Config, spec: HeadSpec | None) -> Iterator[Item]:
    """One row, where the payload is hidden."""
    if spec:
        what = f"output head: {spec.words} words x {spec.width} x {spec.dtype}"
        yield Item(Kind.HEAD, what, SHM, layout.PAGE + spec.nbytes)
    elif config.payload.hidden is not None:
        yield Item(Kind.HEAD, "output head", SHM, None)


def _replies(shape: Shape, outputs: tuple[OutputSpec, ...] | None) -> Item:
    slots = f"{shape.chunks} chunks" if shape.chunks else f"{shape.depth} slots"
    what = f"replies: {shape.lanes} ranks x {slots}"
    if outputs is None:
        return Item(Kind.REPLIES, what, SHM, None)
    nbytes = shape.lanes * shape.reply_bytes(outputs)
    return Item(Kind.REPLIES, f"{what} x {size(shape.slot_bytes(outputs))}", SHM, nbytes)


def _weights(nbytes: int | None, teachers: Sequence[Sequence[Gpu]]) -> Iterator[Item]:
    """A row for each replica, or for each GPU of those that are spread over several."""
    for index, own in enumerate(teachers):
        what = f"{called(index, len(teachers))}'s weights"
        places = [_place(gpu) for gpu in own] or [RAM]
        each = None if nbytes is None else -(-nbytes // len(places))
        for part, place in enumerate(places, 1):
            of_several = f", part {part} of {len(places)}" if len(places) > 1 else ""
            yield Item(Kind.WEIGHTS, what + of_several, place, each)


def _place(gpu: Gpu) -> str:
    return f"GPU {gpu.number}"
