"""From what a teacher's forward returns to what its offer says: the formulas of the payloads, on the teacher's device.

A forward returns one row of outputs for each row of the combined batch. `Rows` are those of one request, cut to the positions
that it chose, and an encoder makes the payload for any range of them. So the output head, which takes most of the memory, is
applied to no more positions at a time than fit into `_HEAD_BYTES`, and only to positions that were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch

from shmbridge.config import PayloadConfig
from shmbridge.errors import PlanError
from shmbridge.head import Head
from shmbridge.output_spec import Extent, OutputSpec
from shmbridge.plane.tensors import DTYPES
from shmbridge.shm.layout import IGNORED

_HEAD_BYTES = 1 << 27

Tensors = Mapping[str, torch.Tensor]


class Choice(NamedTuple):
    """What one request wants of its rows in a forward, on the teacher's device."""

    rows: slice  # of the combined batch
    seq: int  # of the request, without the padding of the batch
    chosen: torch.Tensor | None  # (positions,) int64 into rows x seq, in row-major order; None: all
    targets: torch.Tensor | None = None  # (positions,) int64
    candidates: torch.Tensor | None = None  # (positions, c) int64


class Rows(NamedTuple):
    """What a forward returned for one request: tensors whose one or two leading axes hold `positions` positions."""

    positions: int
    tensors: dict[str, torch.Tensor]
    choice: Choice


class Encoder(Protocol):
    """Turns what a forward returns into replies."""

    def prepare(self, returned: Tensors, rows: int, seq: int, whole: bool) -> Tensors:
        """Check what a forward of (rows, seq) returned; `whole`: its requests want all of their positions at once.

        Raises:
            PlanError: it is not what the offer says.
        """

    def select(self, returned: Tensors, choice: Choice) -> Rows:
        """The rows of one request."""

    def encode(self, rows: Rows) -> Iterator[tuple[int, Tensors]]:
        """The whole payload of `rows`, as (first position, outputs)."""

    def encode_part(self, rows: Rows, start: int, stop: int) -> Tensors:
        """The payload of positions start to stop of `rows`."""


