"""What a reply carries, from a HuggingFace model over the bridge: payloads, positions, packed documents, splits."""

from __future__ import annotations

import mmap
import re
from typing import Any

import pytest
import torch

from shmbridge.errors import RequestRefused
from shmbridge.head import Head
from shmbridge.rank.bridge import Bridge
from shmbridge.rank.reply import Reply
from shmbridge.teacher import payload
from shmbridge.teacher.batch import Batch
from shmbridge.teacher.huggingface import HuggingFaceTeacher
from tests.models import (  # noqa: F401
    EVERYTHING,
    SHAPES,
    WORDS,
    close,
    documents_alone,
    join,
    local,
    logits_of,
    saved,
    serving,
)
from tests.process.test_bridge import ids

LOCKSTEP = ["teacher.collect=lockstep", "payload.logits.dtype=float32"]


@pytest.mark.every_plane
def test_every_payload_in_one_reply_tells_the_models_own_distribution(saved):  # noqa: F811
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_travel_in_the_dtype_that_was_asked_for(saved, dtype):  # noqa: F811
    with serving(saved(), f"payload.logits.dtype={dtype}") as it, it.bridge() as bridge:
        assert torch.equal(bridge.exchange(ids(2, 9)).logits, logits_of(saved(), ids(2, 9)).to(getattr(torch, dtype)))


def test_a_bfloat16_teacher_sends_the_bits_of_its_hidden_state(saved):  # noqa: F811
    path = saved("Llama", torch.bfloat16)
    with torch.inference_mode():
        wanted = local(path).model(input_ids=ids(2, 9)).last_hidden_state
    with serving(path, "payload.hidden={}", "payload.topk={}") as it, it.bridge() as bridge:
        reply = bridge.exchange(ids(2, 9))
        assert reply.hidden.dtype == bridge.head.weight.dtype == torch.bfloat16
        assert torch.equal(reply.hidden, wanted)
        assert torch.equal(bridge.head(reply.hidden), logits_of(path, ids(2, 9)))


def test_words_beyond_payload_vocab_are_in_no_payload(saved):  # noqa: F811
    """Of which the parity check is one: its IDs are below the cut too."""
    cut = 20
    sent = ids(2, 9) % cut
    logits = logits_of(saved(), sent)[..., :cut]
    with serving(saved(), *EVERYTHING, f"payload.vocab={cut}", "parity=true") as it, it.bridge() as bridge:
        assert bridge.teacher.words == bridge.teacher.head.words == cut
        reply = bridge.exchange(sent)
        close(reply.logits, logits)
        close(bridge.head(reply.hidden), logits)
        close(reply["topk_logprobs"], torch.log_softmax(logits, -1).topk(8).values)
        sent[0, 4] = cut
        with pytest.raises(RequestRefused, match=r"input_ids\[0, 4\] is 20; the teacher's distribution has 20 words"):
            bridge.submit(sent)


@pytest.mark.parametrize("family", [*SHAPES])
def test_the_shared_head_of_every_family_gives_the_models_logits(saved, family):  # noqa: F811
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


def test_a_tensor_or_a_head_that_is_not_sent_is_told_with_the_remedy(saved):  # noqa: F811
    refused = pytest.raises(RequestRefused, match=r"set payload\.hidden=\{\}")
    with serving(saved()) as it, it.bridge() as bridge, refused:
        bridge.head  # noqa: B018
    for tensors, asked, told in (
        ({}, "hidden", "the bridge is off or the teacher is lost; look at reply.missing first"),
        ({"hidden": 0}, "logits", "it has hidden; with payload.hidden={} read LazyLogits(reply.hidden, bridge.head)"),
        ({"logits": 0}, "hidden", "it has logits; set payload.hidden={}"),
    ):
        with pytest.raises(KeyError, match=re.escape(told)):
            getattr(Reply(tensors, 0, None, None), asked)


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
    return loaded


@pytest.mark.parametrize("overrides", [[], ["teacher.max_batch_tokens=20"]], ids=["one forward", "split by rows"])
def test_chosen_positions_are_those_rows_of_the_full_reply_and_the_only_ones_the_head_computes(
    saved,  # noqa: F811
    overrides,
    monkeypatch,
):
    """The payload is made for four positions at a time."""
    monkeypatch.setattr(payload, "_PART_BYTES", 4 * WORDS * 4)
    sent, asked = ids(5, 9), ids(45, 3, seed=4).reshape(5, 9, 3)
    masks = {
        "some": ids(5, 9, seed=6) % 3 == 0,
        "one row": torch.zeros(5, 9, dtype=torch.bool).index_fill_(0, torch.tensor([3]), True),
        "one": torch.zeros(5, 9, dtype=torch.int64).index_put_((torch.tensor(4), torch.tensor(8)), torch.tensor(1)),
        "none": torch.zeros(5, 9, dtype=torch.bool),
        "all": torch.ones(5, 9, dtype=torch.bool),
    }
    with serving(saved(), *EVERYTHING, *overrides, wrap=counting) as it, it.bridge() as bridge:
        Counted.rows[0] = 0
        full = bridge.exchange(sent, candidates=asked)
        assert Counted.rows[0] == 45
        for name, positions in masks.items():
            Counted.rows[0] = 0
            reply = bridge.exchange(sent, positions=positions, candidates=asked)
            count = int(positions.sum())
            assert Counted.rows[0] == count, name
            assert reply.names == full.names
            for output in reply.names:
                assert reply[output].shape == (count, *full[output].shape[2:])
                if output != "topk_ids":
                    close(reply[output], full[output][positions.bool()])
        with bridge.submit(sent).wait() as again:
            assert again.logits.shape == (5, 9, WORDS), "the next request is not cut"


