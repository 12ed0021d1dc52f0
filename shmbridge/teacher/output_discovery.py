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
from shmbridge.teacher.payload import Encoder, LanguageModel, Tensors, Verbatim, check_outputs

MAX_OUTPUTS = 8
_SHAPES = ((1, 4), (2, 6))


def make(forward: Forward, settings: Config, device: torch.device) -> tuple[Offer, Encoder]:
    """The teacher's offer, and the encoder that turns what the forward returns into it.

    With a payload, the teacher is a language model: it returns `logits`, or returns `hidden` and has a `head`. Without one, a
    custom teacher offers what it returns, as teacher.outputs or its attribute `outputs` declares, or as a probe finds; its
    attribute `packs` tells whether it heeds batch.position_ids.

    Raises:
        PlanError: this teacher cannot give the payload.
    """
    payload = settings.payload
    head: Head | None = getattr(forward, "head", None)
    words: int | None = None
    encoder: Encoder
    with torch.inference_mode():
        if payload.named:
            source = _source(forward, head, settings, device)
            words = head.weight.shape[0] if head else source.shape[-1]
            width = source.shape[-1] if head else None
            outputs = payload_outputs(payload, words, width, dtype_name(source.dtype, "the teacher's output"))
            encoder = LanguageModel(payload, words, head)
        elif payload.vocab is not None:
            raise PlanError(
                f"payload.vocab is {payload.vocab}, and no payload is named that it could cut; set payload.logits={{}}."
            )
        else:
            outputs = _probe(forward, device, settings.teacher.outputs or getattr(forward, "outputs", {}))
            encoder = Verbatim(outputs)
        whole = [spec.name for spec in outputs if not spec.per_token]
        if payload.stream and whole:
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
            words=words and (payload.vocab or words),
            temperatures=payload.topk.temperatures if payload.topk else (),
            head=shared_head.spec_of(head) if head and payload.hidden is not None else None,
            tokenizer=getattr(forward, "tokenizer", None),
            probe=startup.parity_probe(forward, encoder, outputs, settings, device) if settings.parity else None,
        )
    return offer, encoder


def _source(forward: Forward, head: Head | None, settings: Config, device: torch.device) -> torch.Tensor:
    """What the payloads are made of, of a small batch: hidden states, or logits of a model without a `head`. Raises PlanError."""
    if head is None and settings.payload.hidden is not None:
        why = getattr(forward, "no_head", "") or "it has no attribute `head`"
        raise PlanError(f"payload.hidden cannot be had from this teacher: {why}. Use payload.topk or payload.logits.")
    returned = _run(forward, device, *_SHAPES[0])
    source = returned.get("hidden" if head else "logits")
    if source is None or source.ndim != 3:
        raise PlanError(
            f"the payload is {', '.join(settings.payload.named)}, which is made of logits (batch, seq, vocab), or of hidden "
            f"states and the attribute `head`; the teacher returned {sorted(returned)}."
        )
    return source


def _probe(forward: Forward, device: torch.device, declared: Mapping[str, OutputConfig]) -> tuple[OutputSpec, ...]:
    """What `forward` returns: as declared, or as two small batches of different shapes show it.

    An axis follows the sequence if it is axis 1 and equals the length in both batches.

    Raises:
        PlanError: an output is no tensor, lacks the batch axis, has a dtype or shape that cannot travel, or differs from
            its declaration.
    """
    returned = [_run(forward, device, *shape) for shape in _SHAPES]
    if declared:
        specs = tuple(OutputSpec(name, output.dtype, output.shape) for name, output in declared.items())
    else:
        specs = tuple(_infer(name, [outputs.get(name) for outputs in returned]) for name in returned[0])
    if not 0 < len(specs) <= MAX_OUTPUTS:
        raise PlanError(f"the teacher returned {len(specs)} outputs; a reply carries 1 to {MAX_OUTPUTS}.")
    for outputs, (batch, seq) in zip(returned, _SHAPES, strict=True):
        check_outputs(specs, outputs, batch, seq)
    return specs


def _run(forward: Forward, device: torch.device, batch: int, seq: int) -> Tensors:
    outputs = forward(Batch(torch.zeros(batch, seq, dtype=torch.int64, device=device), None))
    if not isinstance(outputs, Mapping):
        raise PlanError(
            f"the teacher's forward returned a {type(outputs).__name__}; expected a dict of names to tensors with a "
            'leading batch axis, such as {"logits": logits}.'
        )
    return outputs


def _infer(name: str, tensors: list[torch.Tensor | None]) -> OutputSpec:
    for tensor, (batch, _) in zip(tensors, _SHAPES, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or tensor.shape[0] != batch:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise PlanError(
                f"output {name!r} is {found} for {batch} rows; expected a tensor with a leading batch axis."
            )
    first, second = tensors
    assert first is not None and second is not None
    dtype = dtype_name(first.dtype, f"output {name!r}")
    per_token = first.ndim > 1 and (first.shape[1], second.shape[1]) == (_SHAPES[0][1], _SHAPES[1][1])
    rest = tuple(first.shape[1 + per_token :])
    if rest != tuple(second.shape[1 + per_token :]):
        raise PlanError(
            f"output {name!r} has the shapes {tuple(first.shape)} and {tuple(second.shape)} for batches of {_SHAPES[0]} and "
            f"{_SHAPES[1]}; only axis 0 may follow the batch and only axis 1 the sequence."
        )
    return OutputSpec(name, dtype, ("seq", *rest) if per_token else rest)
