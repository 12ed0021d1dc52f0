"""What a loaded teacher offers: a small probe forward shows its outputs, and their fingerprints for the parity check."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shmbridge import fingerprint, payload, shared_head
from shmbridge.combine import next_tokens
from shmbridge.config import Config
from shmbridge.encode import Choice, Encoder, LanguageModel, Verbatim
from shmbridge.errors import PlanError
from shmbridge.head import Head
from shmbridge.offer import Extent, Offer, OutputSpec, Probe, payload_outputs
from shmbridge.payload import Batch, Forward
from shmbridge.session import Shape

_ROWS, _SEQ = 2, 6


def make(forward: Forward, settings: Config, device: torch.device) -> tuple[Offer, Encoder]:
    """The offer, and what turns the forward's return into it.

    A teacher of one's own whose payload sections are all empty offers whatever it returns: by its own word (attribute
    `outputs`), the config's, or a probe. Everything else is a language model that returns `logits`, or `hidden` and has a
    `head`.

    Raises:
        PlanError: the payload is not one that this teacher can give.
    """
    with torch.inference_mode():
        if settings.payload.named:
            outputs, encoder, words, head = _of_language_model(forward, settings, device)
        else:
            declared = settings.teacher.outputs or getattr(forward, "outputs", {})
            outputs, words, head = payload.probe(forward, device, declared), None, None
            encoder = Verbatim(outputs)
        _check_streaming(settings, outputs)
        vocab_size = settings.teacher.vocab_size or getattr(forward, "vocab_size", None)
        max_seq = getattr(forward, "max_seq", None)
        offer = Offer(
            outputs=outputs,
            model=settings.teacher.model,
            path=getattr(forward, "path", ""),
            vocab_size=vocab_size,
            max_seq=max_seq,
            packs=getattr(forward, "packs", True),
            words=words,
            temperatures=settings.payload.topk.temperatures if settings.payload.topk else (),
            head=shared_head.spec_of(head) if head and settings.payload.hidden is not None else None,
            tokenizer=getattr(forward, "tokenizer", None),
            probe=_probe(forward, encoder, outputs, settings, device, (vocab_size, max_seq)) if settings.parity else None,
        )
    return offer, encoder


def _of_language_model(
    forward: Forward, settings: Config, device: torch.device
) -> tuple[tuple[OutputSpec, ...], Encoder, int, Head | None]:
    returned = forward(Batch(torch.zeros(1, 4, dtype=torch.int64, device=device), None))
    head: Head | None = getattr(forward, "head", None)
    wanted = ", ".join(settings.payload.named)
    if head is None and settings.payload.hidden is not None:
        why = getattr(forward, "no_head", "") or "it has no attribute `head`"
        raise PlanError(f"payload.hidden cannot be had from this teacher: {why}. Use payload.topk or payload.logits.")
    source = returned.get("hidden" if head else "logits") if isinstance(returned, Mapping) else None
    if source is None or source.ndim != 3:
        found = sorted(returned) if isinstance(returned, Mapping) else type(returned).__name__
        raise PlanError(
            f"the payload is {wanted}, which is made of logits (batch, seq, vocab), or of hidden states and the attribute "
            f"`head`; the teacher returned {found}."
        )
    words = head.weight.shape[0] if head else source.shape[-1]
    width = source.shape[-1] if head else None
    dtype = payload.dtype_name(source.dtype, "the teacher's output")
    outputs = payload_outputs(settings.payload, words, width, dtype)
    return outputs, LanguageModel(settings.payload, head), settings.payload.vocab or words, head


def _check_streaming(settings: Config, outputs: tuple[OutputSpec, ...]) -> None:
    whole = [spec.name for spec in outputs if not spec.per_token]
    if settings.payload.stream and whole:
        raise PlanError(f"output {whole[0]!r} has no sequence axis and cannot be streamed; leave payload.stream out.")


def _probe(
    forward: Forward,
    encoder: Encoder,
    outputs: tuple[OutputSpec, ...],
    settings: Config,
    device: torch.device,
    limits: tuple[int | None, int | None],
) -> Probe:
    """What the model gives for a small batch, by its own forward where the teacher has a `reference`."""
    vocab_size, max_seq = limits
    rows, seq = _probe_shape(Shape.of(settings, 1), max_seq)
    ids = torch.arange(rows * seq).reshape(rows, seq) * 7 % (vocab_size or 1)
    batch = Batch(ids.to(device), None)
    returned = getattr(forward, "reference", forward)(batch)
    by_model: Encoder = LanguageModel(settings.payload, None) if "logits" in returned and settings.payload.named else encoder
    targets = torch.from_numpy(next_tokens(ids.numpy())).flatten().to(device)
    candidates = None
    if settings.payload.logprobs and settings.payload.logprobs.candidates:
        candidates = torch.zeros(rows * seq, settings.payload.logprobs.candidates, dtype=torch.int64, device=device)
    choice = Choice(slice(0, rows), seq, None, targets, candidates)
    prepared = by_model.prepare(returned, rows, seq, True)
    found = {name: tensor for _, part in by_model.encode(by_model.select(prepared, choice)) for name, tensor in part.items()}
    dims = {spec.name: spec.dims(Extent(rows, seq)) for spec in outputs}
    prints = {spec.name: fingerprint.of(spec, found[spec.name].reshape(dims[spec.name])) for spec in outputs}
    halves = any(tensor.dtype.itemsize < 4 for tensor in returned.values()) or any(
        spec.dtype in ("bfloat16", "float16") for spec in outputs
    )
    return Probe(tuple(map(tuple, ids.tolist())), prints, 0.05 if halves else 0.002)


def _probe_shape(shape: Shape, max_seq: int | None) -> tuple[int, int]:
    """As large as 2 x 6, where the ring and the model take it."""
    room = shape.max_tokens if shape.chunks else min(shape.max_tokens, shape.max_positions)
    seq = min(_SEQ, room, max_seq or _SEQ)
    return (_ROWS if _ROWS * seq <= room and shape.max_batch >= _ROWS else 1), seq
