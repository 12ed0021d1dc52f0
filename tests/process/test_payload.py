"""What a reply carries, from a HuggingFace model over the bridge: payloads, positions, packed documents, splits."""

from __future__ import annotations

import mmap
import re
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
from shmbridge.errors import ConfigError, PlanError, RequestRefused, TeacherError
from shmbridge.head import Head
from shmbridge.losses import candidate_reverse_kl, targets_from_labels, top_candidates
from shmbridge.rank.bridge import Bridge
from shmbridge.rank.reply import Reply
from shmbridge.teacher import discovery, huggingface, payload
from shmbridge.teacher.batch import Batch
from shmbridge.teacher.huggingface import HuggingFaceTeacher
from tests.harness import Bench, bench
from tests.process.test_bridge import ids

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


Saved = Callable[..., str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
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


# Formulas


@pytest.mark.every_plane
def test_every_payload_in_one_reply_tells_the_models_own_distribution(saved):
    path, sent = saved(), ids(2, 9)
    logits = logits_of(path, sent)
    exact = torch.log_softmax(logits.double(), -1)
    targets, candidates = ids(2, 9, seed=1), ids(18, 3, seed=2).reshape(2, 9, 3)
    targets[0, 3] = targets[1, 8] = -100
    with serving(path, *EVERYTHING) as it, it.bridge() as bridge:
        reply = bridge.exchange(sent)
        assert torch.equal(reply.logits, logits)
        assert torch.equal(bridge.head(reply.hidden), logits)
        close(reply["topk_logprobs"].double(), exact.topk(8).values)
        assert torch.equal(reply["topk_ids"].long(), exact.topk(8).indices)
        for i, temperature in enumerate((1.0, 2.0)):
            scaled = exact / temperature
            rest = scaled.scatter(-1, reply["topk_ids"].long(), -torch.inf)
            close(reply["tail_logmass"][..., i].double(), rest.logsumexp(-1) - scaled.logsumexp(-1))
        close(reply["logprobs"][:, :-1].double(), exact[:, :-1].gather(-1, sent[:, 1:, None])[..., 0])
        assert reply["logprobs"][:, -1].tolist() == [0, 0], "the last token has no next one"
        close(reply["entropy"].double(), -(exact.exp() * exact).sum(-1))
        assert "candidate_logprobs" not in reply, "nobody asked"
        asked = bridge.exchange(sent, targets=targets, candidates=candidates)
        there = targets != -100
        close(asked["logprobs"][there].double(), exact[there].gather(-1, targets[there][:, None])[:, 0])
        assert (asked["logprobs"][~there] == 0).all()
        close(asked["candidate_logprobs"].double(), exact.gather(-1, candidates))


def test_candidate_reverse_kl_takes_a_reply_as_it_is(saved):
    """Row i of the candidates and the token drawn after it are of the same distribution, in the request and the reply."""
    path, sent = saved(), ids(2, 9)
    student = torch.randn(2, 9, WORDS, generator=torch.Generator().manual_seed(4))
    candidates, sampled = top_candidates(student, 3), targets_from_labels(sent)
    with serving(path, "payload.logprobs={candidates: 3}") as it, it.bridge() as bridge:
        reply = bridge.exchange(sent, candidates=candidates)
        loss = candidate_reverse_kl(
            student,
            candidates,
            reply["candidate_logprobs"],
            sampled=sampled,
            sampled_logprobs=reply["logprobs"],
            num_items=1,
        )
    log_q, log_p = student.double().log_softmax(-1), logits_of(path, sent).double().log_softmax(-1)
    u, rest = log_q - log_p, torch.ones(2, 9, WORDS).scatter(-1, candidates, 0)
    mass = (log_q.exp() * rest).sum(-1)
    baseline = (mass / (log_p.exp() * rest).sum(-1)).log()
    rows = (log_q.exp() * u * (1 - rest)).sum(-1) + mass * baseline
    words = sent[:, 1:, None].long()
    of_sampled = (u - baseline[..., None])[:, :-1].gather(-1, words) * rest[:, :-1].gather(-1, words)
    close(loss.double(), rows.sum() + of_sampled.sum())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_travel_in_the_dtype_that_was_asked_for(saved, dtype):
    with serving(saved(), f"payload.logits.dtype={dtype}") as it, it.bridge() as bridge:
        assert torch.equal(bridge.exchange(ids(2, 9)).logits, logits_of(saved(), ids(2, 9)).to(getattr(torch, dtype)))


def test_a_bfloat16_teacher_sends_the_bits_of_its_hidden_state(saved):
    path = saved("Llama", torch.bfloat16)
    with torch.inference_mode():
        wanted = local(path).model(input_ids=ids(2, 9)).last_hidden_state
    with serving(path, "payload.hidden={}", "payload.topk={}") as it, it.bridge() as bridge:
        assert [spec.item_bytes for spec in bridge.teacher.outputs if spec.name == "hidden"] == [2 * 32]
        reply = bridge.exchange(ids(2, 9))
        assert reply.hidden.dtype == bridge.head.weight.dtype == torch.bfloat16
        assert torch.equal(reply.hidden, wanted)
        assert torch.equal(bridge.head(reply.hidden), logits_of(path, ids(2, 9)))


def test_no_hidden_state_is_squeezed_through_another_dtype():
    """Values that float16 cannot hold."""

    class Wide:
        head = Head(torch.eye(4, dtype=torch.bfloat16))

        def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
            row = torch.tensor([3e38, 1e-38, -65536.0, 1.0], dtype=torch.bfloat16)
            return {"hidden": row.expand(*batch.input_ids.shape, 4)}

    with bench(1, "payload.hidden={}") as it:
        it.teacher(Wide())
        with it.bridge() as bridge:
            hidden = bridge.exchange(ids(1, 2)).hidden
            assert torch.equal(hidden, Wide()(Batch(ids(1, 2), None))["hidden"])


@pytest.mark.parametrize("chosen", [False, True])
def test_words_beyond_payload_vocab_are_in_no_payload(saved, chosen):
    path, cut = saved(), 700
    sent, candidates = ids(2, 9) % cut, ids(18, 3, seed=2).reshape(2, 9, 3) % cut
    positions = ids(2, 9, seed=3) % 2 == 0 if chosen else torch.ones(2, 9, dtype=torch.bool)
    logits = logits_of(path, sent)[..., :cut]
    exact = torch.log_softmax(logits.double(), -1)[positions]
    given: dict[str, Any] = {"candidates": candidates, **({"positions": positions} if chosen else {})}
    with serving(path, *EVERYTHING, f"payload.vocab={cut}") as it, it.bridge() as bridge:
        assert bridge.teacher.words == bridge.teacher.head.words == cut
        reply = bridge.exchange(sent, **given)
        flat = {name: reply[name].reshape(len(exact), *reply[name].shape[1 if chosen else 2 :]) for name in reply.names}
        close(flat["logits"], logits[positions])
        close(bridge.head(flat["hidden"]), logits[positions])
        close(flat["topk_logprobs"].double(), exact.topk(8).values)
        rest = exact.scatter(-1, flat["topk_ids"].long(), -torch.inf)
        close(flat["tail_logmass"][:, 0].double(), rest.logsumexp(-1))
        close(flat["entropy"].double(), -(exact.exp() * exact).sum(-1))
        close(flat["candidate_logprobs"].double(), exact.gather(-1, candidates[positions]))
        sent[0, 4] = cut
        with pytest.raises(RequestRefused, match=r"input_ids\[0, 4\] is 700; the teacher's distribution has 700 words"):
            bridge.submit(sent)


def test_a_vocab_smaller_than_the_probe_is_probed_too(saved):
    with serving(saved(), *EVERYTHING, "payload.vocab=20", "parity=true") as it, it.bridge() as bridge:
        assert bridge.exchange(ids(1, 4) % 20).logits.shape == (1, 4, 20)


# The shared head


@pytest.mark.parametrize("family", [*SHAPES])
def test_the_shared_head_of_every_family_gives_the_models_logits(saved, family):
    path = saved(family)
    own = logits_of(path, ids(2, 9))
    with serving(path, "payload.hidden={}", "payload.topk.k=4", "parity=true") as it, it.bridge() as bridge:
        head, reply = bridge.head, bridge.exchange(ids(2, 9))
        close(head(reply.hidden), own)
        close(reply["topk_logprobs"], torch.log_softmax(own, -1).topk(4).values)
        assert (head.bias is not None) is (family == "Phi")
        assert (head.softcap, head.scale) == {
            "Gemma2": (0.05, 1.0),
            "Cohere": (None, 0.25),
            "Granite": (None, 0.125),
        }.get(family, (None, 1.0))
        if family != "Llama":  # what is asserted above would be missed if it were forgotten
            plain = Head(head.weight)(reply.hidden)
            assert torch.allclose(plain, own, atol=1e-4) is (family in ("Qwen2", "GPT2"))


def test_the_head_is_refused_where_it_is_not_shared(saved):
    with (
        serving(saved()) as it,
        it.bridge() as bridge,
        pytest.raises(RequestRefused, match=r"set payload\.hidden=\{\}"),
    ):
        bridge.head  # noqa: B018


class Capped(nn.Linear):
    """A head with something in between that no config tells of."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 0.1 * torch.tanh(super().forward(hidden) * 10)


def capped() -> Any:
    model = build("Llama")
    head = Capped(32, WORDS, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def two_layers() -> Any:
    model = build("Llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, WORDS))
    return model


def without_an_embedding_layer() -> Any:
    """Its output head is no module that transformers knows of."""
    model = build("Llama")
    model.get_output_embeddings = lambda: None
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (capped, r"head\(hidden\) is off from the model's own logits by \d.*: it does something in between"),
        (two_layers, "its output head is Sequential, no matrix of floats"),
        (without_an_embedding_layer, "its output head is NoneType, no matrix of floats"),
    ],
)
def test_a_model_whose_head_is_more_than_a_matrix_serves_its_own_logits_only(saved, monkeypatch, make, why):
    model, sent, positions = make().eval(), ids(2, 9), ids(2, 9, seed=1) % 2 == 0
    monkeypatch.setattr(huggingface, "_load", lambda *_: model)
    with torch.inference_mode():
        own = model(input_ids=sent).logits
    loaded = load(saved(), "payload.hidden={}")
    with pytest.raises(PlanError, match=rf"payload\.hidden cannot be had from this teacher: {why}"):
        discovery.make(loaded, config.load(overrides=[f"teacher.model={saved()}", "payload.hidden={}"]), CPU)
    payload = ["payload.logits.dtype=float32", "payload.topk.k=4"]
    with serving(saved(), *payload, "parity=true") as it, it.bridge() as bridge:
        whole = bridge.exchange(sent)
        assert torch.equal(whole.logits, own)
        close(whole["topk_logprobs"], torch.log_softmax(own, -1).topk(4).values)
        assert torch.equal(bridge.exchange(sent, positions=positions).logits, own[positions])


# Positions


class Counted(Head):
    """Counts the rows that reach it, in memory that a forked teacher shares."""

    rows = memoryview(mmap.mmap(-1, 8)).cast("q")

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows[0] += hidden.shape[:-1].numel()
        return super().__call__(hidden)


def counting(loaded: HuggingFaceTeacher) -> HuggingFaceTeacher:
    assert loaded.head
    loaded.head = Counted(loaded.head.weight)
    Counted.rows[0] = 0
    return loaded


@pytest.mark.parametrize("overrides", [[], ["teacher.max_batch_tokens=20"]], ids=["one forward", "split by rows"])
def test_chosen_positions_are_those_rows_of_the_full_reply_and_the_only_ones_the_head_computes(saved, overrides):
    sent, asked = ids(5, 9), ids(45, 3, seed=4).reshape(5, 9, 3)
    targets = ids(5, 9, seed=5)
    masks = {
        "some": ids(5, 9, seed=6) % 3 == 0,
        "one row": torch.zeros(5, 9, dtype=torch.bool).index_fill_(0, torch.tensor([3]), True),
        "one": torch.zeros(5, 9, dtype=torch.int64).index_put_((torch.tensor(4), torch.tensor(8)), torch.tensor(1)),
        "none": torch.zeros(5, 9, dtype=torch.bool),
        "all": torch.ones(5, 9, dtype=torch.bool),
    }
    with serving(saved(), *EVERYTHING, *overrides, wrap=counting) as it, it.bridge() as bridge:
        full = bridge.exchange(sent, targets=targets, candidates=asked)
        assert Counted.rows[0] == 45
        for name, positions in masks.items():
            Counted.rows[0] = 0
            reply = bridge.exchange(sent, positions=positions, targets=targets, candidates=asked)
            count = int(positions.sum())
            assert Counted.rows[0] == count, name
            assert reply.names == full.names
            for output in reply.names:
                assert reply[output].shape == (count, *full[output].shape[2:])
                if output != "topk_ids":
                    close(reply[output], full[output][positions.bool()])
        with bridge.submit(sent).wait() as again:
            assert again.logits.shape == (5, 9, WORDS), "the next request is not cut"


def test_the_default_targets_of_chosen_positions_are_their_next_tokens(saved):
    sent, positions = ids(3, 9), ids(3, 9, seed=1) % 2 == 0
    exact = torch.log_softmax(logits_of(saved(), sent), -1)
    wanted = torch.zeros(3, 9)
    wanted[:, :-1] = exact[:, :-1].gather(-1, sent[:, 1:, None])[..., 0]
    with serving(saved(), "payload.logprobs={}") as it, it.bridge() as bridge:
        close(bridge.exchange(sent, positions=positions)["logprobs"], wanted[positions])


@pytest.mark.parametrize("choosing", [(True, True), (True, False)], ids=["both choose", "one chooses"])
def test_positions_of_two_ranks_in_one_padded_forward_with_a_mask(saved, choosing):
    path = saved()

    def body(bridge: Bridge) -> None:
        lane = bridge.rank
        sent = ids(2 + lane, 9 + 4 * lane, seed=lane)
        mask = torch.ones_like(sent)
        mask[0, : 3 * lane] = 0  # rank 1's first row is padded on the left
        own = logits_of(path, sent, attention_mask=mask)
        positions = (ids(*sent.shape, seed=7 + lane) % 2 == 0) & (mask == 1)
        given = {"positions": positions} if choosing[lane] else {}
        with bridge.submit(sent, mask, **given).wait() as reply:
            at = reply.composition
            assert (at.rows, at.padded_seq, at.row) == (5, 13, 2 * lane)
            assert at.tokens == 2 * 9 + 3 * 13 - 3, "the rank's own padding is padding"
            if choosing[lane]:
                close(reply.logits, own[positions], 1e-4)
            else:
                close(reply.logits[mask == 1], own[mask == 1], 1e-4)

    options = ["teacher.collect=lockstep", "teacher.max_padding=0.5", "payload.logits.dtype=float32"]
    with serving(path, *options, lanes=2) as it:
        join(it, body, 2)


def test_a_rank_that_asks_for_nothing_holds_nobody_up(saved):
    path = saved()

    def body(bridge: Bridge) -> None:
        for step in range(3):
            sent = ids(2, 5, seed=step)
            positions = torch.full((2, 5), bridge.rank == 1)
            reply = bridge.exchange(sent, positions=positions)
            assert reply.logits.shape == (10 * bridge.rank, WORDS)
            if bridge.rank:
                close(reply.logits, logits_of(path, sent).flatten(0, 1), 1e-4)

    with serving(path, "teacher.collect=lockstep", "payload.logits.dtype=float32", lanes=2) as it:
        join(it, body, 2)


def test_memory_for_fewer_positions_than_tokens(saved):
    positions = torch.zeros(2, 9, dtype=torch.bool)
    positions[1, :6] = True
    own = logits_of(saved(), ids(2, 9))
    with serving(saved(), "ring.max_positions=6", *EVERYTHING, "parity=true") as it, it.bridge() as bridge:
        close(bridge.exchange(ids(2, 9), positions=positions).logits, own[positions])
        positions[0, 0] = True
        for given in ({"positions": positions}, {}):
            with pytest.raises(RequestRefused, match=r"a reply holds 6\. Raise ring\.max_positions"):
                bridge.submit(ids(2, 9), **given)
        with bridge.submit(ids(1, 6)).wait() as reply:
            assert reply.logits.shape == (1, 6, WORDS)


def test_a_large_reply_is_made_some_positions_at_a_time(saved, monkeypatch):
    monkeypatch.setattr(payload, "_HEAD_BYTES", 4 * WORDS * 4)
    path, sent = saved(), ids(3, 9)
    with serving(path, "payload.topk={k: 8}", "payload.hidden={}", wrap=counting) as it, it.bridge() as bridge:
        reply = bridge.exchange(sent)
        close(reply["topk_logprobs"], torch.log_softmax(logits_of(path, sent), -1).topk(8).values)
        close(bridge.head(reply.hidden), logits_of(path, sent))
        assert Counted.rows[0] == 27


# Packed documents


def packed(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """IDs and position_ids (1, sum of lengths)."""
    return ids(1, sum(lengths), seed), torch.cat([torch.arange(length) for length in lengths])[None]


def documents_alone(path: str, sent: torch.Tensor, *lengths: int) -> torch.Tensor:
    """(1, tokens, words): what each document gets in a forward of its own."""
    return torch.cat([logits_of(path, part) for part in sent.split(lengths, 1)], 1)


def in_one_row(loaded: HuggingFaceTeacher) -> HuggingFaceTeacher:
    """As FlashAttention wants it; the model's own attention finds the documents too."""
    loaded._wants_one_row = True
    return loaded


ONE_ROW = pytest.mark.parametrize("wrap", [lambda loaded: loaded, in_one_row], ids=["rows", "one row"])


@ONE_ROW
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(saved, attention, wrap):
    path = saved()
    first, places = packed(5, 3, 4)
    second, more = packed(2, 9, 1, seed=1)
    sent, position_ids = torch.cat([first, second]), torch.cat([places, more])
    alone = torch.cat([documents_alone(path, first, 5, 3, 4), documents_alone(path, second, 2, 9, 1)])
    options = [f"teacher.attn_implementation={attention}", *EVERYTHING]
    with serving(path, *options, wrap=wrap) as it, it.bridge() as bridge:
        close(bridge.exchange(sent, position_ids=position_ids).logits, alone)
        chosen = ids(2, 12, seed=2) % 2 == 0
        close(bridge.exchange(sent, position_ids=position_ids, positions=chosen).logits, alone[chosen])
        assert not torch.allclose(bridge.exchange(sent).logits, alone, atol=1e-3), "without them it is one document"


@ONE_ROW
def test_packed_and_plain_requests_have_forwards_of_their_own_and_packed_ones_are_padded_together(saved, wrap):
    path = saved()
    lengths = {0: (5, 3, 4), 1: (2, 7), 2: ()}

    def body(bridge: Bridge) -> None:
        lane = bridge.rank
        if lengths[lane]:
            sent, position_ids = packed(*lengths[lane], seed=lane)
            with bridge.submit(sent, position_ids=position_ids).wait() as reply:
                close(reply.logits, documents_alone(path, sent, *lengths[lane]))
                assert reply.composition[1:5] == (lane, 2, 12, 21), "both packed ranks, padded"
        else:
            with bridge.submit(ids(2, 9)).wait() as reply:
                close(reply.logits, logits_of(path, ids(2, 9)))
                assert reply.composition[1:5] == (0, 2, 9, 18), "the plain rank alone"

    options = ["teacher.collect=lockstep", "teacher.max_padding=0.5", "payload.logits.dtype=float32"]
    with serving(path, *options, lanes=3, wrap=wrap) as it:
        join(it, body, 3)


def test_position_ids_beside_a_mask_reach_the_model(saved):
    """A batch padded on the left, as the usual cumsum(mask) - 1 numbers it; the other rank sends neither."""
    path = saved("GPT2")  # its positions are absolute
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)

    def body(bridge: Bridge) -> None:
        sent = ids(2, 7, seed=bridge.rank)
        if bridge.rank:
            close(bridge.exchange(sent).logits, logits_of(path, sent), 1e-4)
        else:
            found = bridge.exchange(sent, mask, position_ids=position_ids).logits
            close(found[:1, 3:], logits_of(path, sent[:1, 3:]), 1e-4)
            close(found[1:], logits_of(path, sent[1:]), 1e-4)

    with serving(path, "teacher.collect=lockstep", "payload.logits.dtype=float32", lanes=2) as it:
        join(it, body, 2)


