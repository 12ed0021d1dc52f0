"""The payloads' formulas against the plain ones in float64, and which positions the head is applied to."""

from __future__ import annotations

import math

import pytest
import torch

from shmbridge import config
from shmbridge.errors import PlanError
from shmbridge.head import Head
from shmbridge.output_spec import OutputSpec
from shmbridge.teacher import payload as teacher_payload
from shmbridge.teacher.payload import LanguageModel, Selection, Verbatim

WORDS = 50
NO_WORD = -torch.inf
ALL = ["logits={}", "topk={k: 5, temperatures: [1.0, 2.0, 0.25]}", "logprobs={entropy: true, candidates: 3}"]


def settings(*overrides: str) -> config.PayloadConfig:
    return config.load(overrides=["teacher.model=m:own", *(f"payload.{one}" for one in overrides)]).payload


def noise(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def words(*shape: int, below: int = WORDS, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def of(logits: torch.Tensor, *overrides: str, **wanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """The payload of (positions, words) logits, as one row and at once."""
    count = len(logits)
    targets = wanted.pop("targets", torch.zeros(count, dtype=torch.int64))
    encoder = LanguageModel(settings(*overrides), logits.shape[-1], None)
    tensors = encoder.prepare({"logits": logits[None]}, 1, count, True)
    return dict(encoder.encode(Selection(tensors, slice(0, 1), count, 0, targets, **wanted), 0, count))


def tail(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """The log of the mass of all words but `ids`, in float64."""
    scaled = logits.double() / temperature
    rest = scaled.scatter(-1, ids.long(), NO_WORD)
    return rest.logsumexp(-1) - scaled.logsumexp(-1)


@pytest.mark.parametrize("k", [1, 5, WORDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_k_has_the_log_probabilities_of_the_full_softmax_and_the_mass_of_the_rest(k, dtype):
    logits = noise(7, WORDS).to(dtype)
    found = of(logits, f"topk={{k: {k}, temperatures: [1.0, 2.0, 0.25]}}")
    exact = torch.log_softmax(logits.double(), -1)
    assert found["topk_logprobs"].dtype == torch.float32
    assert torch.allclose(found["topk_logprobs"].double(), exact.topk(k).values, rtol=0, atol=1e-5)
    assert torch.equal(logits.gather(-1, found["topk_ids"].long()), logits.topk(k).values), "ties may swap words"
    assert found["topk_ids"].dtype == torch.int32
    for i, temperature in enumerate((1.0, 2.0, 0.25)):
        wanted = tail(logits, found["topk_ids"], temperature)
        assert torch.allclose(found["tail_logmass"][:, i].double(), wanted, rtol=1e-5, atol=1e-5), temperature
    if k == WORDS:
        assert (found["tail_logmass"] == NO_WORD).all()


def test_a_tail_of_1e_12_keeps_its_digits():
    """1 - sum of the top k would be 0 or noise."""
    logits = torch.cat([torch.tensor([30.0, 29.0]), noise(WORDS - 2, scale=0.1)]).expand(3, WORDS).contiguous()
    found = of(logits, "topk={k: 2, temperatures: [1.0, 2.0]}")
    for i, temperature in enumerate((1.0, 2.0)):
        wanted = tail(logits, found["topk_ids"], temperature)
        assert torch.allclose(found["tail_logmass"][:, i].double(), wanted, rtol=1e-6, atol=0)
    assert -29 < found["tail_logmass"][0, 0] < -25, "the tail is not as small as this test means it"
    naive = 1 - found["topk_logprobs"].exp().sum(-1)
    assert not torch.allclose(naive.double(), wanted.exp(), rtol=0.1, atol=0)


def test_words_of_no_probability_are_neither_above_nor_in_the_tail():
    logits = noise(3, WORDS)
    logits[0, 10:] = logits[1, 3:] = NO_WORD
    found = of(logits, "topk={k: 5}", "logprobs={candidates: 1}", candidates=torch.full((3, 1), WORDS - 1))
    exact = torch.log_softmax(logits.double(), -1)
    assert torch.allclose(found["topk_logprobs"].double(), exact.topk(5).values, rtol=0, atol=1e-5)
    wanted = tail(logits, found["topk_ids"], 1.0)
    assert torch.allclose(found["tail_logmass"][:, 0].double(), wanted, rtol=1e-5, atol=1e-6)
    assert found["tail_logmass"][1, 0] == NO_WORD
    assert found["candidate_logprobs"][:2].flatten().tolist() == [NO_WORD] * 2


def test_log_probabilities_of_targets_are_0_where_there_is_none():
    logits, targets = noise(6, WORDS), words(6)
    targets[2] = targets[5] = -100
    found = of(logits, "logprobs={}", targets=targets)["logprobs"]
    exact = torch.log_softmax(logits.double(), -1)
    for position, target in enumerate(targets.tolist()):
        wanted = 0.0 if target == -100 else exact[position, target]
        assert found[position].item() == pytest.approx(float(wanted), abs=1e-6)


def test_the_entropy_counts_words_of_no_probability_as_nothing():
    logits = noise(4, WORDS)
    logits[1, 10:] = NO_WORD
    logits[2, 1:] = NO_WORD
    logits[3] = 0.0
    found = of(logits, "logprobs={entropy: true}")["entropy"]
    p = torch.softmax(logits.double(), -1)
    wanted = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert found[2] == 0
    assert found[3].item() == pytest.approx(math.log(WORDS))


def test_candidates_are_words_of_each_position():
    logits, candidates = noise(6, WORDS), words(6, 3)
    found = of(logits, "logprobs={candidates: 3}", candidates=candidates)["candidate_logprobs"]
    exact = torch.log_softmax(logits.double(), -1)
    assert torch.allclose(found.double(), exact.gather(-1, candidates), rtol=0, atol=1e-5)


def test_words_beyond_vocab_are_in_no_softmax():
    logits, cut = noise(6, WORDS), 40
    logits[:, cut:] = 50.0  # they would take all of the mass
    targets, candidates = words(6, below=cut), words(6, 3, below=cut)
    given = {"targets": targets, "candidates": candidates}
    found, wanted = of(logits, f"vocab={cut}", *ALL, **given), of(logits[:, :cut].contiguous(), *ALL, **given)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    head = Head(torch.eye(WORDS))
    encoder = LanguageModel(settings(f"vocab={cut}", "logits={}"), WORDS, head)
    for whole in (True, False):
        tensors = encoder.prepare({"hidden": logits[None]}, 1, 6, whole)
        assert torch.equal(encoder.encode(Selection(tensors, slice(0, 1), 6, 0), 0, 6)["logits"], logits[:, :cut])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("places", [11, torch.tensor([9, 12, 16, 17, 18, 22]), torch.tensor([], dtype=torch.int64)])
@pytest.mark.parametrize("kept", [False, True])
def test_the_head_gives_what_logits_give_for_the_chosen_positions_alone(whole, places, kept, monkeypatch):
    """A few positions at a time, of the forward or of what is kept of it for a reader."""
    head = Head(noise(WORDS, 8, seed=1, scale=0.3), noise(WORDS, seed=2), softcap=5.0, scale=0.5)
    hidden = noise(4, 9, 8, seed=3)
    count = 14 if isinstance(places, int) else len(places)
    at = torch.arange(11, 25) if isinstance(places, int) else places
    targets, candidates = words(count), words(count, 3)
    monkeypatch.setattr(teacher_payload, "_PART_BYTES", 4 * WORDS * 4)  # four positions at a time
    encoder = LanguageModel(settings(*ALL, "hidden={}"), WORDS, head)
    tensors = encoder.prepare({"hidden": hidden}, 4, 9, whole)
    selection = Selection(tensors, slice(1, 3), count, places, targets, candidates)
    if kept:
        selection = selection.kept()
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in selection.tensors.values())
    pieces = list(teacher_payload.parts(encoder, selection))
    assert [start for start, _ in pieces] == list(range(0, max(1, count), 4))
    if not count:
        assert pieces == [(0, {})]
        return
    found = {name: torch.cat([piece[name] for _, piece in pieces]) for name in pieces[0][1]}
    assert torch.equal(found.pop("hidden"), hidden.flatten(0, 1)[at])
    expected = of(head(hidden).flatten(0, 1)[at], *ALL, targets=targets, candidates=candidates)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-5), name


def test_a_hidden_state_stays_as_it_is():
    """bfloat16 reaches further than float16 and is coarser than float32: neither may be on the way."""
    hidden = torch.tensor([[[3e38, 1e-38, 1.0, -65536.0]]], dtype=torch.bfloat16)
    encoder = LanguageModel(settings("hidden={}"), 2, Head(torch.ones(2, 4, dtype=torch.bfloat16)))
    outputs = encoder.encode(Selection(encoder.prepare({"hidden": hidden}, 1, 1, True), slice(0, 1), 1, 0), 0, 1)
    assert torch.equal(outputs["hidden"].view(torch.int16), hidden[0].view(torch.int16))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"loss": torch.zeros(1)}, r"returned \['loss'\]; expected 'logits' of shape \(2, 3, ...\)"),
        ({"logits": torch.zeros(2, 4, 9)}, r"returned \(2, 4, 9\); expected 'logits'"),
        ({"logits": torch.zeros(2, 3)}, r"returned \(2, 3\); expected 'logits'"),
    ],
)
def test_a_forward_that_breaks_its_word_is_told(returned, message):
    with pytest.raises(PlanError, match=message):
        LanguageModel(settings("logits={}"), 9, None).prepare(returned, 2, 3, True)


