"""What a loaded teacher offers: a small forward shows its outputs, or that it cannot give what the payload asks for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shmbridge.config import Config
from shmbridge.errors import PlanError
from shmbridge.head import Head
from shmbridge.output_spec import Offer, OutputSpec, payload_outputs
from shmbridge.plane import arrays, shared_head
from shmbridge.plane.arrays import Batch, Forward
from shmbridge.teacher import startup
from shmbridge.teacher.payload import Encoder, LanguageModel, Verbatim


def make(forward: Forward, settings: Config, device: torch.device) -> tuple[Offer, Encoder]:
    """The offer, and what turns the forward's return into it.

    A teacher of one's own whose payload sections are all empty offers whatever it returns: by its own word (attribute
    `outputs`), the config's, or a probe; that it heeds batch.position_ids it says by `packs`. Everything else is a language
    model that returns `logits`, or `hidden` and has a `head`.

    Raises:
        PlanError: the payload is not one that this teacher can give.
    """
    with torch.inference_mode():
        if settings.payload.named:
            outputs, encoder, words, head = _of_language_model(forward, settings, device)
        elif settings.payload.vocab is not None:
            raise PlanError(
                f"payload.vocab is {settings.payload.vocab}, and no payload is named that it could cut; set payload.logits={{}}."
            )
        else:
            declared = settings.teacher.outputs or getattr(forward, "outputs", {})
            outputs, words, head = arrays.probe(forward, device, declared), None, None
            encoder = Verbatim(outputs)
        _check_streaming(settings, outputs)
        offer = Offer(
            outputs=outputs,
            model=settings.teacher.model,
            path=getattr(forward, "path", ""),
            vocab_size=startup.vocab_size(forward, settings),
            max_seq=getattr(forward, "max_seq", None),
            packs=startup.packs(forward, settings, device) if words else getattr(forward, "packs", False),
            words=words,
            temperatures=settings.payload.topk.temperatures if settings.payload.topk else (),
            head=shared_head.spec_of(head) if head and settings.payload.hidden is not None else None,
            tokenizer=getattr(forward, "tokenizer", None),
            probe=startup.make(forward, encoder, outputs, settings, device) if settings.parity else None,
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
    dtype = arrays.dtype_name(source.dtype, "the teacher's output")
    outputs = payload_outputs(settings.payload, words, width, dtype)
    return outputs, LanguageModel(settings.payload, head), settings.payload.vocab or words, head


def _check_streaming(settings: Config, outputs: tuple[OutputSpec, ...]) -> None:
    whole = [spec.name for spec in outputs if not spec.per_token]
    if settings.payload.stream and whole:
        raise PlanError(f"output {whole[0]!r} has no sequence axis and cannot be streamed; leave payload.stream out.")
