"""The HuggingFace teacher in one process: how it loads, what it returns, and whether its head is taken."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from shmbridge import config
from shmbridge.config import TeacherConfig
from shmbridge.errors import ConfigError, PlanError
from shmbridge.teacher import huggingface, output_discovery
from shmbridge.teacher.batch import Batch
from tests import gguf_file
from tests.harness import Child
from tests.models import CPU, LLAMA, SHAPES, WORDS, build, close, documents_alone, load, logits_of, saved  # noqa: F401
from tests.process.test_bridge import ids


@torch.inference_mode()
def logits(teacher: huggingface.HuggingFaceTeacher, batch: Batch) -> torch.Tensor:
    returned = teacher(batch)
    return teacher.head(returned["hidden"]) if teacher.head else returned["logits"]


@pytest.mark.parametrize(
    ("attention", "overrides", "options"),
    [
        ("sdpa", [], {}),
        (
            "eager",
            ["teacher.dtype=bfloat16", "teacher.attn_implementation=eager"],
            {"dtype": torch.bfloat16, "attn_implementation": "eager"},
        ),
    ],
)
def test_a_local_model_answers_as_it_does_alone(saved, attention, overrides, options):  # noqa: F811
    loaded = load(saved(), *overrides)
    reference = AutoModelForCausalLM.from_pretrained(saved(), **options).eval()
    assert loaded.model.config._attn_implementation == attention
    assert (loaded.vocab_size, loaded.max_seq, loaded.path) == (WORDS, 128, saved())
    with torch.inference_mode():
        assert torch.equal(logits(loaded, Batch(ids(2, 9), None)), reference(input_ids=ids(2, 9)).logits)


@pytest.mark.slow
def test_a_compiled_teacher_answers_the_same(tmp_path, monkeypatch):
    compiled: list[nn.Module] = []
    real = torch.compile

    def without_a_compiler(module: nn.Module) -> Any:  # the graph is captured, and run as it is
        compiled.append(module)
        return real(module, backend="eager")

    monkeypatch.setattr(torch, "compile", without_a_compiler)
    monkeypatch.setitem(SHAPES, "Llama", {**LLAMA, "num_hidden_layers": 1})
    path = str(tmp_path)
    build("Llama").save_pretrained(path)
    load(path)
    assert not compiled, "teacher.compile is off"
    loaded = load(path, "teacher.compile=true")
    for shape in ((2, 9), (1, 5)):
        close(logits(loaded, Batch(ids(*shape), None)), logits_of(path, ids(*shape)), 1e-4)
    (module,) = compiled
    assert type(module).__name__ == "LlamaModel", "the trunk; the head is ours"
    torch.compiler.reset()


@pytest.mark.parametrize("one_row", [False, True], ids=["rows", "one row, as FlashAttention wants it"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(saved, attention, one_row):  # noqa: F811
    loaded = load(saved(), f"teacher.attn_implementation={attention}")
    loaded._wants_one_row = one_row
    sent = ids(2, 12)
    places = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((5, 3, 4), (2, 9, 1))])
    alone = torch.cat([documents_alone(saved(), sent[:1], 5, 3, 4), documents_alone(saved(), sent[1:], 2, 9, 1)])
    close(logits(loaded, Batch(sent, None, places)), alone)
    assert not torch.allclose(logits(loaded, Batch(sent, None)), alone, atol=1e-3), "without them it is one document"


def test_position_ids_beside_a_mask_reach_the_model(saved):  # noqa: F811
    """A row that is padded on the left, as the usual cumsum(mask) - 1 numbers it."""
    path, sent = saved("GPT2"), ids(2, 7)  # its positions are absolute
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    found = logits(load(path), Batch(sent, mask, (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)))
    close(found[:1, 3:], logits_of(path, sent[:1, 3:]), 1e-4)
    close(found[1:], logits_of(path, sent[1:]), 1e-4)


# Heads


class Capped(nn.Linear):
    """A head with something in between that no config tells of."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 0.1 * torch.tanh(super().forward(hidden) * 10)


def capped(model: Any) -> None:
    weight = model.lm_head.weight
    model.lm_head = Capped(32, WORDS, bias=False)
    model.lm_head.weight = weight


def two_layers(model: Any) -> None:
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, WORDS))


def without_an_embedding_layer(model: Any) -> None:
    """Its output head is no module that transformers knows of."""
    model.get_output_embeddings = lambda: None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (capped, r"head\(hidden\) is off from the model's own logits by \d.*: it does something in between"),
        (two_layers, "its output head is Sequential, no matrix of floats"),
        (without_an_embedding_layer, "its output head is NoneType, no matrix of floats"),
    ],
)
def test_a_model_whose_head_is_more_than_a_matrix_serves_its_own_logits_only(saved, monkeypatch, change, why):  # noqa: F811
    model = build("Llama")
    change(model)
    monkeypatch.setattr(huggingface, "_load", lambda *_: model)
    loaded = load(saved())
    with torch.inference_mode():
        assert torch.equal(logits(loaded, Batch(ids(2, 9), None)), model(input_ids=ids(2, 9)).logits)
    settings = [f"teacher.model={saved()}", "parity=true"]
    offer, _ = output_discovery.make(
        loaded, config.load(overrides=[*settings, "payload={logits: {}, topk: {k: 4}}"]), CPU
    )
    assert [spec.name for spec in offer.outputs] == ["logits", "topk_logprobs", "topk_ids", "tail_logmass"]
    with pytest.raises(PlanError, match=rf"payload\.hidden cannot be had from this teacher: {why}"):
        output_discovery.make(loaded, config.load(overrides=[*settings, "payload.hidden={}"]), CPU)


# Files


def test_a_gguf_file_is_converted_once_and_tells_its_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    gguf_file.write(file)
    progress = []
    settings = config.load(overrides=[f"teacher.model={file}"])
    first = huggingface.HuggingFaceTeacher(settings, CPU, lambda done, total: progress.append((done, total)))
    if hasattr(transformers.utils.logging, "set_tqdm_hook"):  # not in transformers 4
        assert progress[-1][0] == progress[-1][1] > 0
    assert first.vocab_size == gguf_file.VOCAB
    text = "def f(x): return x"
    tokenizer = AutoTokenizer.from_pretrained(first.path)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    monkeypatch.setattr(huggingface, "_write_conversion", lambda *_: pytest.fail("converted again"))
    batch = Batch(ids(1, 7) % gguf_file.VOCAB, None)
    assert torch.equal(logits(load(str(file)), batch), logits(first, batch))


def test_a_conversion_that_was_killed_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    gguf_file.write(file)

    def convert_and_die():
        """The weights are saved, the tokenizer is not."""
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        huggingface.local_copy(TeacherConfig(model=str(file)))

    assert Child(convert_and_die).join() == -signal.SIGKILL
    path = Path(huggingface.local_copy(TeacherConfig(model=str(file))))
    assert load(str(file)).tokenizer is not None
    assert {each.name for each in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


def test_a_missing_local_model_is_named():
    with pytest.raises(ConfigError, match="there is no file or directory /"):
        load("./nowhere")
