"""What the teacher will offer, as far as it is known before it has loaded; None if it is not.

A custom teacher without a payload section offers what the config declares. Every other teacher is a language model,
whose payload follows from the sizes on its card.
"""

from __future__ import annotations

from launcher.plan.model_card import ModelCard
from shmbridge.config import Config, is_builder
from shmbridge.errors import PlanError
from shmbridge.output_spec import HeadSpec, OutputSpec, payload_outputs


def outputs(config: Config, card: ModelCard) -> tuple[OutputSpec, ...] | None:
    """The outputs of a reply.

    Raises:
        PlanError: this model cannot give the payload.
    """
    if not config.payload.named:
        return _declared(config) or None
    words = _words(config, card)
    if words is None or (config.payload.hidden is not None and (card.hidden_size is None or card.dtype is None)):
        return None
    return payload_outputs(config.payload, words, card.hidden_size, card.dtype or "float32")


def head(config: Config, card: ModelCard) -> HeadSpec | None:
    """The output head, if the payload is hidden. A bias, which few models have, is not counted."""
    words = _words(config, card)
    if config.payload.hidden is None or words is None or card.hidden_size is None or card.dtype is None:
        return None
    return HeadSpec(card.dtype, config.payload.vocab or words, card.hidden_size)


def _declared(config: Config) -> tuple[OutputSpec, ...]:
    specs = tuple(OutputSpec(name, out.dtype, out.shape) for name, out in config.teacher.outputs.items())
    whole = [spec.name for spec in specs if not spec.per_token]
    if config.payload.stream and whole:
        raise PlanError(f"output {whole[0]!r} has no sequence axis and cannot be streamed; leave payload.stream out.")
    return specs


def _words(config: Config, card: ModelCard) -> int | None:
    """The size of the distribution, or a number for which outputs have the same size."""
    payload = config.payload
    if card.vocab_size is not None and not is_builder(config.teacher.model):
        return card.vocab_size
    if payload.vocab is not None:
        return payload.vocab
    if payload.logits is None and payload.hidden is None:  # then no output is as wide as the distribution
        return payload.topk.k if payload.topk else 1
    return None