def test_positions_of_two_ranks_in_one_padded_forward_with_a_mask(saved):  # noqa: F811
    """Rank 0 chooses positions; rank 1's first row is padded on the left."""
    path = saved()

    def body(bridge: Bridge) -> None:
        lane = bridge.rank
        sent = ids(2 + lane, 9 + 4 * lane, seed=lane)
        mask = torch.ones_like(sent)
        mask[0, : 3 * lane] = 0
        own = logits_of(path, sent, attention_mask=mask)
        positions = ids(*sent.shape, seed=7) % 2 == 0
        with bridge.submit(sent, mask, **({} if lane else {"positions": positions})).wait() as reply:
            at = reply.composition
            assert (at.rows, at.padded_seq, at.row) == (5, 13, 2 * lane)
            assert at.tokens == 2 * 9 + 3 * 13 - 3, "the rank's own padding is padding"
            close(reply.logits[mask == 1] if lane else reply.logits, own[mask == 1 if lane else positions], 1e-4)

    with serving(path, *LOCKSTEP, "teacher.max_padding=0.5", lanes=2) as it:
        join(it, body, 2)


def test_memory_for_fewer_positions_than_tokens(saved):  # noqa: F811
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


# Packed documents


def packed(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """IDs and position_ids (1, sum of lengths)."""
    return ids(1, sum(lengths), seed), torch.cat([torch.arange(length) for length in lengths])[None]


def test_packed_and_plain_requests_have_forwards_of_their_own_and_packed_ones_are_padded_together(saved):  # noqa: F811
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

    with serving(path, *LOCKSTEP, "teacher.max_padding=0.5", lanes=3) as it:
        join(it, body, 3)


class Leaky(HuggingFaceTeacher):
    """Reads position_ids and lets documents see each other, as a model with another kind of attention does."""

    def __call__(self, batch: Batch) -> Any:
        return super().__call__(batch._replace(attention_mask=torch.ones_like(batch.input_ids)))


def leaking(loaded: HuggingFaceTeacher) -> HuggingFaceTeacher:
    loaded.__class__ = Leaky
    return loaded


def test_a_teacher_that_cannot_pack_refuses_packed_documents(saved):  # noqa: F811
    sent, position_ids = packed(5, 3)
    with serving(saved(), wrap=leaking) as it, it.bridge() as bridge:
        with pytest.raises(RequestRefused, match="lets packed documents see each other. Send each document as a row"):
            bridge.submit(sent, position_ids=position_ids)
        bridge.exchange(sent, position_ids=torch.arange(8)[None])


# Splitting


def test_a_small_max_batch_tokens_gives_the_same_answers(saved):  # noqa: F811
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

    with serving(path, *LOCKSTEP, "teacher.max_batch_tokens=25", lanes=3) as it:
        join(it, body, 3)


class Cramped(HuggingFaceTeacher):
    def __call__(self, batch: Batch) -> Any:
        if len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return super().__call__(batch)


def cramped(loaded: HuggingFaceTeacher) -> HuggingFaceTeacher:
    loaded.__class__ = Cramped
    return loaded


def test_out_of_memory_halves_a_forward_of_which_positions_are_wanted(saved):  # noqa: F811
    """Of packed documents, too."""
    path = saved()
    position_ids = torch.cat([torch.arange(4), torch.arange(5)]).expand(5, 9)

    def body(bridge: Bridge) -> None:
        for step, pack in enumerate((False, True)):
            sent = ids(5, 9, seed=10 * step + bridge.rank)
            own = documents_alone(path, sent, 4, 5) if pack else logits_of(path, sent)
            positions = ids(5, 9, seed=step) % 2 == 0
            reply = bridge.exchange(sent, positions=positions, position_ids=position_ids if pack else None)
            close(reply.logits, own[positions], 1e-4)
            exact = torch.log_softmax(own, -1)[:, :-1].gather(-1, sent[:, 1:, None])[..., 0]
            close(reply["logprobs"], torch.cat([exact, torch.zeros(5, 1)], 1)[positions], 1e-4)

    with serving(path, *LOCKSTEP, "payload.logprobs={}", lanes=2, wrap=cramped) as it:
        join(it, body, 2)
