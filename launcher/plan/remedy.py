"""What to change where a place is too small: the setting that helps, from what fits without which rows of the plan."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from launcher.console.text import listed, size
from shmbridge.config import Config, is_builder

if TYPE_CHECKING:
    from launcher.plan.memory import MemoryPlan

SHM, RAM, GPU = "/dev/shm", "RAM", "GPU "  # places; a GPU's number follows
CONTEXT_BYTES = 500 * 2**20  # of CUDA, for each process on each GPU that it touches; it depends on GPU and driver
_MORE_SHM = "give /dev/shm more (docker run --shm-size; Docker and Kubernetes give 64 MB unless told otherwise)."
_MORE_RAM = "raise the memory limit; /dev/shm counts as RAM."
_ON_HOST = "keep the replies in host memory (plane=host)."
_INSTEAD = {
    "payload.hidden=": "hidden states and the output head, which are as exact",
    "payload.topk=": "the most likely words and the rest's mass",
}


class Kind(enum.Enum):
    """What a row of the plan counts."""

    REQUESTS = enum.auto()
    HEAD = enum.auto()
    REPLIES = enum.auto()
    COPIES = enum.auto()
    WEIGHTS = enum.auto()
    CONTEXTS = enum.auto()


def suggest(plan: MemoryPlan, place: str) -> str:
    """Which settings to change, and to what, so that the plan needs less of `place`."""

    def fits(*without: Kind) -> bool:
        return plan.needed(place, without) <= plan.free[place]

    config, on_gpu = plan.config, place.startswith(GPU)
    payloads = _smaller_payloads(plan, place) if fits(Kind.REPLIES) else ""
    if place == RAM and config.plane == "cuda_ipc":  # teacher and replies are on GPUs
        return f"{payloads}{_fewer_requests(config)}, or {_MORE_RAM}"
    if place == RAM:
        fewer = f"lower teacher.replicas (now {plan.replicas}), " if plan.replicas > 1 else ""
        return f"{payloads}{_smaller_replies(plan)}, {fewer}take a smaller teacher.model, or {_MORE_RAM}"
    if not fits(Kind.HEAD, Kind.COPIES, Kind.REPLIES):
        return _less_on_gpu(plan, place) if on_gpu else f"{_fewer_requests(config)}, or {_MORE_SHM}"
    if not fits(Kind.COPIES, Kind.REPLIES):
        return _no_head(plan, place)
    if not fits(Kind.REPLIES):
        return f"Read replies where they lie (cuda.read=in_place). {_smaller_replies(plan)}, or {_ON_HOST}"
    return f"{payloads}{_smaller_replies(plan)}, or {_ON_HOST if on_gpu else _MORE_SHM}"


def _smaller_payloads(plan: MemoryPlan, place: str) -> str:
    """The payloads that need less of `place` than the logits of a language model, the smallest first."""
    if "logits" not in plan.config.payload.named or is_builder(plan.config.teacher.model):
        return ""
    sizes = sorted((planned.needed(place), override) for override, planned in plan.instead)
    told = {override: size(needed) for needed, override in sizes if needed < plan.needed(place)}
    if not plan.instead:  # the teacher has loaded, and only what it offers is known
        told = {"payload.logits=null payload.hidden={}": "many times smaller"}
    words = [
        f"{what} ({override}: {needed})"
        for override, needed in told.items()
        for name, what in _INSTEAD.items()
        if name in override
    ]
    return f"In place of logits send {listed(words, 'or')}. " if words else ""


def _less_on_gpu(plan: MemoryPlan, place: str) -> str:
    """Weights or CUDA itself do not fit a GPU."""
    gpus = [item.where for item in plan.items if item.kind is Kind.WEIGHTS]
    if place not in gpus:
        return f"CUDA itself takes about {size(CONTEXT_BYTES)} for each process. Free that GPU, or name another in train.gpus."
    smaller = "" if plan.config.teacher.dtype in ("bfloat16", "float16") else "Set teacher.dtype=bfloat16. "
    spread = (
        f"lower teacher.replicas (now {plan.replicas} on {len(gpus)} GPUs), so that each replica has more GPUs"
        if plan.replicas > 1
        else "name more GPUs in teacher.gpus, with teacher.replicas=1"
    )
    return f"{smaller}Spread the model: {spread}. Or take a smaller teacher.model, or free that GPU."


def _no_head(plan: MemoryPlan, place: str) -> str:
    """The output head does not fit /dev/shm, or a training GPU."""
    nbytes = next(item.nbytes for item in plan.items if (item.kind, item.where) == (Kind.HEAD, place))
    copied, more = "once for all ranks", _MORE_SHM
    if place.startswith(GPU):
        copied, more = "and each rank copies it to its GPU", "free that GPU."
    return (
        f"The output head ({size(nbytes or 0)}) comes with payload.hidden, {copied}. Send the most likely words instead "
        f"(payload.hidden=null payload.topk={{}}), or {more}"
    )


def _smaller_replies(plan: MemoryPlan) -> str:
    """Settings that make the replies smaller; all that may, if the outputs are not known."""
    ring, stream, outputs = plan.config.ring, plan.config.payload.stream, plan.outputs
    if stream:
        return _lower(
            {"payload.stream.chunks": stream.chunks, "payload.stream.chunk_positions": stream.chunk_positions}
        )
    settings: dict[str, int] = {}
    if outputs is None or any(spec.per_token for spec in outputs):
        most = ring.max_positions or ring.max_tokens
        settings |= {"ring.max_tokens": ring.max_tokens} if most >= ring.max_tokens else {}
        settings |= {"ring.max_positions": most}
    whole = outputs is not None and not all(spec.per_token for spec in outputs)
    settings |= {"ring.max_batch": ring.max_batch} if whole else {}
    return _lower(settings | {"ring.depth": ring.depth}) + ("" if whole else ", stream them (payload.stream={})")


def _fewer_requests(config: Config) -> str:
    """Settings that make the lanes smaller."""
    candidates = config.payload.logprobs.candidates if config.payload.logprobs else 0
    settings = {"ring.max_tokens": config.ring.max_tokens, "ring.depth": config.ring.depth}
    return _lower(settings | ({"payload.logprobs.candidates": candidates} if candidates else {}))


def _lower(settings: dict[str, int]) -> str:
    return f"Lower {listed([f'{name} (now {value})' for name, value in settings.items()], 'or')}"
