"""What may travel beside the token IDs: every refusal names what was found, what was expected and what to do."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from shmbridge import config
from shmbridge.errors import RequestRefused
from shmbridge.output_spec import Extent, Offer, OutputSpec
from shmbridge.rank import request
from shmbridge.rank.request import check_request
from shmbridge.shm.session import Shape
from tests.late_gpu import LateGpu

LOGPROBS = OutputSpec("logprobs", "float32", ("seq",))
TEACHER = Offer(outputs=(LOGPROBS,), model="tiny", vocab_size=100, max_seq=16, words=90)
SILENT = msgspec.structs.replace(TEACHER, outputs=(OutputSpec("logits", "float32", ("seq", 90)),))
LEAKY = msgspec.structs.replace(TEACHER, packs=False)
IDS = np.arange(12).reshape(2, 6)


def shape(*overrides: str) -> Shape:
    return Shape.of(config.load(overrides=["teacher.model=m:own", "ring.max_tokens=64", *overrides]), 1)


SHAPE = shape("payload.logprobs.candidates=3")


def check(agreed: Offer = TEACHER, limits: Shape = SHAPE, ids: Any = IDS, mask: Any = None, **extras: Any):
    asked = check_request(ids, mask, extras, agreed, limits)
    return asked.extent, asked.arrays


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_ids_of_any_strides_travel_as_they_are(kind):
    ids = np.arange(24, dtype=kind).reshape(2, 6, 2)[:, :, 1]
    for given in (ids, torch.from_numpy(ids)):
        asked = check_request(given, None, {}, TEACHER, SHAPE)
        assert (asked.extent, asked.arrays, asked.step) == (Extent(2, 6), {}, None)
        assert np.frombuffer(asked.ids, kind).tolist() == ids.flatten().tolist()


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_travel_as_bytes_and_positions_are_counted(kind):
    chosen = torch.tensor([[0, 1, 0, 0, 1, 1], [0] * 6]).to(kind)
    extent, arrays = check(positions=chosen, mask=chosen)
    assert extent == Extent(2, 6, 3)
    assert extent.positions == 3
    for name in ("positions", "mask"):
        assert bytes(arrays[name]) == bytes(chosen.to(torch.uint8).flatten().tolist())
    assert check(positions=torch.zeros(2, 6, dtype=kind))[0].positions == 0


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_words_and_places_travel_as_int32(kind):
    places = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]], dtype=kind)
    targets = torch.tensor([[1, 2, 3, 4, 5, -100]] * 2, dtype=kind)
    candidates = torch.arange(72, dtype=kind).reshape(2, 6, 6)[..., ::2]
    extent, arrays = check(position_ids=places, targets=targets, candidates=candidates)
    assert extent == Extent(2, 6)
    for name, tensor in (("position_ids", places), ("targets", targets), ("candidates", candidates)):
        assert np.frombuffer(arrays[name], np.int32).tolist() == tensor.flatten().tolist(), name


def test_arrays_on_a_gpu_are_read_once_they_are_on_the_host_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(request, "_gpu_copy_told", False)
    gpu = LateGpu(monkeypatch)
    given = {
        "ids": torch.from_numpy(IDS),
        "mask": torch.tensor([[1, 1, 1, 1, 0, 0]] * 2),
        "positions": torch.tensor([[0, 1, 0, 0, 1, 1], [0] * 6]).bool(),
        "position_ids": torch.arange(6).expand(2, 6),
        "targets": torch.tensor([[1, 2, 3, 4, 5, -100]] * 2),
        "candidates": torch.arange(36, dtype=torch.int32).reshape(2, 6, 3),
    }
    assert check(**{name: gpu.tensor(tensor) for name, tensor in given.items()}) == check(**given)
    assert gpu.syncs == len(given)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    for told in ("input_ids is on cuda:0", "waits until the GPU has computed", "before .to(device)", "Told once"):
        assert told in caplog.text
    with pytest.raises(RequestRefused, match=r"input_ids\[1, 5\] is 100; the teacher 'tiny' takes 0 to 99"):
        check(ids=gpu.tensor(torch.where(given["ids"] == 11, 100, given["ids"])))


STARTS_AGAIN = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
ONES = torch.ones(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positions": torch.ones(2, 5)}, "positions has shape (2, 5); expected that of input_ids, (2, 6)"),
        ({"positions": torch.ones(12)}, "positions has shape (12,)"),
        ({"positions": ONES * 2}, "positions holds values other than 0 and 1"),
        ({"positions": ONES.float() / 2}, "positions holds values other than 0 and 1"),
        ({"positions": ONES.bfloat16()}, "positions is a tensor of torch.bfloat16"),
        (
            {"positions": ONES.bool().to("meta")},
            "positions is on meta; expected a tensor on the CPU, or on a CUDA device",
        ),
        ({"positions": [0, 3]}, "positions is a list; expected a torch.Tensor or a NumPy array"),
        ({"mask": torch.ones(2, 7)}, "attention_mask has shape (2, 7)"),
        ({"position_ids": ONES.float()}, "position_ids has dtype float32; expected int32 or int64"),
        ({"position_ids": ONES.bool()}, "position_ids has dtype bool"),
        ({"position_ids": torch.arange(6)}, "position_ids has shape (6,); expected (2, 6)"),
        ({"position_ids": torch.arange(6).expand(2, 6) + 11}, "position_ids[0, 5] is 16; expected 0 to 15"),
        ({"position_ids": torch.arange(6).expand(2, 6) - 1}, "position_ids[0, 0] is -1; expected 0 to 15"),
        ({"position_ids": STARTS_AGAIN, "mask": ONES}, "leave attention_mask out"),
        ({"position_ids": STARTS_AGAIN, "agreed": LEAKY}, "Send each document as a row of its own"),
        ({"targets": ONES, "agreed": SILENT}, "need the payload logprobs; set payload.logprobs={}"),
        ({"candidates": ONES[..., None], "agreed": SILENT}, "need the payload logprobs"),
        ({"targets": ONES.float()}, "targets has dtype float32; expected int32 or int64"),
        ({"targets": ONES[:, 1:]}, "targets has shape (2, 5); expected (2, 6)"),
        ({"targets": ONES * 90}, "targets[0, 0] is 90; expected 0 to 89, or -100 where there is none"),
        ({"targets": ONES * -1}, "targets[0, 0] is -1; expected 0 to 89, or -100"),
        ({"candidates": ONES}, "candidates has shape (2, 6); expected (2, 6, 3)"),
        ({"candidates": ONES[..., None].expand(2, 6, 4)}, "candidates has shape (2, 6, 4); expected (2, 6, 3)"),
        ({"candidates": ONES[..., None].expand(2, 6, 3) * 90}, "candidates[0, 0, 0] is 90; expected 0 to 89."),
        ({"candidates": ONES[..., None].expand(2, 6, 3) * -100}, "candidates[0, 0, 0] is -100; expected 0 to 89."),
        (
            {"candidates": ONES[..., None], "limits": shape("payload.logprobs={}")},
            "candidates were not planned for; set payload.logprobs.candidates",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(given, message):
    with pytest.raises(RequestRefused, match=re.escape(message)):
        check(**given)


def test_a_reply_larger_than_its_memory_is_refused_with_the_three_ways_out():
    small = shape("ring.max_positions=5")
    six = torch.tensor([[1] * 6, [0] * 6])
    for given in ({}, {"positions": six}):
        with pytest.raises(
            RequestRefused, match=r"a reply holds 5\. Raise ring\.max_positions .*`positions`.*payload\.stream"
        ):
            check(limits=small, **given)
    five = six.clone()
    five[0, 0] = 0
    assert check(limits=small, positions=five)[0].positions == 5
    streamed = shape("ring.max_positions=5", "payload.logits={}", "payload.stream={}")
    assert check(limits=streamed)[0].positions == 12, "a streamed reply needs no memory of its size"


@pytest.mark.parametrize(
    ("places", "mask"),
    [
        ([1, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]),  # padded on the left, as cumsum(mask) - 1 with 1 in the padding
        ([0, 1, 2, 3, 1, 1], [1, 1, 1, 1, 0, 0]),
        ([0, 0, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]),
    ],
)
def test_position_ids_in_the_padding_are_no_documents(places, mask):
    for agreed in (TEACHER, LEAKY):
        _, arrays = check(agreed, position_ids=torch.tensor([places] * 2), mask=torch.tensor([mask] * 2))
        assert set(arrays) == {"mask", "position_ids"}


@pytest.mark.parametrize("places", [[3, 4, 5, 6, 7, 8], [0, 1, 2, 5, 6, 7]])
def test_a_document_begins_at_0(places):
    """FlashAttention finds the documents of a row by their zeros, so another beginning would join two of them."""
    with pytest.raises(RequestRefused, match=r"position_ids\[0, \d\] is \d where a document begins; expected 0"):
        check(position_ids=torch.tensor([places] * 2))


def test_a_next_token_that_the_teacher_has_no_word_for_is_refused():
    """Beyond payload.vocab an ID may be submitted, but it has no log-probability."""
    ids = np.array([[95, 1, 2], [1, 2, 89]])
    assert check(ids=ids)[0] == Extent(2, 3), "the first token of a row is nobody's next"
    with pytest.raises(
        RequestRefused, match=re.escape("input_ids[0, 2] is 95; the teacher's distribution has 90 words")
    ):
        check(ids=np.array([[1, 2, 95], [1, 2, 3]]))
    assert check(SILENT, ids=np.array([[1, 2, 95]]))[0] == Extent(1, 3), "without logprobs it is nobody's target"
    check(ids=np.array([[1, 2, 95]]), targets=np.array([[2, -100, -100]]))


def test_a_misspelt_argument_is_refused_by_its_name():
    with pytest.raises(RequestRefused, match="no argument 'possitions'; did you mean 'positions'"):
        check(possitions=IDS)
