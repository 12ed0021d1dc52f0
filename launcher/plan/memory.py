"""The memory plan: what a run needs, where, and whether it fits. It is checked before anything loads."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from launcher.console.text import size, table
from launcher.plan import placement, remedy
from launcher.plan.gpus import Gpu
from launcher.plan.machine import Machine
from launcher.plan.model_card import ModelCard
from launcher.plan.remedy import CONTEXT_BYTES, GPU, RAM, SHM, Kind
from shmbridge.config import Config, HiddenConfig, TopkConfig, is_builder
from shmbridge.errors import PlanError
from shmbridge.output_spec import HeadSpec, Offer, OutputSpec
from shmbridge.shm import layout
from shmbridge.shm.session import Shape


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
    trained: frozenset[str] = frozenset()  # places that training needs too, nobody knows how much of
    instead: tuple[tuple[str, MemoryPlan], ...] = ()  # smaller payloads than logits, as overrides, and their plans

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
                    f"the run needs {size(needed)} of {place}, and {size(free)} are free.\n\n{self}\n\n"
                    f"{remedy.suggest(self, place)}"
                )

    def __str__(self) -> str:
        rows = [_merged(list(same)) for _, same in itertools.groupby(self.items, lambda item: (item.what, item.nbytes))]
        totals = []
        for place, free in self.free.items():
            besides = " (training itself is not counted)" if place in self.trained else ""
            totals.append((place, f"needs {size(self.needed(place))}{besides}", f"{size(free)} free"))
        return table(rows) + "\n\n" + table(totals)


def _merged(items: Sequence[Item]) -> tuple[str, str, str]:
    """One row for an item, or for equal items on several GPUs."""
    first = items[0]
    amount = "known once it has loaded" if first.nbytes is None else size(first.nbytes)
    if len(items) == 1:
        return first.what, first.where, amount
    numbers = [int(item.where.removeprefix(GPU)) for item in items]
    return first.what, placement.gpu_names(numbers), amount if first.nbytes is None else f"{amount} each"


def plan(
    config: Config,
    ranks: int,
    card: ModelCard,
    teachers: Sequence[Sequence[Gpu]],
    machine: Machine,
    train: Sequence[Gpu] = (),
) -> MemoryPlan:
    """The memory plan of a session with `ranks` lanes, a teacher on each share of GPUs, and each rank on a GPU of
    `train`. An empty share or list means the CPU.

    Raises:
        PlanError: the payload is not one that this model can give.
    """
    planned = _plan(config, ranks, card, teachers, machine, train)
    instead = [
        (override, _plan(smaller, ranks, card, teachers, machine, train))
        for override, smaller in _smaller(config, card).items()
    ]
    return planned._replace(instead=tuple(instead))


def _smaller(config: Config, card: ModelCard) -> dict[str, Config]:
    """The same config with payloads smaller than logits, by the overrides that choose them."""
    if config.payload.named != ("logits",) or is_builder(config.teacher.model):
        return {}
    found = {"payload.topk={}": msgspec.structs.replace(config.payload, logits=None, topk=TopkConfig())}
    if card.vocab_size and card.hidden_size and card.dtype:
        found["payload.hidden={}"] = msgspec.structs.replace(config.payload, logits=None, hidden=HiddenConfig())
    return {
        f"payload.logits=null {override}": msgspec.structs.replace(config, payload=payload)
        for override, payload in found.items()
        if not payload.topk or payload.topk.k < (card.vocab_size or 0)
    }


def _plan(
    config: Config,
    ranks: int,
    card: ModelCard,
    teachers: Sequence[Sequence[Gpu]],
    machine: Machine,
    train: Sequence[Gpu],
) -> MemoryPlan:
    shape = Shape.of(config, ranks, len(teachers))
    outputs, head = card.outputs(config), card.head(config)
    slot = None if outputs is None else shape.slot_bytes(outputs)
    lane = shape.lane_layout.nbytes
    items = (
        Item(Kind.REQUESTS, "control segment", SHM, layout.control_bytes(shape.teachers)),
        Item(Kind.REQUESTS, f"lanes: {ranks} ranks x {size(lane)}", SHM, ranks * lane),
        *_head(config, head),
        _replies(config, shape, slot),
        *(_slabs(shape, slot, teachers) if config.plane == "cuda_ipc" else ()),
        *_weights(card.weight_bytes, teachers),
        *_contexts(teachers, train),
        *_head_copies(config, head, train),
        *_copies(config, shape, slot, train),
    )
    gpus = [gpu for own in (*teachers, train) for gpu in own if gpu.free_bytes]
    free = _free(machine) | {_place(gpu): gpu.free_bytes for gpu in gpus}
    return MemoryPlan(items, free, config, outputs, shape.teachers, frozenset(map(_place, train)))


def check_replies(config: Config, ranks: int, agreed: Offer, machine: Machine) -> None:
    """Check that replies and head fit /dev/shm, once all teachers have loaded. Each teacher checks its GPU's memory
    itself, by allocating it. Raises PlanError."""
    shape = Shape.of(config, ranks)
    items = (*_head(config, agreed.head), _replies(config, shape, shape.slot_bytes(agreed.outputs)))
    MemoryPlan(items, _free(machine), config, agreed.outputs, 1).check()


def created(config: Config, shape: Shape, agreed: Offer, nbytes: int) -> str:
    """What the replies take, as text; `nbytes` of it are in /dev/shm."""
    in_shm = f"{size(nbytes)} in {SHM}"
    if config.plane != "cuda_ipc":
        return in_shm
    slabs = shape.lanes * layout.block_bytes(layout.slab_bytes(shape.reply_slots, shape.slot_bytes(agreed.outputs)))
    return f"{size(slabs)} in the teacher's GPU memory, {in_shm}"


def _free(machine: Machine) -> dict[str, int]:
    return {SHM: machine.shm_free, RAM: machine.ram_free}


def _head(config: Config, spec: HeadSpec | None) -> Iterator[Item]:
    """One row, where the payload is hidden."""
    if spec:
        what = f"output head: {spec.words} words x {spec.width} x {spec.dtype}"
        yield Item(Kind.HEAD, what, SHM, layout.PAGE + layout.head_bytes(spec))
    elif config.payload.hidden is not None:
        yield Item(Kind.HEAD, "output head", SHM, None)


def _replies(config: Config, shape: Shape, slot: int | None) -> Item:
    """What the replies take of /dev/shm: all their bytes, or the handles of replies in GPU memory. A slot has `slot`
    bytes; None if they are not known yet."""
    if config.plane == "cuda_ipc":
        what = f"handles of replies: {_ranks(shape.lanes)} x {size(shape.exchange_bytes)}"
        return Item(Kind.REQUESTS, what, SHM, shape.lanes * shape.exchange_bytes)
    nbytes = None if slot is None else shape.lanes * layout.reply_bytes(shape.reply_slots, slot)
    return Item(Kind.REPLIES, _of_slots(f"replies: {shape.lanes} ranks x {_slots(shape)}", slot), SHM, nbytes)


def _slabs(shape: Shape, slot: int | None, teachers: Sequence[Sequence[Gpu]]) -> Iterator[Item]:
    """The replies in the memory of each replica's first GPU, a slab for each of its lanes."""
    for index, own in enumerate(teachers):
        count = len(placement.lanes(index, len(teachers), shape.lanes))
        what = _of_slots(f"replies: {_ranks(count)} x {_slots(shape)}", slot)
        nbytes = None if slot is None else count * layout.block_bytes(layout.slab_bytes(shape.reply_slots, slot))
        yield Item(Kind.REPLIES, what, _place(own[0]), nbytes)