class Leaky(HuggingFaceTeacher):
    """Reads position_ids and lets documents see each other, as a model with another kind of attention does."""

    def __call__(self, batch: Batch) -> Any:
        return super().__call__(batch._replace(attention_mask=torch.ones_like(batch.input_ids)))


def test_a_teacher_that_cannot_pack_refuses_packed_documents(saved):
    sent, position_ids = packed(5, 3)
    with bench(1, f"teacher.model={saved()}") as it:
        leaky = Leaky(it.settings, CPU, lambda *_: None)
        it.teacher(leaky)
        with it.bridge() as bridge:
            with pytest.raises(
                RequestRefused, match="lets packed documents see each other. Send each document as a row"
            ):
                bridge.submit(sent, position_ids=position_ids)
            bridge.exchange(sent, position_ids=torch.arange(8)[None])


# Splitting


def test_a_small_max_batch_tokens_gives_the_same_answers(saved):
    path = saved()

    def body(bridge: Bridge) -> None:
        lane = bridge.rank
        for step in range(2):
            sent = ids(3 + lane, 6 + 5 * lane, seed=10 * step + lane)
            with bridge.submit(sent).wait() as reply:
                close(reply.logits, logits_of(path, sent), 1e-4)
                at = reply.composition
                assert at.rows * at.padded_seq <= 25
                assert at.padded_fraction <= 0.25

    options = ["teacher.collect=lockstep", "teacher.max_batch_tokens=25", "payload.logits.dtype=float32"]
    with serving(path, *options, lanes=3) as it:
        join(it, body, 3)


