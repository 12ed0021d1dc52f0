"""What a teacher offers at the startup barrier: the names, dtypes and shapes of its outputs, its head, its vocabulary.

Without torch, because the launcher sizes memory with it. The layout of a payload is not written into every reply. Both sides
derive it from the offer and the request's shape: see shm.layout.
"""

from __future__ import annotations

from math import prod
from typing import Literal, NamedTuple

import msgspec

from shmbridge.config import PayloadConfig, TorchDtype
from shmbridge.errors import AttachError, PlanError

ITEM_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class Extent(NamedTuple):
    """What a request asks for: `batch` rows of `seq` tokens, and outputs for `chosen` positions; None: for all."""

    batch: int
    seq: int
    chosen: int | None = None

    @property
    def positions(self) -> int:
        """Positions whose outputs come back."""
        return self.batch * self.seq if self.chosen is None else self.chosen


class OutputSpec(msgspec.Struct, frozen=True):
    """One named tensor of every reply: (batch, *shape), where the first axis of `shape` may be the sequence's."""

    name: str
    dtype: TorchDtype
    shape: tuple[int | Literal["seq"], ...]

    @property
    def per_token(self) -> bool:
        return bool(self.shape) and self.shape[0] == "seq"

    @property
    def item_bytes(self) -> int:
        """Bytes of one position's share of the output, or of one row's where it has no sequence axis."""
        return ITEM_BYTES[self.dtype] * self.item_width

    @property
    def item_width(self) -> int:
        """Numbers in one position's share of the output, or in one row's."""
        return prod(size for size in self.shape[self.per_token :] if size != "seq")

    def dims(self, extent: Extent) -> tuple[int, ...]:
        """The shape of the tensor for a request: its chosen positions lie in one axis, in row-major order."""
        if not self.per_token:
            return (extent.batch, *self.shape)  # type: ignore[arg-type]
        lead = (extent.batch, extent.seq) if extent.chosen is None else (extent.chosen,)
        return (*lead, *self.shape[1:])


class HeadSpec(msgspec.Struct, frozen=True):
    """The output head that turns hidden states into logits: softcap(scale x (hidden @ weight.T + bias))."""

    dtype: TorchDtype
    words: int
    width: int
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0


class Probe(msgspec.Struct, frozen=True):
    """What the parity check compares: token IDs, and a fingerprint of each output that the model gives for them."""

    input_ids: tuple[tuple[int, ...], ...]
    outputs: dict[str, tuple[float, ...]]
    tolerance: float  # relative; what the dtypes on the way leave of the digits


BY_HEAD = "head(hidden)"


def by_head(words: int) -> OutputSpec:
    """The logits that a rank computes from hidden states, which are fingerprinted like an output."""
    return OutputSpec(BY_HEAD, "float32", ("seq", words))


class Tokens(msgspec.Struct, frozen=True):
    """A tokenizer's table: how many entries it has and a SHA-256 of (id, token) in the order of IDs."""

    entries: int
    digest: str


class Offer(msgspec.Struct, frozen=True):
    """What a loaded teacher publishes."""

    outputs: tuple[OutputSpec, ...]
    model: str
    path: str = ""  # local directory with the tokenizer, where there is one
    vocab_size: int | None = None  # token IDs must be below it
    max_seq: int | None = None  # positions that the model has
    packs: bool = True  # whether packed documents cannot see each other
    words: int | None = None  # the size of the teacher's distribution, where it has one
    temperatures: tuple[float, ...] = ()  # of tail_logmass, where the payload is topk
    head: HeadSpec | None = None  # where the payload is hidden
    tokenizer: Tokens | None = None
    probe: Probe | None = None

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    def agrees(self, other: Offer) -> bool:
        """Whether two replicas offer the same; their probes may differ in the last bits."""
        return msgspec.structs.replace(self, probe=None) == msgspec.structs.replace(other, probe=None)

    def differs(self, other: Offer) -> str:
        """The fields that differ from `other`, with both values; empty if they agree."""
        names = [name for name in self.__struct_fields__ if name != "probe"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return "; ".join(f"{name} {here}, not {there}" for name, here, there in pairs if here != there)

    @classmethod
    def decode(cls, text: bytes) -> Offer:
        """Raises AttachError if the text is not an offer."""
        try:
            offer = msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise AttachError(f"the teacher's offer is garbled: {error}.") from None
        for spec in offer.outputs:
            rest = spec.shape[spec.per_token :]
            if any(size == "seq" or size < 0 for size in rest):
                raise AttachError(f"the teacher's offer is garbled: output {spec.name!r} has the shape {spec.shape}.")
        return offer


def payload_outputs(payload: PayloadConfig, words: int, width: int | None, dtype: TorchDtype) -> tuple[OutputSpec, ...]:
    """The outputs of a language model's reply.

    Args:
        payload: its sections name what a reply carries.
        words: the size of the distribution; payload.vocab cuts it.
        width, dtype: of the hidden state; a width of None where it is not known.

    Raises:
        PlanError: `vocab` or `topk.k` is above `words`, or the payload is hidden and its width is not known.
    """
    if payload.vocab is not None and payload.vocab > words:
        raise PlanError(f"payload.vocab is {payload.vocab}; the teacher's distribution has {words} words. Lower it.")
    words = payload.vocab or words
    specs: list[OutputSpec] = []
    if payload.logits:
        specs.append(OutputSpec("logits", payload.logits.dtype, ("seq", words)))
    if payload.topk:
        if payload.topk.k > words:
            raise PlanError(
                f"payload.topk.k is {payload.topk.k}; the teacher's distribution has {words} words. Lower it."
            )
        specs.append(OutputSpec("topk_logprobs", "float32", ("seq", payload.topk.k)))
        specs.append(OutputSpec("topk_ids", "int32", ("seq", payload.topk.k)))
        specs.append(OutputSpec("tail_logmass", "float32", ("seq", len(payload.topk.temperatures))))
    if payload.logprobs:
        specs.append(OutputSpec("logprobs", "float32", ("seq",)))
        if payload.logprobs.entropy:
            specs.append(OutputSpec("entropy", "float32", ("seq",)))
        if payload.logprobs.candidates:
            specs.append(OutputSpec("candidate_logprobs", "float32", ("seq", payload.logprobs.candidates)))
    if payload.hidden is not None:
        if width is None:
            raise PlanError("payload.hidden needs the teacher's hidden state, and this teacher gives none.")
        specs.append(OutputSpec("hidden", dtype, ("seq", width)))
    return tuple(specs)


def reply_bytes(outputs: tuple[OutputSpec, ...], extent: Extent) -> int:
    """Bytes of a reply's tensors."""
    return sum((extent.positions if spec.per_token else extent.batch) * spec.item_bytes for spec in outputs)
