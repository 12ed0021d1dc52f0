"""Samples of the student, as batches that the teacher can score."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from shmbridge.integrations.transformers.look_ahead import Batch, Place
from shmbridge.integrations.transformers.student import StudentHead
from shmbridge.losses import LazyLogits, top_candidates

_IGNORED = -100


def is_sampled(seed: int, step: int, share: float) -> bool:
    """Whether an optimizer step belongs to the `share` whose completions are sampled. It is the same in every rank."""
    return random.Random(f"{seed} {step}").random() < share


def sampling_seed(seed: int, rank: int, place: Place) -> int:
    """The seed of a micro-batch's samples. It differs between ranks and is the same in a resumed run."""
    return random.Random(f"{seed} {rank} {place.step} {place.micro_batch}").getrandbits(63)


def sampling_config(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> GenerationConfig:
    """Sampling from the model's whole softmax at `temperature`, up to the end-of-text tokens of its checkpoint or its
    tokenizer."""
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else getattr(tokenizer, "eos_token_id", None)
    pads = (getattr(tokenizer, "pad_token_id", None), own.pad_token_id, *_listed(ends), 0)
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=next(pad for pad in pads if pad is not None),
        use_cache=True,
    )


@torch.no_grad()
def sample(model: Any, batch: Batch, config: GenerationConfig, seed: int) -> dict[str, Tensor]:
    """A completion of each prompt in a batch, drawn from the model.

    The prompt of a row is the part before its first label that counts; a row without such a label is a prompt as a
    whole. A completion ends with its first end-of-text token. The random generators of the process are left as they
    are.

    Args:
        model: the student, not wrapped.
        batch: input_ids (batch, seq) int64, and, if given, attention_mask and labels of that shape.
        config: from `sampling_config`.

    Returns:
        input_ids, attention_mask and labels (batch, longest) int64 on the CPU, padded on the right. Labels are -100 but for
        the completions.

    Raises:
        ValueError: a row has no prompt, or the rows are packed.
    """
    prompts = _prompts(batch)
    device = model.get_input_embeddings().weight.device
    pad, ends = int(config.pad_token_id), set(_listed(config.eos_token_id))
    ids = _padded(prompts, pad, "left").to(device)
    mask = _padded((torch.ones_like(row) for row in prompts), 0, "left").to(device)
    devices = [device] if device.type != "cpu" else []
    with evaluating(model), _generating(model, config), torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed)
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    completions = [_up_to_end(row, ends) for row in found[:, ids.shape[1] :].cpu()]
    rows = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
    labels = (
        torch.cat((torch.full_like(prompt, _IGNORED), completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    )
    return {
        "input_ids": _padded(rows, pad),
        "attention_mask": _padded((torch.ones_like(row) for row in rows), 0),
        "labels": _padded(labels, _IGNORED),
    }


@torch.no_grad()
def choose_candidates(
    model: nn.Module, batch: Batch, c: int, head: StudentHead | None, chunk_rows: int | None
) -> Tensor:
    """The student's c most likely words after each token: (batch, seq, c) int64 on the CPU.

    `head`: of the model; its logits are then computed a few rows at a time. None: they are computed whole.
    """
    device = next(model.parameters()).device
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name].to(device) for name in names if batch.get(name) is not None}
    found: list[Tensor] = []

    def choose(student: Tensor | LazyLogits) -> Tensor:
        found.append(top_candidates(student, c, chunk_rows=chunk_rows))
        return torch.zeros((), device=device)

    with evaluating(model):
        if head is None:
            choose(model(**inputs).logits)
        else:
            with head.replaced_by(choose):
                model(**inputs)
    return found[0].cpu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode in the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """The model's generation_config is `config` in the block, because `generate` reads from it what no argument
    sets."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _prompts(batch: Batch) -> list[Tensor]:
    """The tokens of each prompt, on the CPU."""
    for name in ("position_ids", "shift_labels"):
        if batch.get(name) is not None:
            raise ValueError(
                f"A batch has {name}: its rows are packed, and completions are sampled for padded rows. Set packing=False and "
                "padding_free=False."
            )
    ids = batch["input_ids"].cpu()
    mask, labels = (batch[name].cpu() if batch.get(name) is not None else None for name in ("attention_mask", "labels"))
    attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    counts = torch.zeros_like(attended) if labels is None else labels != _IGNORED
    before = counts.cumsum(1) == 0  # the row's first label that counts is further on
    prompts = [row[chosen] for row, chosen in zip(ids, attended & before, strict=True)]
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(
                f"Row {number} of a batch has no prompt: its first token has a label. Completions are sampled after a prompt, whose "
                f"labels are {_IGNORED}; use a collator that masks the prompts (TRL: completion_only_loss=True)."
            )
    return prompts


def _up_to_end(completion: Tensor, ends: set[int]) -> Tensor:
    """The tokens up to and including the first of `ends`."""
    for number, token in enumerate(completion.tolist()):
        if token in ends:
            return completion[: number + 1]
    return completion


def _padded(rows: Iterable[Tensor], value: int, side: str = "right") -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]
