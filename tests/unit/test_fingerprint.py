"""The numbers that the parity check compares: what they must notice, and what they must not."""

from __future__ import annotations

import re

import pytest
import torch

from shmbridge import fingerprint
from shmbridge.output_spec import OutputSpec

LOGITS = OutputSpec("logits", "float32", ("seq", 100))


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(seed)) * 4


def compare(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.002, spec: OutputSpec = LOGITS):
    return fingerprint.differ(fingerprint.of(spec, found), fingerprint.of(spec, expected), tolerance)


def test_one_number_for_each_position_and_the_count_of_what_is_not_finite():
    found = fingerprint.of(LOGITS, logits())
    assert len(found) == 2 * 6 + 1
    assert len(set(found)) == len(found), "positions are told apart"
    assert found[-1] == 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 0.002), (torch.bfloat16, 0.05), (torch.float16, 0.05)]
)
def test_rounding_passes(dtype, tolerance):
    noise = 1 + 1e-5 * torch.randn(2, 6, 100)
    assert compare((logits() * noise).to(dtype), logits(), tolerance) is None


def no_word(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[:, :, 98:] = -torch.inf
    return tensor


def swapped_words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., [1, 0, *range(2, 100)]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x.roll(1, 1), r"shifted by one position: row i holds what row i-1 should"),
        (lambda x: x.roll(-1, 1), r"shifted by one position: row i holds what row i\+1 should"),
        (lambda x: x / 2, r"0\.5 times what the model gives: a temperature or a scale is applied twice"),
        (lambda x: x * 3, r"3 times what the model gives"),
        (no_word, "24 entries that are not finite, instead of 0"),
        (lambda x: torch.log_softmax(x, -1), r"off by \d"),
        (swapped_words, r"off by \d"),
        (lambda x: x.roll(1, 0), r"off by \d"),
        (lambda x: x[:, :5], "10 positions instead of 12"),
    ],
)
def test_what_went_wrong_is_named(wrong, message):
    found = compare(wrong(logits()), logits())
    assert re.search(message, found or ""), found


def test_where_the_model_gives_zeros_the_difference_is_told_too():
    assert compare(torch.zeros(2, 6, 100), torch.zeros(2, 6, 100)) is None
    assert "off by" in (compare(logits(), torch.zeros(2, 6, 100)) or "")
    assert "off by" in (compare(torch.zeros(2, 6, 100), logits()) or "")


def test_the_same_words_that_are_not_finite_pass():
    assert compare(no_word(logits()), no_word(logits())) is None


def test_integers_are_told_by_their_first_and_never_compared_closely():
    spec = OutputSpec("topk_ids", "int32", ("seq", 3))
    ids = torch.arange(12, dtype=torch.int32).reshape(1, 4, 3)
    assert fingerprint.of(spec, ids) == (0.0, 3.0, 6.0, 9.0, 0.0)


def test_an_output_without_a_sequence_axis_has_one_number_for_each_row():
    spec = OutputSpec("value", "float32", ())
    assert len(fingerprint.of(spec, torch.tensor([1.0, 2.0, 3.0]))) == 3 + 1


class Table:
    def __init__(self, *tokens: str, shift: int = 0) -> None:
        self.tokens = tokens
        self.shift = shift

    def get_vocab(self) -> dict[str, int]:
        return {token: i + self.shift for i, token in enumerate(self.tokens)}


def test_tokenizers_are_told_apart_by_their_tables():
    first = fingerprint.of_tokenizer(Table("a", "b", "c"))
    assert first == fingerprint.of_tokenizer(Table("a", "b", "c"))
    assert first.entries == 3
    others = [
        Table("a", "c", "b"),
        Table("a", "b"),
        Table("a", "b", "d"),
        Table("a", "b", "c", shift=1),
        Table("ab", "c"),
    ]
    assert len({first.digest, *(fingerprint.of_tokenizer(other).digest for other in others)}) == 1 + len(others)
    assert fingerprint.of_tokenizer(Table("a", "b", "c", shift=1)).entries == 4, "IDs that no token has are words too"
    assert fingerprint.of_tokenizer(Table()).entries == 0
    assert fingerprint.of_tokenizer(Table("\ud800")).entries == 1, "a byte-level table may hold lone surrogates"
