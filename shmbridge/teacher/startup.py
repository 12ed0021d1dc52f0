"""Forwards at startup: the teacher's half of the parity check, whether packed documents see each other, and the warm-up."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shmbridge import fingerprint
from shmbridge.config import Config, PayloadConfig
from shmbridge.errors import PlanError
from shmbridge.head import Head
from shmbridge.log import logger
from shmbridge.output_spec import BY_HEAD, Extent, OutputSpec, Probe, by_head
from shmbridge.plane import cuda_runtime
from shmbridge.shm.session import Shape
from shmbridge.teacher.batch import Batch, Forward, next_tokens
from shmbridge.teacher.grouping import TokenLimit
from shmbridge.teacher.payload import Encoder, LanguageModel, Selection, parts

_ROWS, _SEQ = 2, 6
_STRIDE = 7  # between neighbouring IDs, so that no two rows of the probe are alike
_PACKED_IDS, _PACKED_PLACES = (5, 3, 1, 4, 2, 3), (0, 1, 2, 0, 1, 2)
_EXACT, _ROUNDED = 0.002, 0.05  # relative; float32 all the way, or 16 bits somewhere


def parity_probe(
    forward: Forward, encoder: Encoder, outputs: tuple[OutputSpec, ...], settings: Config, device: torch.device
) -> Probe:
    """Token IDs, and fingerprints of the outputs for them. They are computed by the teacher's `reference` where it has one (the
    model's own forward, of which no encoder does a part), else by `forward`. Raises PlanError where an output has a NaN."""
    ids = _token_ids(forward, settings)
    returned = getattr(forward, "reference", forward)(Batch(ids.to(device), None))
    if settings.payload.named and "logits" in returned:
        encoder = LanguageModel(settings.payload, returned["logits"].shape[-1], None)
    expected = encoder.encode(_all_positions(encoder, returned, ids, settings.payload), 0, ids.numel())
    for name, tensor in expected.items():
        if odd := int(tensor.isnan().sum()):
            raise PlanError(
                f"the teacher's {name!r} has {odd} NaN among {tensor.numel()} numbers for a small batch of ordinary tokens. Try "
                "another teacher.dtype or teacher.attn_implementation; parity=false lets it pass."
            )
    extent = Extent(*ids.shape)
    prints = {spec.name: fingerprint.of(spec, expected[spec.name].reshape(spec.dims(extent))) for spec in outputs}
    head: Head | None = getattr(forward, "head", None)
    if head and settings.payload.hidden is not None:
        words = head.weight.shape[0]
        logits = returned["logits"][..., :words] if "logits" in returned else head(returned["hidden"])
        prints[BY_HEAD] = fingerprint.of(by_head(words), logits)
    rounded = any(tensor.dtype.itemsize == 2 for tensor in (*returned.values(), *expected.values()))
    rounded = rounded or any(spec.dtype in ("bfloat16", "float16") for spec in outputs)
    return Probe(tuple(map(tuple, ids.tolist())), prints, _ROUNDED if rounded else _EXACT)


def packs(forward: Forward, settings: Config, device: torch.device) -> bool:
    """Whether two documents in one row give what each of them gives alone. False where it cannot be tried: the vocabulary
    is not known, the model is too short, or it takes no position_ids."""
    known = vocab_size(forward, settings)
    if known is None or (getattr(forward, "max_seq", None) or len(_PACKED_IDS)) < len(_PACKED_IDS):
        return False
    ids = torch.tensor([_PACKED_IDS], device=device).remainder(known)
    places = torch.tensor([_PACKED_PLACES], device=device)
    try:
        together = forward(Batch(ids, None, places))
    except Exception:
        return False
    first, second = forward(Batch(ids[:, :3], None)), forward(Batch(ids[:, 3:], None))
    for name, found in together.items():
        if found.is_floating_point() and found.shape[:2] == ids.shape:
            alone = torch.cat([first[name], second[name]], 1)
            tolerance = 0.02 if found.dtype.itemsize == 2 else 1e-4  # relative, for sums in another order
            if not (found - alone).abs().max() <= tolerance * alone.abs().max():
                return False
    return True


def vocab_size(forward: Forward, settings: Config) -> int | None:
    """Token IDs must be below it: as set, or as the teacher says."""
    return settings.teacher.vocab_size or getattr(forward, "vocab_size", None)


def warm_up(forward: Forward, encoder: Encoder, limit: TokenLimit, settings: Config, device: torch.device) -> None:
    """Compute and encode a small batch, without and with an attention mask, and one of ring.max_tokens tokens, so that CUDA loads
    its kernels and torch's allocator grows before the barrier. Out of memory lowers `limit`, as it does while training.

    Raises:
        RuntimeError: CUDA cannot be used any more. Whatever else a forward raises is logged.
    """
    ids = _token_ids(forward, settings).to(device)
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0
    with torch.inference_mode():
        _try(forward, encoder, Batch(ids, None), settings)
        _try(forward, encoder, Batch(ids, mask), settings)
        tried = 0
        while True:
            tokens = min(settings.ring.max_tokens, limit.tokens)
            seq = min(tokens, getattr(forward, "max_seq", None) or tokens)
            rows = max(1, min(tokens // seq, settings.ring.max_batch))
            largest = torch.arange(rows * seq, device=device).reshape(rows, seq) % _words(forward, settings)
            if rows * seq == tried or _try(forward, encoder, Batch(largest, None), settings):
                return
            tried = rows * seq
            limit.failed(tried)
            logger.warning(
                "the teacher ran out of memory as it warmed up; forwards take %d tokens at most", limit.tokens
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _try(forward: Forward, encoder: Encoder, batch: Batch, settings: Config) -> bool:
    """Compute and encode a batch. False where it ran out of memory."""
    try:
        selection = _all_positions(encoder, forward(batch), batch.input_ids, settings.payload)
        for _ in parts(encoder, selection):
            pass
    except Exception as error:
        if cuda_runtime.is_sticky(error):
            raise
        if cuda_runtime.is_out_of_memory(error):
            return False
        shape = tuple(batch.input_ids.shape)
        logger.info("the warm-up of %s tokens raised %r; requests of that shape would too", shape, error)
    return True


def _token_ids(forward: Forward, settings: Config) -> torch.Tensor:
    """(2, 6) int64, or as much of it as the ring and the model take; all 0 where the vocabulary is not known."""
    shape = Shape.of(settings, 1)
    room = shape.max_tokens if shape.chunks else shape.max_positions
    seq = min(_SEQ, room, getattr(forward, "max_seq", None) or _SEQ)
    rows = _ROWS if _ROWS * seq <= room and shape.max_batch >= _ROWS else 1
    return torch.arange(rows * seq).reshape(rows, seq) * _STRIDE % _words(forward, settings)


def _words(forward: Forward, settings: Config) -> int:
    """Token IDs of these batches are below it; each of them is a target too, which payload.vocab bounds."""
    known = vocab_size(forward, settings) or 1
    return min(known, settings.payload.vocab or known)


def _all_positions(
    encoder: Encoder, returned: Mapping[str, torch.Tensor], ids: torch.Tensor, payload: PayloadConfig
) -> Selection:
    """The batch of `ids` as one request; its candidates are word 0."""
    rows, seq = ids.shape
    targets = torch.from_numpy(next_tokens(ids.cpu().numpy())).flatten()
    asked = payload.logprobs.candidates if payload.logprobs else 0
    candidates = torch.zeros(rows * seq, asked, dtype=torch.int64) if asked else None
    tensors = encoder.prepare(returned, rows, seq, True)
    return Selection(tensors, slice(0, rows), rows * seq, 0, targets, candidates)