def test_outputs_of_ones_own_are_cut_to_the_request():
    outputs = (OutputSpec("x", "float32", ("seq", 2)), OutputSpec("pooled", "float32", (3,)))
    returned = {"x": noise(4, 9, 2), "pooled": noise(4, 3)}
    encoder = Verbatim(outputs)
    selection = Selection(encoder.prepare(returned, 4, 9, True), slice(1, 3), 3, torch.tensor([11, 18, 24]))
    ((start, found),) = teacher_payload.parts(encoder, selection)
    assert start == 0
    assert torch.equal(found["x"], torch.stack([returned["x"][1, 2], returned["x"][2, 0], returned["x"][2, 6]]))
    assert torch.equal(found["pooled"], returned["pooled"][1:3])
    assert torch.equal(encoder.encode(selection, 1, 3)["x"], found["x"][1:3])


def test_outputs_of_a_custom_teacher_are_taken_a_few_positions_at_a_time(monkeypatch):
    monkeypatch.setattr(teacher_payload, "_PART_BYTES", 2 * 8)  # two positions at a time
    outputs = (OutputSpec("x", "float32", ("seq", 2)), OutputSpec("pooled", "float32", (3,)))
    returned = {"x": noise(2, 4, 2), "pooled": noise(2, 3)}
    encoder = Verbatim(outputs)
    selection = Selection(encoder.prepare(returned, 2, 4, True), slice(1, 2), 3, torch.tensor([4, 5, 6]))
    first, second = teacher_payload.parts(encoder, selection)
    assert (first[0], second[0]) == (0, 2)
    assert torch.equal(torch.cat([first[1]["x"], second[1]["x"]]), returned["x"][1, :3])
    assert torch.equal(first[1]["pooled"], returned["pooled"][1:])
    assert "pooled" not in second[1], "an output of rows is written once"
