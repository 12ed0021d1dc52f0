"""The memory plan: what a run needs, where, whether it fits, and what to change where it does not. It is checked before
anything loads."""

from __future__ import annotations

import enum
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from launcher.console.text import listed, size, table
from launcher.planning.gpus import Gpu
from launcher.planning.machine import Machine
from launcher.planning.model_card import ModelCard
from launcher.planning.placement import gpu_names, lanes, teacher_name
from shmbridge.config import Config, HiddenConfig, TopkConfig, is_builder
from shmbridge.errors import PlanError
from shmbridge.output_spec import HeadSpec, Offer, OutputSpec
from shmbridge.shm import layout
from shmbridge.shm.session import Shape

SHM, RAM = "/dev/shm", "RAM"  # places; the others are GPUs, such as `GPU 3`
CONTEXT_BYTES = 500 * 2**20  # of CUDA, for each process on each GPU that it touches; it depends on GPU and driver
_MORE_SHM = "give /dev/shm more (docker run --shm-size; Docker and Kubernetes give 64 MB unless told otherwise)."
_MORE_RAM = "raise the memory limit; /dev/shm counts as RAM."
_ON_HOST = "keep the replies in host memory (plane=host)."
_TOPK, _HIDDEN = "payload.logits=null payload.topk={}", "payload.logits=null payload.hidden={}"
_SMALLER_PAYLOADS = {
    _TOPK: "the most likely words and the rest's mass",
    _HIDDEN: "hidden states and the output head, which are as exact",
}


class Kind(enum.Enum):
    """What a row of the plan counts."""

    REQUESTS = enum.auto()
    HEAD = enum.auto()
    REPLIES = enum.auto()
    COPIES = enum.auto()
    WEIGHTS = enum.auto()
    CONTEXTS = enum.auto()


class Item(NamedTuple):
    """One row of the plan."""

    kind: Kind
    what: str
    where: str
    nbytes: int  # 0 where it is known only once the teacher has loaded


class MemoryPlan(NamedTuple):
    """Items, and the free bytes of each place."""

    items: tuple[Item, ...]
    free: dict[str, int]
    config: Config
    outputs: tuple[OutputSpec, ...] | None  # of a reply
    replicas: int
    trained: frozenset[str]  # places that training needs too, nobody knows how much of
    instead: dict[str, MemoryPlan]  # by the overrides that choose smaller payloads than logits

    def needed(self, place: str, without: Sequence[Kind] = ()) -> int:
        """Known bytes that `place` must hold. Shared memory is held by RAM."""
        items = [item for item in self.items if item.kind not in without]
        return sum(item.nbytes for item in items if item.where == place or (place, item.where) == (RAM, SHM))

    def check(self) -> None:
        """Raises PlanError, with the table and the setting to change, where a place is too small."""
        for place, free in self.free.items():
            needed = self.needed(place)
            if needed > free:
                raise PlanError(
                    f"the run needs {size(needed)} of {place}, and {size(free)} are free.\n\n{self}\n\n"
                    f"{_remedy(self, place)}"
                )

    def __str__(self) -> str:
        places: dict[tuple[str, int], list[str]] = {}  # of items that are equal
        for item in self.items:
            places.setdefault((item.what, item.nbytes), []).append(item.where)
        rows = []
        for (what, nbytes), where in places.items():
            amount = size(nbytes) if nbytes else "known once it has loaded"
            if len(where) > 1:
                where = [gpu_names([int(place.removeprefix("GPU ")) for place in where])]
                amount += " each" if nbytes else ""
            rows.append((what, *where, amount))
        totals = []
        for place, free in self.free.items():
            besides = " (training itself is not counted)" if place in self.trained else ""
            totals.append((place, f"needs {size(self.needed(place))}{besides}", f"{size(free)} free"))
        return table(rows) + "\n\n" + table(totals)