@pytest.mark.parametrize(("padding", "together"), [(0.2, False), (0.9, True)])
def test_lengths_that_differ_meet_only_within_max_padding(saved, padding, together):
    """3 x 4 and 2 x 16 tokens: 36 of 80 would be padding. The third rank's 1 x 5 meets the first's."""
    path = saved()
    shapes = [(3, 4), (2, 16), (1, 5)]

    def body(bridge: Bridge) -> None:
        lane = bridge.rank
        sent = ids(*shapes[lane], seed=lane)
        with bridge.submit(sent).wait() as reply:
            close(reply.logits, logits_of(path, sent), 1e-4)
            at = reply.composition
            if together:
                assert (at.rows, at.padded_seq, at.tokens) == (6, 16, 12 + 32 + 5)
                assert at.padded_fraction == pytest.approx(1 - 49 / 96)
            elif lane == 1:
                assert (at.rows, at.padded_seq, at.padded_fraction) == (2, 16, 0)
            else:
                assert (at.rows, at.padded_seq, at.tokens) == (4, 5, 17)
                assert at.padded_fraction == pytest.approx(0.15)

    options = ["teacher.collect=lockstep", f"teacher.max_padding={padding}", "payload.logits.dtype=float32"]
    with serving(path, *options, lanes=3) as it:
        join(it, body, 3)


