"""What a loaded teacher offers: small forwards show its outputs, or that it cannot give what the payload asks for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shmbridge.config import Config, OutputConfig
from shmbridge.errors import PlanError
from shmbridge.head import Head
from shmbridge.output_spec import Offer, OutputSpec, payload_outputs
from shmbridge.plane import shared_head
from shmbridge.plane.tensors import dtype_name
from shmbridge.teacher import startup
from shmbridge.teacher.batch import Batch, Forward
from shmbridge.teacher.payload import Encoder, LanguageModel, Verbatim, check_outputs

MAX_OUTPUTS = 8


def make(forward: Forward, settings: Config, device: torch.device) -> tuple[Offer, Encoder]:
    """The teacher's offer, and the encoder that turns what the forward returns into it.

    With a payload, the teacher is a language model: it returns `logits`, or returns `hidden` and has a `head`. Without one, a
    custom teacher offers what it returns, as teacher.outputs or its attribute `outputs` declares, or as a probe finds; its
    attribute `packs` tells whether it heeds batch.position_ids.

    Raises:
        PlanError: this teacher cannot give the payload.
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
            outputs, words, head = probe(forward, device, declared), None, None
            encoder = Verbatim(outputs)
        whole = [spec.name for spec in outputs if not spec.per_token]
        if settings.payload.stream and whole:
            raise PlanError(
                f"output {whole[0]!r} has no sequence axis and cannot be streamed; leave payload.stream out."
            )
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
            probe=startup.parity_probe(forward, encoder, outputs, settings, device) if settings.parity else None,
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
    dtype = dtype_name(source.dtype, "the teacher's output")
    outputs = payload_outputs(settings.payload, words, width, dtype)
    return outputs, LanguageModel(settings.payload, head), settings.payload.vocab or words, head


def probe(forward: Forward, device: torch.device, declared: Mapping[str, OutputConfig]) -> tuple[OutputSpec, ...]:
    """What `forward` returns: as declared, or as two small batches of different shapes show it.

    An axis follows the sequence if it is axis 1 and equals the length in both batches.

    Raises:
        PlanError: an output is no tensor, lacks the batch axis, has a dtype or shape that cannot travel, or differs from
            its declaration.
    """
    shapes = ((1, 4), (2, 6))
    returned = [_run_probe(forward, device, *shape) for shape in shapes]
    if declared:
        specs = tuple(OutputSpec(name, output.dtype, output.shape) for name, output in declared.items())
    else:
        specs = tuple(_infer(name, [outputs.get(name) for outputs in returned], shapes) for name in returned[0])
    if not 0 < len(specs) <= MAX_OUTPUTS:
        raise PlanError(f"the teacher returned {len(specs)} outputs; a reply carries 1 to {MAX_OUTPUTS}.")
    for outputs, (batch, seq) in zip(returned, shapes, strict=True):
        check_outputs(specs, outputs, batch, seq)
    return specs


def _run_probe(forward: Forward, device: torch.device, batch: int, seq: int) -> Mapping[str, torch.Tensor]:
    ids = torch.zeros(batch, seq, dtype=torch.int64, device=device)
    outputs = forward(Batch(ids, None))
    if not isinstance(outputs, Mapping):
        raise PlanError(
            f"the teacher's forward returned a {type(outputs).__name__}; expected a dict of names to tensors with a "
            'leading batch axis, such as {"logits": logits}.'
        )
    return outputs


def _infer(name: str, tensors: list[torch.Tensor | None], shapes: tuple[tuple[int, int], ...]) -> OutputSpec:
    for tensor, (batch, _) in zip(tensors, shapes, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or tensor.shape[0] != batch:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise PlanError(
                f"output {name!r} is {found} for {batch} rows; expected a tensor with a leading batch axis."
            )
    first, second = tensors
    assert first is not None and second is not None
    dtype = dtype_name(first.dtype, f"output {name!r}")
    per_token = first.ndim > 1 and (first.shape[1], second.shape[1]) == (shapes[0][1], shapes[1][1])
    rest = tuple(first.shape[1 + per_token :])
    if rest != tuple(second.shape[1 + per_token :]):
        raise PlanError(
            f"output {name!r} has the shapes {tuple(first.shape)} and {tuple(second.shape)} for batches of {shapes[0]} and "
            f"{shapes[1]}; only axis 0 may follow the batch and only axis 1 the sequence."
        )
    return OutputSpec(name, dtype, ("seq", *rest) if per_token else rest)