def plan(
    config: Config, card: ModelCard, teachers: Sequence[Sequence[Gpu]], machine: Machine, train: Sequence[Gpu]
) -> MemoryPlan:
    """The memory plan of a session with a teacher on each share of GPUs, and each rank on a GPU of `train`. An empty share
    or list means the CPU.

    Raises:
        PlanError: the payload is not one that this model can give.
    """
    planned = _plan(config, card, teachers, machine, train)
    smaller = {}
    if _sends_logits(config):
        if TopkConfig().k < (card.vocab_size or 0):
            smaller[_TOPK] = msgspec.structs.replace(config.payload, logits=None, topk=TopkConfig())
        if card.vocab_size and card.hidden_size and card.dtype:
            smaller[_HIDDEN] = msgspec.structs.replace(config.payload, logits=None, hidden=HiddenConfig())
    for override, payload in smaller.items():
        instead = msgspec.structs.replace(config, payload=payload)
        planned.instead[override] = _plan(instead, card, teachers, machine, train)
    return planned


def check_replies(config: Config, ranks: int, agreed: Offer, machine: Machine) -> None:
    """Check that replies and head fit /dev/shm, once all teachers have loaded. Each teacher checks its GPU's memory
    itself, by allocating it. Raises PlanError."""
    shape = Shape.of(config, ranks)
    items = tuple(_replies_in_shm(config, shape, shape.slot_bytes(agreed.outputs), agreed.head))
    MemoryPlan(items, _free(machine), config, agreed.outputs, 1, frozenset(), {}).check()


def created(config: Config, shape: Shape, agreed: Offer, nbytes: int) -> str:
    """What the replies take, as text; `nbytes` of it are in /dev/shm."""
    in_shm = f"{size(nbytes)} in {SHM}"
    if config.plane != "cuda_ipc":
        return in_shm
    slabs = shape.lanes * _slab_bytes(shape, shape.slot_bytes(agreed.outputs))
    return f"{size(slabs)} in the teacher's GPU memory, {in_shm}"


def _plan(
    config: Config, card: ModelCard, teachers: Sequence[Sequence[Gpu]], machine: Machine, train: Sequence[Gpu]
) -> MemoryPlan:
    ranks = len(train) or config.train.cpu_ranks
    shape = Shape.of(config, ranks, len(teachers))
    outputs, head = card.outputs(config), card.head(config)
    slot = shape.slot_bytes(outputs) if outputs else 0
    lane = shape.lane_layout.nbytes
    items = (
        Item(Kind.REQUESTS, "control segment", SHM, layout.control_bytes(shape.teachers)),
        Item(Kind.REQUESTS, f"lanes: {ranks} ranks x {size(lane)}", SHM, ranks * lane),
        *_replies_in_shm(config, shape, slot, head),
        *_of_teachers(config, shape, slot, card.weight_bytes or 0, teachers),
        *_of_ranks(config, shape, slot, head, train),
        *_contexts([*itertools.chain(*teachers), *train]),
    )
    gpus = {str(gpu): gpu.free_bytes for gpu in (*itertools.chain(*teachers), *train) if gpu.free_bytes}
    return MemoryPlan(items, _free(machine) | gpus, config, outputs, shape.teachers, frozenset(map(str, train)), {})


def _free(machine: Machine) -> dict[str, int]:
    return {SHM: machine.shm_free, RAM: machine.ram_free}


def _replies_in_shm(config: Config, shape: Shape, slot: int, head: HeadSpec | None) -> Iterator[Item]:
    """The output head and the replies, or the handles of replies in GPU memory. A slot has `slot` bytes; 0 if they are not
    known yet."""
    if head:
        what = f"output head: {head.words} words x {head.width} x {head.dtype}"
        yield Item(Kind.HEAD, what, SHM, layout.PAGE + layout.head_bytes(head))
    elif config.payload.hidden is not None:
        yield Item(Kind.HEAD, "output head", SHM, 0)
    if config.plane == "cuda_ipc":
        what = f"handles of replies: {_ranks(shape.lanes)} x {size(shape.exchange_bytes)}"
        yield Item(Kind.REQUESTS, what, SHM, shape.lanes * shape.exchange_bytes)
    else:
        nbytes = slot and shape.lanes * layout.reply_bytes(shape.reply_slots, slot)
        yield Item(Kind.REPLIES, f"replies: {shape.lanes} ranks x {_slots(shape, slot)}", SHM, nbytes)


