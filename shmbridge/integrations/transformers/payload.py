"""The teacher's replies in the form that the losses take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

from torch import Tensor

from shmbridge import Bridge, Pending, Reply, RequestRefused
from shmbridge.integrations.transformers.config import CANDIDATE_LOSS, DistillationConfig
from shmbridge.losses import LazyLogits, TopK


class CandidateLogprobs(NamedTuple):
    """The teacher's log-probabilities of some words of each row."""

    candidates: Tensor
    """(n, c): of the request's candidates."""
    labels: Tensor
    """(n,): of the token that follows."""


Source = Tensor | LazyLogits | TopK | CandidateLogprobs
Stream = Iterator[tuple[slice, Any]]
"""Of (rows, Source); all of one kind."""


class TeacherRows:
    """Reads the replies of a run in the form that a loss takes."""

    def __init__(self, bridge: Bridge, config: DistillationConfig) -> None:
        """Waits for the teacher. Raises RequestRefused if its payload does not fit the loss."""
        names = {output.name for output in bridge.teacher.outputs}
        payload = bridge.settings.payload
        self._bridge = bridge
        self._streams = payload.stream is not None
        self._tail = 0
        self.candidates = 0
        """Words whose log-probabilities each request asks for."""
        if config.loss == CANDIDATE_LOSS:
            self._kind = "candidates"
            self.candidates = payload.logprobs.candidates if payload.logprobs else 0
            if not self.candidates:
                raise RequestRefused(
                    f"{type(config).__name__}.loss is {config.loss} and the teacher sends {_listed(names)}; set "
                    "'payload.logprobs={candidates: 16}', or another loss."
                )
            if self._streams:
                raise RequestRefused(
                    f"{type(config).__name__}.loss is {config.loss}, which reads whole replies; set payload.stream=null."
                )
            return
        if config.loss == "topk":
            self._kind = "topk"
            if "topk_ids" not in names:
                raise RequestRefused(
                    f"DistillationConfig.loss is topk and the teacher sends {_listed(names)}; set 'payload.topk={{k: 64}}', or another "
                    "loss."
                )
            temperatures = list(payload.topk.temperatures) if payload.topk else []
            if config.temperature not in temperatures:
                raise RequestRefused(
                    f"{type(config).__name__}.temperature is {config.temperature:g} and payload.topk.temperatures {temperatures}; set "
                    f"payload.topk.temperatures=[{config.temperature:g}]."
                )
            self._tail = temperatures.index(config.temperature)
            return
        self._kind = "hidden" if "hidden" in names else "logits"
        if self._kind not in names:
            raise RequestRefused(
                f"{type(config).__name__}.loss is {config.loss} and the teacher sends {_listed(names)}; set payload.hidden={{}} (exact and "
                "small) or payload.logits={}, or loss topk."
            )

    @contextmanager
    def read(self, pending: Pending) -> Iterator[Source | Stream | None]:
        """Wait for a reply and lend it: the teacher's rows for the requested positions in order, or a stream of them.
        None where the reply is missing. Raises what `Pending.wait` and `Pending.chunks` raise."""
        if not self._streams:
            with pending.wait() as reply:
                yield None if reply.missing else self.of(reply)
            return
        chunks = pending.chunks()
        try:
            first = list(islice(chunks, 1))  # none, where no position was asked for
            if first and first[0][1].missing:
                yield None
            else:
                yield ((rows, self.of(chunk)) for rows, chunk in chain(first, chunks))
        finally:
            chunks.close()

    def of(self, reply: Reply) -> Source:
        """The rows of a whole reply, or of a chunk."""
        if self._kind == "topk":
            return TopK(reply["topk_logprobs"], reply["topk_ids"], reply["tail_logmass"][..., self._tail])
        if self._kind == "candidates":
            return CandidateLogprobs(reply["candidate_logprobs"], reply["logprobs"])
        return LazyLogits(reply.hidden, self._bridge.head) if self._kind == "hidden" else reply.logits


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
