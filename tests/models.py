"""Tiny models of the transformers library, and a teacher process with one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from shmbridge import config
from shmbridge.rank.bridge import Bridge
from shmbridge.teacher.huggingface import HuggingFaceTeacher
from tests.harness import Bench, bench

CPU = torch.device("cpu")
WORDS = 1000
EVERYTHING = [
    "payload.logits.dtype=float32",
    "payload.topk={k: 8, temperatures: [1.0, 2.0]}",
    "payload.logprobs={entropy: true, candidates: 3}",
    "payload.hidden={}",
]
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Qwen2": {**LLAMA, "tie_word_embeddings": True},
    "Gemma2": {**LLAMA, "head_dim": 16, "final_logit_softcapping": 0.05},
    "Cohere": {**LLAMA, "logit_scale": 0.25},
    "Granite": {**LLAMA, "logits_scaling": 8.0},
    "Phi": {**LLAMA, "hidden_size": 64},  # its head has a bias
    "GPT2": {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
}


def build(name: str, seed: int = 0) -> Any:
    """A tiny random model. `pad_token_id` is not taken from a family's own vocabulary."""
    torch.manual_seed(seed)
    shape = getattr(transformers, f"{name}Config")(**SHAPES[name], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(shape)
    for key, parameter in model.named_parameters():
        if key == "lm_head.bias":
            nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., str]:
    """The directory of a tiny model, by the name of its family."""

    @cache
    def directory(name: str = "Llama", dtype: torch.dtype = torch.float32) -> str:
        path = tmp_path_factory.mktemp(name)
        build(name).to(dtype).save_pretrained(path)
        return str(path)

    return directory


@cache
def local(path: str) -> Any:
    """The model in the test's own process."""
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@torch.inference_mode()
def logits_of(path: str, input_ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    return local(path)(input_ids=input_ids, use_cache=False, **given).logits


def documents_alone(path: str, sent: torch.Tensor, *lengths: int) -> torch.Tensor:
    """(rows, tokens, words): what each document that is packed into `sent` gets in a forward of its own."""
    return torch.cat([logits_of(path, part) for part in sent.split(lengths, 1)], 1)


def load(path: str, *overrides: str) -> HuggingFaceTeacher:
    return HuggingFaceTeacher(config.load(overrides=[f"teacher.model={path}", *overrides]), CPU, lambda *_: None)


@contextmanager
def serving(
    path: str, *overrides: str, lanes: int = 1, wrap: Callable[[HuggingFaceTeacher], Any] = lambda teacher: teacher
) -> Iterator[Bench]:
    """A teacher process with the model of `path`."""
    with bench(lanes, f"teacher.model={path}", *overrides) as it:
        it.teacher(wrap(HuggingFaceTeacher(it.settings, CPU, lambda *_: None)))
        yield it


def join(it: Bench, body: Callable[[Bridge], Any], lanes: int) -> None:
    children = [it.rank(lane, body) for lane in range(lanes)]
    assert [child.join() for child in children] == [0] * lanes


def close(found: torch.Tensor, wanted: torch.Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=within, atol=within)