class Cramped(HuggingFaceTeacher):
    def __call__(self, batch: Batch) -> Any:
        if len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return super().__call__(batch)


@pytest.mark.parametrize("pack", [False, True])
def test_out_of_memory_halves_a_forward_of_which_positions_are_wanted(saved, pack):
    path = saved()
    position_ids = torch.cat([torch.arange(4), torch.arange(5)]).expand(5, 9) if pack else None

    def body(bridge: Bridge) -> None:
        for step in range(2):
            sent = ids(5, 9, seed=10 * step + bridge.rank)
            own = documents_alone(path, sent, 4, 5) if pack else logits_of(path, sent)
            positions = ids(5, 9, seed=step) % 2 == 0
            reply = bridge.exchange(sent, positions=positions, position_ids=position_ids)
            close(reply.logits, own[positions], 1e-4)
            exact = torch.log_softmax(own, -1)[:, :-1].gather(-1, sent[:, 1:, None])[..., 0]
            close(reply["logprobs"], torch.cat([exact, torch.zeros(5, 1)], 1)[positions], 1e-4)

    options = [
        f"teacher.model={path}",
        "teacher.collect=lockstep",
        "payload.logits.dtype=float32",
        "payload.logprobs={}",
    ]
    with bench(2, *options) as it:
        it.teacher(Cramped(it.settings, CPU, lambda *_: None))
        join(it, body, 2)


