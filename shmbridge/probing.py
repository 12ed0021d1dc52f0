"""The teacher's half of the parity check: a small batch, and fingerprints of what the model itself gives for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shmbridge import fingerprint
from shmbridge.combine import next_tokens
from shmbridge.config import Config, PayloadConfig
from shmbridge.encode import Choice, Encoder, LanguageModel
from shmbridge.head import Head
from shmbridge.offer import BY_HEAD, Extent, OutputSpec, Probe, by_head
from shmbridge.payload import Batch, Forward
from shmbridge.session import Shape

_ROWS, _SEQ = 2, 6
_STRIDE = 7  # between neighbouring IDs, so that no two rows of the probe are alike
_EXACT, _ROUNDED = 0.002, 0.05  # relative; float32 all the way, or 16 bits somewhere


def make(
    forward: Forward, encoder: Encoder, outputs: tuple[OutputSpec, ...], settings: Config, device: torch.device
) -> Probe:
    """Fingerprints by the teacher's `reference` where it has one (the model's own forward, no part of it taken over by an
    encoder), else by `forward`."""
    ids = _token_ids(forward, settings)
    returned = getattr(forward, "reference", forward)(Batch(ids.to(device), None))
    if settings.payload.named and "logits" in returned:
        encoder = LanguageModel(settings.payload, None)
    expected = _encoded(encoder, returned, ids, settings.payload)
    rows, seq = ids.shape
    prints = {
        spec.name: fingerprint.of(spec, expected[spec.name].reshape(spec.dims(Extent(rows, seq)))) for spec in outputs
    }
    head: Head | None = getattr(forward, "head", None)
    if head and settings.payload.hidden is not None:
        words = head.weight.shape[0]
        logits = returned["logits"][..., :words] if "logits" in returned else head(returned["hidden"])
        prints[BY_HEAD] = fingerprint.of(by_head(words), logits)
    dtypes = [tensor.dtype for tensor in returned.values()] + [tensor.dtype for tensor in expected.values()]
    rounded = any(dtype.itemsize == 2 for dtype in dtypes) or any(
        spec.dtype in ("bfloat16", "float16") for spec in outputs
    )
    return Probe(tuple(map(tuple, ids.tolist())), prints, _ROUNDED if rounded else _EXACT)


def vocab_size(forward: Forward, settings: Config) -> int | None:
    """Token IDs must be below it: as set, or the teacher's own word."""
    return settings.teacher.vocab_size or getattr(forward, "vocab_size", None)


def _token_ids(forward: Forward, settings: Config) -> torch.Tensor:
    """(2, 6) int64, or as much of it as the ring and the model take; all 0 where the vocabulary is not known."""
    shape = Shape.of(settings, 1)
    room = shape.max_tokens if shape.chunks else shape.max_positions
    seq = min(_SEQ, room, getattr(forward, "max_seq", None) or _SEQ)
    rows = _ROWS if _ROWS * seq <= room and shape.max_batch >= _ROWS else 1
    return torch.arange(rows * seq).reshape(rows, seq) * _STRIDE % (vocab_size(forward, settings) or 1)


def _encoded(
    encoder: Encoder, returned: Mapping[str, torch.Tensor], ids: torch.Tensor, payload: PayloadConfig
) -> dict[str, torch.Tensor]:
    """The whole payload of the batch; candidates are word 0."""
    rows, seq = ids.shape
    device = next(iter(returned.values())).device
    targets = torch.from_numpy(next_tokens(ids.numpy())).flatten().to(device)
    asked = payload.logprobs.candidates if payload.logprobs else 0
    candidates = torch.zeros(rows * seq, asked, dtype=torch.int64, device=device) if asked else None
    choice = Choice(slice(0, rows), seq, None, targets, candidates)
    chosen = encoder.select(encoder.prepare(returned, rows, seq, True), choice)
    ((_, outputs),) = encoder.encode(chosen)  # so small that it is one part
    return dict(outputs)