class Verbatim:
    """The outputs of a custom teacher, as its forward returns them."""

    def __init__(self, outputs: tuple[OutputSpec, ...]) -> None:
        self._outputs = outputs
        self._per_token = [(spec.name, spec.per_token) for spec in outputs]

    def prepare(self, returned: Tensors, rows: int, seq: int, whole: bool) -> Tensors:
        check_outputs(self._outputs, returned, rows, seq)
        return returned

    def select(self, returned: Tensors, choice: Choice) -> Rows:
        tensors = {}
        for name, per_token in self._per_token:
            tensor = returned[name]
            tensors[name] = _chosen(tensor, choice) if per_token else _of_rows(tensor, choice)
        return Rows(_positions(choice), tensors, choice)

    def encode(self, rows: Rows) -> Iterator[tuple[int, Tensors]]:
        yield 0, rows.tensors

    def encode_part(self, rows: Rows, start: int, stop: int) -> Tensors:
        return {name: _flat(rows, name)[start:stop] for name in rows.tensors}


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

    def __init__(self, settings: PayloadConfig, head: Head | None) -> None:
        """`head`: of the model whose forward returns `hidden`; None where it returns `logits`."""
        self._payload = settings
        self._head = head
        self._needed = ["hidden"] if head else ["logits"]

    def prepare(self, returned: Tensors, rows: int, seq: int, whole: bool) -> Tensors:
        """Where whole logits are sent, the head is applied once to the combined batch, as the model itself does it."""
        for name in self._needed:
            tensor = returned.get(name)
            if tensor is None or tensor.shape[:2] != (rows, seq) or tensor.ndim != 3:
                found = sorted(returned) if tensor is None else tuple(tensor.shape)
                raise PlanError(f"the teacher returned {found}; expected {name!r} of shape ({rows}, {seq}, ...).")
        if self._head and self._payload.logits and whole:
            return {**returned, "logits": self._head(returned["hidden"])}
        return returned

    def select(self, returned: Tensors, choice: Choice) -> Rows:
        wanted = ["logits" if "logits" in returned else "hidden"] + ["hidden"] * (self._payload.hidden is not None)
        tensors = {name: _chosen(returned[name], choice) for name in wanted}
        return Rows(_positions(choice), tensors, choice)

    def encode(self, rows: Rows) -> Iterator[tuple[int, Tensors]]:
        if self._payload.named == ("logits",) and "logits" in rows.tensors:
            yield 0, {"logits": self._cut(rows.tensors["logits"])}
            return
        step = self._positions_at_once(rows)
        for start in range(0, rows.positions, step):
            yield start, self.encode_part(rows, start, min(rows.positions, start + step))

    def encode_part(self, rows: Rows, start: int, stop: int) -> Tensors:
        settings, part = self._payload, slice(start, stop)
        outputs: dict[str, torch.Tensor] = {}
        if settings.hidden is not None:
            outputs["hidden"] = _flat(rows, "hidden")[part]
        if settings.named == ("hidden",):
            return outputs
        logits = self._logits(rows, part)
        if settings.logits:
            outputs["logits"] = logits
        if settings.topk or settings.logprobs:
            logprobs = torch.log_softmax(logits.float(), -1)
            if settings.topk:
                outputs |= top_k(logprobs, settings.topk.k, settings.topk.temperatures)
            if settings.logprobs:
                outputs |= self._logprobs(logprobs, rows.choice, part)
        return outputs

    def _logits(self, rows: Rows, part: slice) -> torch.Tensor:
        if "logits" in rows.tensors:
            return self._cut(_flat(rows, "logits")[part])
        assert self._head
        return self._head(_flat(rows, "hidden")[part])

    def _cut(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._payload.vocab is None else logits[..., : self._payload.vocab]

    def _positions_at_once(self, rows: Rows) -> int:
        words = self._head.weight.shape[0] if self._head else rows.tensors["logits"].shape[-1]
        return max(1, _HEAD_BYTES // (4 * words))

    def _logprobs(self, logprobs: torch.Tensor, choice: Choice, part: slice) -> dict[str, torch.Tensor]:
        assert self._payload.logprobs and choice.targets is not None
        outputs = {"logprobs": of_targets(logprobs, choice.targets[part].to(logprobs.device))}
        if self._payload.logprobs.entropy:
            outputs["entropy"] = torch.special.entr(logprobs.exp()).sum(-1)
        if choice.candidates is not None:
            outputs["candidate_logprobs"] = logprobs.gather(-1, choice.candidates[part].to(logprobs.device))
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


def _chosen(tensor: torch.Tensor, choice: Choice) -> torch.Tensor:
    """The rows of a combined (rows, padded seq, ...) tensor that are the request's, without padding: (rows, seq, ...), or
    (positions, ...) where it chose positions."""
    tensor = _of_rows(tensor, choice)
    if tensor.shape[1] != choice.seq:
        tensor = tensor[:, : choice.seq]
    return tensor if choice.chosen is None else tensor.flatten(0, 1)[choice.chosen.to(tensor.device)]


def _of_rows(tensor: torch.Tensor, choice: Choice) -> torch.Tensor:
    return tensor if choice.rows.stop - choice.rows.start == tensor.shape[0] else tensor[choice.rows]


def kept(rows: Rows) -> Rows:
    """`rows` as they may wait for their reader: laid out once, and no view of the whole forward, which would stay with it."""
    return rows._replace(tensors={name: _alone(tensor) for name, tensor in rows.tensors.items()})


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _flat(rows: Rows, name: str) -> torch.Tensor:
    """(positions, ...) of one tensor."""
    tensor = rows.tensors[name]
    return tensor.flatten(0, 1) if rows.choice.chosen is None else tensor


def _positions(choice: Choice) -> int:
    if choice.chosen is not None:
        return len(choice.chosen)
    rows: int = choice.rows.stop - choice.rows.start
    return rows * choice.seq
