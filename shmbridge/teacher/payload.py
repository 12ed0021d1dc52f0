"""From what a teacher's forward returned to what a reply carries: the formulas of the payloads, on the teacher's device.

A `Selection` tells which positions of a forward one request wants. An encoder makes the payload of any range of them: of one
chunk where replies are streamed, else of as many as fit into `_PART_BYTES`. So the output head, which takes most of the memory,
is applied to few positions at a time, and only to positions that were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch

from shmbridge.config import PayloadConfig
from shmbridge.errors import PlanError
from shmbridge.head import Head
from shmbridge.output_spec import Extent, OutputSpec, reply_bytes
from shmbridge.plane.tensors import DTYPES
from shmbridge.shm.layout import IGNORED

_PART_BYTES = 1 << 27

Tensors = Mapping[str, torch.Tensor]


class Selection(NamedTuple):
    """What one request wants of a forward of (rows, seq) tokens."""

    tensors: Tensors
    """What Encoder.prepare gave: (rows * seq, ...), or (rows, ...) where an output has no sequence axis."""

    rows: slice
    """The request's rows of the forward."""

    positions: int
    """How many positions it wants."""

    places: int | torch.Tensor
    """Where they lie in rows * seq: the first of adjacent ones, or (positions,) int64 on the teacher's device."""

    targets: torch.Tensor | None = None
    """(positions,) int64, where the payload has logprobs."""

    candidates: torch.Tensor | None = None
    """(positions, c) int64."""

    def take(self, name: str, start: int, stop: int) -> torch.Tensor:
        """(stop - start, ...): an output at the positions start to stop of the request."""
        tensor = self.tensors[name]
        if isinstance(self.places, int):
            return tensor[self.places + start : self.places + stop]
        return tensor[self.places[start:stop].to(tensor.device)]

    def kept(self) -> Selection:
        """The same, to wait for its reader: not a view of the whole forward, which would stay with it."""
        tensors = {}
        for name in self.tensors:
            tensor = self.take(name, 0, self.positions)
            alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            tensors[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        return self._replace(tensors=tensors, places=0)


class Encoder(Protocol):
    """Turns what a forward returns into replies."""

    at_once: int
    """Positions whose payload is made at a time."""

    def prepare(self, returned: Tensors, rows: int, seq: int, whole: bool) -> Tensors:
        """Check what a forward of (rows, seq) returned, and give the tensors of a Selection. `whole`: its requests want all of
        their positions at once.

        Raises:
            PlanError: it is not what the offer says.
        """

    def encode(self, selection: Selection, start: int, stop: int) -> Tensors:
        """The payload of the positions start to stop of a selection."""


def parts(encoder: Encoder, selection: Selection) -> Iterator[tuple[int, Tensors]]:
    """The whole payload of a selection, as (first position, outputs)."""
    for start in range(0, max(1, selection.positions), encoder.at_once):
        yield start, encoder.encode(selection, start, min(selection.positions, start + encoder.at_once))


class Verbatim:
    """The outputs of a custom teacher, as its forward returns them."""

    def __init__(self, outputs: tuple[OutputSpec, ...]) -> None:
        self._outputs = outputs
        self.at_once = max(1, _PART_BYTES // max(1, reply_bytes(outputs, Extent(0, 0, 1))))

    def prepare(self, returned: Tensors, rows: int, seq: int, whole: bool) -> Tensors:
        check_outputs(self._outputs, returned, rows, seq)
        given = [(spec, returned[spec.name]) for spec in self._outputs]
        return {spec.name: tensor.flatten(0, 1) if spec.per_token else tensor for spec, tensor in given}

    def encode(self, selection: Selection, start: int, stop: int) -> Tensors:
        outputs = {}
        for spec in self._outputs:
            if spec.per_token:
                outputs[spec.name] = selection.take(spec.name, start, stop)
            elif start == 0:  # with the first positions, once
                outputs[spec.name] = selection.tensors[spec.name][selection.rows]
        return outputs


def check_outputs(specs: tuple[OutputSpec, ...], outputs: Mapping[str, torch.Tensor], batch: int, seq: int) -> None:
    """Raise PlanError unless `outputs` holds every output of `specs` in the shape for (batch, seq).

    A float travels as any float dtype; an integer never becomes a float or the other way round."""
    for spec in specs:
        tensor = outputs.get(spec.name)
        if not isinstance(tensor, torch.Tensor):
            raise PlanError(f"the teacher returned {sorted(outputs)}; expected a tensor {spec.name!r} among them.")
        if tensor.dtype.is_floating_point != DTYPES[spec.dtype].is_floating_point:
            raise PlanError(f"the teacher returned {spec.name!r} as {tensor.dtype}; {spec.dtype} was offered.")
        expected = spec.dims(Extent(batch, seq))
        if tensor.shape != expected:
            raise PlanError(
                f"the teacher returned {spec.name!r} of shape {tuple(tensor.shape)} for a batch of {batch} x {seq}; "
                f"expected {expected}. The first axis is the batch; axis 1 may be the sequence."
            )


class LanguageModel:
    """The payloads of a language model, from its logits, or from its hidden states and its head."""

    def __init__(self, settings: PayloadConfig, words: int, head: Head | None) -> None:
        """`head`: of the model whose forward returns `hidden`; None where it returns `logits`. Either gives `words` logits."""
        self._payload = settings
        self._head = head
        self.at_once = max(1, _PART_BYTES // (4 * words))

    def prepare(self, returned: Tensors, rows: int, seq: int, whole: bool) -> Tensors:
        """Where whole logits are sent, the head is applied once to the combined batch, as the model itself does it."""
        needed = ["hidden"] if self._head or self._payload.hidden is not None else []
        if not self._head:
            needed.append("logits")
        tensors = {}
        for name in needed:
            tensor = returned.get(name)
            if tensor is None or tensor.shape[:2] != (rows, seq) or tensor.ndim != 3:
                found = sorted(returned) if tensor is None else tuple(tensor.shape)
                raise PlanError(f"the teacher returned {found}; expected {name!r} of shape ({rows}, {seq}, ...).")
            tensors[name] = tensor.flatten(0, 1)
        if self._head and self._payload.logits and whole:
            tensors["logits"] = self._head(returned["hidden"]).flatten(0, 1)
        return tensors

    def encode(self, selection: Selection, start: int, stop: int) -> Tensors:
        settings = self._payload
        outputs: dict[str, torch.Tensor] = {}
        if start == stop:
            return outputs
        computed = "logits" in selection.tensors
        if settings.hidden is not None or not computed:
            hidden = selection.take("hidden", start, stop)
        if settings.hidden is not None:
            outputs["hidden"] = hidden
        if settings.named == ("hidden",):
            return outputs
        if computed:
            logits = selection.take("logits", start, stop)
        else:
            assert self._head
            logits = self._head(hidden)
        logits = logits[..., : settings.vocab]
        if settings.logits:
            outputs["logits"] = logits
        if settings.topk or settings.logprobs:
            logprobs = torch.log_softmax(logits.float(), -1)
            if settings.topk:
                outputs |= top_k(logprobs, settings.topk.k, settings.topk.temperatures)
            if settings.logprobs:
                assert selection.targets is not None
                targets, candidates = selection.targets[start:stop], selection.candidates
                outputs["logprobs"] = of_targets(logprobs, targets.to(logprobs.device))
                if settings.logprobs.entropy:
                    outputs["entropy"] = torch.special.entr(logprobs.exp()).sum(-1)
                if candidates is not None:
                    outputs["candidate_logprobs"] = logprobs.gather(-1, candidates[start:stop].to(logprobs.device))
        return outputs


def top_k(logprobs: torch.Tensor, k: int, temperatures: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """The k largest of `logprobs` (n, vocab) float32, their words, and the log of the rest's mass at each temperature.

    At temperature T the distribution is softmax(logprobs / T); the rest is summed, never taken as 1 - sum, so a tail of
    1e-12 keeps its digits.
    """
    values, ids = logprobs.topk(k, -1)
    tails = []
    for temperature in temperatures:
        scaled = logprobs / temperature
        total = torch.logsumexp(scaled, -1)
        tails.append(torch.logsumexp(scaled.scatter_(-1, ids, -torch.inf), -1) - total)
    return {"topk_logprobs": values, "topk_ids": ids.int(), "tail_logmass": torch.stack(tails, -1)}


def of_targets(logprobs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(n,) log-probabilities of `targets` (n,) under `logprobs` (n, vocab); 0 where a target is IGNORED."""
    there = targets != IGNORED
    found = logprobs.gather(-1, torch.where(there, targets, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(there, found, 0.0)