# How the model runs


@pytest.mark.slow
@pytest.mark.one_plane
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
    with serving(path, "teacher.compile=true", "payload.logits.dtype=float32") as it, it.bridge() as bridge:
        for shape in ((2, 9), (1, 5)):
            close(bridge.exchange(ids(*shape)).logits, logits_of(path, ids(*shape)), 1e-4)
    (module,) = compiled
    assert type(module).__name__ == "LlamaModel", "the trunk; the head is ours"
    torch.compiler.reset()


# Refused at the earliest point


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["payload.topk.k=1001"], r"payload\.topk\.k is 1001; the teacher's distribution has 1000 words"),
        (["payload.vocab=1001"], r"payload\.vocab is 1001; the teacher's distribution has 1000 words"),
    ],
)
def test_a_payload_beyond_the_models_words_is_refused_at_the_offer(saved, overrides, message):
    overrides = [*overrides, *(["payload.logits={}"] if "vocab" in overrides[0] else [])]
    with pytest.raises(PlanError, match=message):
        discovery.make(load(saved(), *overrides), config.load(overrides=[f"teacher.model={saved()}", *overrides]), CPU)


def test_k_above_a_cut_vocabulary_is_refused_by_the_config():
    with pytest.raises(ConfigError, match=r"`topk\.k` is 64, above the 50 words of `vocab`"):
        config.load(overrides=["payload.topk={}", "payload.vocab=50"])