def _copies(config: Config, shape: Shape, slot: int | None, train: Sequence[Gpu]) -> Iterator[Item]:
    """The copies of replies on the ranks' GPUs, unless they are read in place."""
    if config.plane != "cuda_ipc" or config.cuda.read != "copy":
        return
    for gpu, count in Counter(train).items():
        copies = shape.reply_slots + 1
        what = _of_slots(f"copies of replies: {_ranks(count)} x {copies}", slot)
        yield Item(Kind.COPIES, what, _place(gpu), None if slot is None else count * copies * slot)


def _head_copies(config: Config, spec: HeadSpec | None, train: Sequence[Gpu]) -> Iterator[Item]:
    """The output head on each training GPU, once for each of its ranks."""
    for gpu, count in Counter(train).items():
        if config.payload.hidden is not None:
            what = f"output head, copied for {_ranks(count)}"
            yield Item(Kind.HEAD, what, _place(gpu), count * layout.head_bytes(spec) if spec else None)


def _of_slots(what: str, slot: int | None) -> str:
    return what if slot is None else f"{what} x {size(slot)}"


def _slots(shape: Shape) -> str:
    return f"{shape.chunks} chunks" if shape.chunks else f"{shape.depth} slots"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _contexts(teachers: Sequence[Sequence[Gpu]], train: Sequence[Gpu]) -> Iterator[Item]:
    """CUDA's own memory. A rank has none on the teacher's GPU: it opens handles in its own GPU's context."""
    for gpu, count in Counter([*itertools.chain(*teachers), *train]).items():
        what = "CUDA context" if count == 1 else f"CUDA contexts of {count} processes"
        yield Item(Kind.CONTEXTS, what, _place(gpu), count * CONTEXT_BYTES)


def _weights(nbytes: int | None, teachers: Sequence[Sequence[Gpu]]) -> Iterator[Item]:
    """A row for each replica, or for each of its GPUs if it has several."""
    for index, own in enumerate(teachers):
        what = f"{placement.teacher_name(index, len(teachers))}'s weights"
        places = [_place(gpu) for gpu in own] or [RAM]
        each = None if nbytes is None else -(-nbytes // len(places))
        for part, place in enumerate(places, 1):
            of_several = f", part {part} of {len(places)}" if len(places) > 1 else ""
            yield Item(Kind.WEIGHTS, what + of_several, place, each)


def _place(gpu: Gpu) -> str:
    return f"{GPU}{gpu.number}"
