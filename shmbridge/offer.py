"""What a teacher offers at the barrier, and how many bytes that takes. Torch-free: the launcher sizes memory with it.

The layout of a payload is not written into every reply. Both sides derive it from the offer and the request's shape: the
outputs one after the other, each aligned to a cache line.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shmbridge.config import TorchDtype
from shmbridge.errors import AttachError, PlanError
from shmbridge.layout import OFFER_CAPACITY, PAGE, align

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
        """Bytes of one token's share of the output, or of one row's where it has no sequence axis."""
        nbytes = ITEM_BYTES[self.dtype]
        for size in self.shape[self.per_token :]:
            assert size != "seq"
            nbytes *= size
        return nbytes

    def dims(self, batch: int, seq: int) -> tuple[int, ...]:
        """The shape of the tensor for a request of (batch, seq)."""
        if self.per_token:
            return (batch, seq, *self.shape[1:])  # type: ignore[arg-type]
        return (batch, *self.shape)  # type: ignore[arg-type]


class Offer(msgspec.Struct, frozen=True):
    """The teacher's side of the agreement."""

    outputs: tuple[OutputSpec, ...]
    model: str
    path: str = ""  # local directory with the tokenizer, where there is one
    vocab_size: int | None = None  # token IDs must be below it
    max_seq: int | None = None  # positions that the model has

    def encode(self) -> bytes:
        """Raises PlanError where the offer is larger than its field on the board."""
        text = msgspec.json.encode(self)
        if len(text) > OFFER_CAPACITY:
            raise PlanError(
                f"the teacher's offer takes {len(text)} bytes, at most {OFFER_CAPACITY} fit: return fewer outputs, or "
                "shorten their names."
            )
        return text

    @classmethod
    def decode(cls, text: bytes) -> Offer:
        """Raises AttachError where the text is not an offer."""
        try:
            offer = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise AttachError(f"the teacher's offer is garbled: {error}.") from None
        for spec in offer.outputs:
            rest = spec.shape[spec.per_token :]
            if any(size == "seq" or size < 0 for size in rest):
                raise AttachError(f"the teacher's offer is garbled: output {spec.name!r} has the shape {spec.shape}.")
        return offer


def offsets(outputs: tuple[OutputSpec, ...], batch: int, seq: int) -> list[int]:
    """Where each output of a (batch, seq) request begins in its reply slot, in bytes; the end of the last one follows."""
    places = [0]
    for spec in outputs:
        places.append(align(places[-1] + (batch * seq if spec.per_token else batch) * spec.item_bytes))
    return places


def slot_bytes(outputs: tuple[OutputSpec, ...], max_tokens: int, max_batch: int) -> int:
    """Bytes of a reply slot that holds the answer to any request the ring takes."""
    largest = sum(align((max_tokens if spec.per_token else max_batch) * spec.item_bytes) for spec in outputs)
    return align(largest, PAGE)