@pytest.mark.parametrize(
    ("forward", "overrides", "message"),
    [
        (
            lambda batch: {"value": batch.input_ids.float()},
            ["payload.topk={}", "payload.logprobs={}"],
            r"the payload is topk, logprobs, which is made of logits .*; the teacher returned \['value'\]",
        ),
        (lambda batch: {"logits": batch.input_ids.float()}, ["payload.topk={}"], r"the teacher returned \['logits'\]"),
        (lambda batch: torch.zeros(1), ["payload.logits={}"], "returned a Tensor; expected a dict"),
        (
            lambda batch: {"logits": torch.zeros(*batch.input_ids.shape, 9)},
            ["payload.hidden={}"],
            r"payload\.hidden cannot be had from this teacher: it has no attribute `head`",
        ),
        (
            lambda batch: {"x": batch.input_ids, "pooled": torch.zeros(len(batch.input_ids), 3)},
            ["payload.stream={}"],
            "output 'pooled' has no sequence axis and cannot be streamed; leave payload.stream out",
        ),
    ],
)
def test_a_payload_that_a_teacher_of_ones_own_cannot_give_is_refused_at_the_offer(forward, overrides, message):
    with pytest.raises(PlanError, match=message):
        discovery.make(forward, config.load(overrides=["teacher.model=m:own", *overrides]), CPU)