def _of_teachers(
    config: Config, shape: Shape, slot: int, weight_bytes: int, teachers: Sequence[Sequence[Gpu]]
) -> Iterator[Item]:
    """The replies of each replica's lanes on its first GPU, and the weights on all of its GPUs or in RAM."""
    for replica, own in enumerate(teachers):
        if config.plane == "cuda_ipc":
            count = len(lanes(replica, len(teachers), shape.lanes))
            nbytes = slot and count * _slab_bytes(shape, slot)
            yield Item(Kind.REPLIES, f"replies: {_ranks(count)} x {_slots(shape, slot)}", str(own[0]), nbytes)
        places = [str(gpu) for gpu in own] or [RAM]
        for part, place in enumerate(places, 1):
            of_several = f", part {part} of {len(places)}" if len(places) > 1 else ""
            what = f"{teacher_name(replica, len(teachers))}'s weights{of_several}"
            yield Item(Kind.WEIGHTS, what, place, -(-weight_bytes // len(places)))


def _of_ranks(config: Config, shape: Shape, slot: int, head: HeadSpec | None, train: Sequence[Gpu]) -> Iterator[Item]:
    """What each rank has on its GPU: the output head, and the copies of replies, unless they are read in place."""
    copies = shape.reply_slots + 1
    each = f"{copies} x {size(slot)}" if slot else str(copies)
    for gpu, count in Counter(train).items():
        if config.payload.hidden is not None:
            nbytes = count * layout.head_bytes(head) if head else 0
            yield Item(Kind.HEAD, f"output head, copied for {_ranks(count)}", str(gpu), nbytes)
        if config.plane == "cuda_ipc" and config.cuda.read == "copy":
            yield Item(Kind.COPIES, f"copies of replies: {_ranks(count)} x {each}", str(gpu), count * copies * slot)


def _contexts(gpus: Sequence[Gpu]) -> Iterator[Item]:
    """CUDA's own memory, for each process. A rank has none on the teacher's GPU: it opens handles in its own GPU's
    context."""
    for gpu, count in Counter(gpus).items():
        what = "CUDA context" if count == 1 else f"CUDA contexts of {count} processes"
        yield Item(Kind.CONTEXTS, what, str(gpu), count * CONTEXT_BYTES)


def _slab_bytes(shape: Shape, slot: int) -> int:
    """Bytes of GPU memory for the replies of one lane."""
    return layout.block_bytes(layout.slab_bytes(shape.reply_slots, slot))


def _slots(shape: Shape, slot: int) -> str:
    slots = f"{shape.chunks} chunks" if shape.chunks else f"{shape.depth} slots"
    return f"{slots} x {size(slot)}" if slot else slots


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


# What to change where a place is too small: the setting that helps, from what fits without which rows of the plan


def _remedy(plan: MemoryPlan, place: str) -> str:
    """Which settings to change, and to what, so that the plan needs less of `place`."""

    def fits(*without: Kind) -> bool:
        return plan.needed(place, without) <= plan.free[place]

    config, on_gpu = plan.config, place not in (SHM, RAM)
    fewer_requests = _lower({"max_tokens": config.ring.max_tokens, "depth": config.ring.depth})
    if config.payload.logprobs and config.payload.logprobs.candidates:
        fewer_requests += f" or payload.logprobs.candidates (now {config.payload.logprobs.candidates})"
    payloads = _smaller_payloads(plan, place) if fits(Kind.REPLIES) else ""
    if place == RAM and config.plane == "cuda_ipc":  # teacher and replies are on GPUs
        return f"{payloads}{fewer_requests}, or {_MORE_RAM}"
    if place == RAM:
        fewer = f"lower teacher.replicas (now {plan.replicas}), " if plan.replicas > 1 else ""
        return f"{payloads}{_smaller_replies(plan)}, {fewer}take a smaller teacher.model, or {_MORE_RAM}"
    if not fits(Kind.HEAD, Kind.COPIES, Kind.REPLIES):
        return _less_on_gpu(plan, place) if on_gpu else f"{fewer_requests}, or {_MORE_SHM}"
    if not fits(Kind.COPIES, Kind.REPLIES):
        nbytes = next(item.nbytes for item in plan.items if item.kind is Kind.HEAD and item.where == place)
        copied = "and each rank copies it to its GPU" if on_gpu else "once for all ranks"
        return (
            f"The output head ({size(nbytes)}) comes with payload.hidden, {copied}. Send the most likely words instead "
            f"(payload.hidden=null payload.topk={{}}), or {'free that GPU.' if on_gpu else _MORE_SHM}"
        )
    if not fits(Kind.REPLIES):
        return f"Read replies where they lie (cuda.read=in_place). {_smaller_replies(plan)}, or {_ON_HOST}"
    return f"{payloads}{_smaller_replies(plan)}, or {_ON_HOST if on_gpu else _MORE_SHM}"


def _sends_logits(config: Config) -> bool:
    """Whether replies have the logits of a language model, in whose place others can be sent."""
    return config.payload.logits is not None and not is_builder(config.teacher.model)


def _smaller_payloads(plan: MemoryPlan, place: str) -> str:
    """The payloads that need less of `place` than the logits of a language model, the smallest first."""
    if not _sends_logits(plan.config):
        return ""
    sizes = sorted((smaller.needed(place), override) for override, smaller in plan.instead.items())
    told = {override: size(nbytes) for nbytes, override in sizes if nbytes < plan.needed(place)}
    if not plan.instead:  # the teacher has loaded, and only what it offers is known
        told = {_HIDDEN: "many times smaller"}
    payloads = [f"{_SMALLER_PAYLOADS[override]} ({override}: {amount})" for override, amount in told.items()]
    return f"In place of logits send {listed(payloads, 'or')}. " if payloads else ""


def _less_on_gpu(plan: MemoryPlan, place: str) -> str:
    """Weights or CUDA itself do not fit a GPU."""
    gpus = [item.where for item in plan.items if item.kind is Kind.WEIGHTS]
    if place not in gpus:
        return f"CUDA itself takes about {size(CONTEXT_BYTES)} for each process. Free that GPU, or name another in train.gpus."
    smaller = "" if plan.config.teacher.dtype in ("bfloat16", "float16") else "Set teacher.dtype=bfloat16. "
    spread = "name more GPUs in teacher.gpus, with teacher.replicas=1"
    if plan.replicas > 1:
        spread = f"lower teacher.replicas (now {plan.replicas} on {len(gpus)} GPUs), so that each replica has more GPUs"
    return f"{smaller}Spread the model: {spread}. Or take a smaller teacher.model, or free that GPU."


def _smaller_replies(plan: MemoryPlan) -> str:
    """Settings that make the replies smaller; all that may, if the outputs are not known."""
    ring, stream, outputs = plan.config.ring, plan.config.payload.stream, plan.outputs
    if stream:
        return _lower({"stream.chunks": stream.chunks, "stream.chunk_positions": stream.chunk_positions}, "payload")
    settings = {"max_tokens": ring.max_tokens, "max_positions": ring.max_positions or ring.max_tokens}
    if settings["max_positions"] < ring.max_tokens:
        del settings["max_tokens"]
    per_token = [spec.per_token for spec in outputs or ()]
    if all(per_token):
        return _lower(settings | {"depth": ring.depth}) + ", stream them (payload.stream={})"
    if not any(per_token):
        settings.clear()
    return _lower(settings | {"max_batch": ring.max_batch, "depth": ring.depth})


def _lower(settings: dict[str, int], section: str = "ring") -> str:
    return f"Lower {listed([f'{section}.{name} (now {value})' for name, value in settings.items()], 'or')}"
