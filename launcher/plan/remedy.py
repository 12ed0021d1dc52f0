"""What to change where memory is too small. Each function is for one thing that does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.console.text import listed
from shmbridge.config import Config
from shmbridge.output_spec import OutputSpec

_MORE_SHM = "give /dev/shm more (docker run --shm-size; Docker and Kubernetes give 64 MB unless told otherwise)."

_ON_HOST = "keep the replies in host memory (plane=host)."


_INSTEAD = {
    "hidden": "hidden states and the output head, which are as exact",
    "topk": "the most likely words and the rest's mass",
}


def payloads(sizes: Mapping[str, str]) -> str:
    """Payloads that are smaller than logits; `sizes` has the bytes that the run would need with each, by its
    override."""
    words = [
        f"{what} ({override}: {needed})"
        for override, needed in sizes.items()
        for name, what in _INSTEAD.items()
        if f"payload.{name}=" in override
    ]
    return f"In place of logits send {listed(words, 'or')}." if words else ""


def lanes(config: Config) -> str:
    """The requests alone do not fit /dev/shm."""
    return f"{_lower(_of_requests(config))}, or {_MORE_SHM}"


def head(words: str) -> str:
    """The output head does not fit /dev/shm; `words` tells its size."""
    return (
        f"The output head ({words}) comes with payload.hidden, once for all ranks. Send the most likely words instead "
        f"(payload.hidden=null payload.topk={{}}), or {_MORE_SHM}"
    )


def replies(config: Config, outputs: Sequence[OutputSpec] | None) -> str:
    """The replies do not fit /dev/shm."""
    return f"{_less(config, outputs)}, or {_MORE_SHM}"


def ram(config: Config, outputs: Sequence[OutputSpec] | None, replicas: int) -> str:
    """/dev/shm and a teacher on the CPU do not fit RAM."""
    fewer = f"lower teacher.replicas (now {replicas}), " if replicas > 1 else ""
    return f"{_less(config, outputs)}, {fewer}take a smaller teacher.model, or raise the memory limit; /dev/shm counts as RAM."


def ram_beside_gpus(config: Config) -> str:
    """/dev/shm does not fit RAM, with teacher and replies on GPUs."""
    return f"{_lower(_of_requests(config))}, or raise the memory limit; /dev/shm counts as RAM."


def gpu(config: Config, gpus: int, replicas: int) -> str:
    """The teacher's weights do not fit a GPU; there are `gpus` for all `replicas`."""
    smaller = "" if config.teacher.dtype in ("bfloat16", "float16") else "Set teacher.dtype=bfloat16. "
    spread = (
        f"Spread the model: lower teacher.replicas (now {replicas} on {gpus} GPUs), so that each replica has more GPUs"
        if replicas > 1
        else "Spread the model: name more GPUs in teacher.gpus, with teacher.replicas=1"
    )
    return f"{smaller}{spread}. Or take a smaller teacher.model, or free that GPU."


def slabs(config: Config, outputs: Sequence[OutputSpec] | None) -> str:
    """The replies do not fit the teacher's GPU beside its weights."""
    return f"{_less(config, outputs)}, or {_ON_HOST}"


def copies(config: Config, outputs: Sequence[OutputSpec] | None) -> str:
    """The ranks' copies of replies do not fit their GPU."""
    return f"Read replies where they lie (cuda.read=in_place). {_less(config, outputs)}, or {_ON_HOST}"


def head_on_gpu(words: str) -> str:
    """The output head does not fit a training GPU; `words` tells its size there."""
    return (
        f"The output head ({words}) comes with payload.hidden, and each rank copies it to its GPU. Send the most likely words "
        "instead (payload.hidden=null payload.topk={}), or free that GPU."
    )


def context(words: str) -> str:
    """Not even CUDA itself fits a training GPU; `words` tells what it takes."""
    return f"CUDA itself takes about {words} for each process. Free that GPU, or name another in train.gpus."


def _less(config: Config, outputs: Sequence[OutputSpec] | None) -> str:
    """Settings that make the replies smaller; if the outputs are not known, all that may."""
    stream = config.payload.stream
    if stream:
        return _lower(
            {"payload.stream.chunks": stream.chunks, "payload.stream.chunk_positions": stream.chunk_positions}
        )
    per_token = outputs is None or any(spec.per_token for spec in outputs)
    whole = outputs is not None and not all(spec.per_token for spec in outputs)
    settings = _of_positions(config) if per_token else {}
    settings |= {"ring.max_batch": config.ring.max_batch} if whole else {}
    settings |= {"ring.depth": config.ring.depth}
    return _lower(settings) + ("" if whole else ", stream them (payload.stream={})")


def _of_positions(config: Config) -> dict[str, int]:
    ring = config.ring
    fewest = ring.max_positions or ring.max_tokens
    if fewest < ring.max_tokens:
        return {"ring.max_positions": fewest}
    return {"ring.max_tokens": ring.max_tokens, "ring.max_positions": fewest}


def _of_requests(config: Config) -> dict[str, int]:
    candidates = config.payload.logprobs.candidates if config.payload.logprobs else 0
    settings = {"ring.max_tokens": config.ring.max_tokens, "ring.depth": config.ring.depth}
    return settings | ({"payload.logprobs.candidates": candidates} if candidates else {})


def _lower(settings: dict[str, int]) -> str:
    return f"Lower {listed([f'{name} (now {value})' for name, value in settings.items()], 'or')}"