def test_a_forward_that_changes_its_mind_is_told_to_its_rank():
    """The offer says logits; later batches bring none."""

    class Moody:
        def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
            name = "logits" if batch.input_ids.shape[1] < 7 else "x"
            return {name: torch.zeros(*batch.input_ids.shape, 9)}

    with bench(1, "payload.topk.k=2") as it:
        it.teacher(Moody())
        with it.bridge() as bridge:
            with pytest.raises(TeacherError) as caught:
                bridge.exchange(ids(1, 7))
            assert "the teacher returned ['x']; expected 'logits' of shape (1, 7, ...)" in caught.value.remote_traceback
            assert bridge.exchange(ids(1, 6))["topk_ids"].shape == (1, 6, 2)


@pytest.mark.parametrize(
    ("tensors", "asked", "told"),
    [
        ({}, "hidden", "the bridge is off or the teacher is lost; look at reply.missing first"),
        (
            {"hidden": torch.zeros(1)},
            "logits",
            "it has hidden; with payload.hidden={} read LazyLogits(reply.hidden, bridge.head)",
        ),
        ({"logits": torch.zeros(1)}, "hidden", "it has logits; set payload.hidden={}"),
    ],
)
def test_a_tensor_that_the_reply_lacks_is_told_with_the_remedy(tensors, asked, told):
    with pytest.raises(KeyError, match=re.escape(told)):
        getattr(Reply(tensors, 0, None, None), asked)
