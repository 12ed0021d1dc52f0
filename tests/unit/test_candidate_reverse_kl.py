"""Reverse KL from candidates and a sampled token: its mean over every token that could be drawn is exact."""

from __future__ import annotations

import math

import pytest
import torch

from shmbridge.losses import Head, LazyLogits, candidate_reverse_kl, reverse_kl, top_candidates
from tests.unit.test_losses import draw, lazy, leaf, plain_reverse, projected, whole

VOCAB = 7


def distributions(rows=3, spread=1.0):
    """Logits of the student, log-probabilities of the teacher."""
    student = draw(rows, VOCAB, dtype=torch.float64, spread=spread)
    return student, draw(rows, VOCAB, dtype=torch.float64, seed=1, spread=spread).log_softmax(-1)


def call(student, teacher, ids, sampled=None, **options):
    """The loss of what a teacher whose log-probabilities are `teacher` replies."""
    of_sampled = None if sampled is None else teacher.gather(-1, sampled.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return candidate_reverse_kl(
        student, ids, teacher.gather(-1, ids), sampled=sampled, sampled_logprobs=of_sampled, **options
    )


def draws(student, teacher, ids):
    """(probability, value, gradient) of one row, for each token that its student may draw."""
    for word, probability in enumerate(student.softmax(-1)[0].tolist()):
        mine = leaf(student)
        loss = call(mine, teacher, ids, torch.tensor([word]))
        loss.backward()
        yield probability, loss.item(), mine.grad


def exact(student, teacher):
    mine = leaf(student)
    loss = plain_reverse(mine, teacher, 1.0).sum()
    loss.backward()
    return loss.item(), mine.grad


@pytest.mark.parametrize("chosen", ["top", "any"])
@pytest.mark.parametrize("c", [1, 3, 6])
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_value_and_gradient_are_unbiased(chosen, c, spread):
    """At a spread of 12 most of the mass is on one word, and what a rest holds goes down to 1e-9."""
    for student, teacher in zip(*(x.split(1) for x in distributions(spread=spread)), strict=True):
        ids = top_candidates(student, c) if chosen == "top" else torch.randperm(VOCAB)[None, :c]
        found = list(draws(student, teacher, ids))
        value, gradient = exact(student, teacher)
        assert sum(p * loss for p, loss, _ in found) == pytest.approx(value, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(sum(p * g for p, _, g in found), gradient, rtol=1e-12, atol=1e-12)


def test_no_variance_where_the_rests_have_the_same_proportions():
    """Every token drawn gives the exact value and gradient, though both distributions differ on the candidates."""
    student, teacher = (x[:1] for x in distributions())
    ids = torch.tensor([[1, 4]])
    rest = teacher.scatter(-1, ids, -math.inf)
    student = torch.where(rest > -math.inf, rest + 0.8, student)
    value, gradient = exact(student, teacher)
    for _, loss, of_loss in draws(student, teacher, ids):
        assert loss == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(of_loss, gradient, rtol=1e-12, atol=1e-14)


def test_without_a_sampled_token_the_rest_is_one_bucket():
    """Below reverse KL by q_R KL(q given the rest || p given the rest); the gradient is this value's own."""
    student, teacher = distributions()
    ids = top_candidates(student, 3)
    found, expected = leaf(student), leaf(student)
    loss = call(found, teacher, ids, num_items=1)
    loss.backward()
    q, p = (x.log_softmax(-1).scatter(-1, ids, -math.inf) for x in (expected, teacher))
    mass = q.exp().sum(-1)
    q, p = (x.log_softmax(-1).masked_fill(x == -math.inf, 0) for x in (q, p))
    within = mass * torch.where(q < 0, q.exp() * (q - p), 0).sum(-1)
    reference = (plain_reverse(expected, teacher, 1.0) - within).sum()
    reference.backward()
    torch.testing.assert_close(loss.detach(), reference.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-14)


def test_every_word_a_candidate_is_reverse_kl():
    student, teacher = distributions()
    found, expected = leaf(student), leaf(student)
    loss = call(found, teacher, torch.arange(VOCAB).flip(0).expand(3, -1), torch.tensor([0, 3, 6]))
    reference = reverse_kl(expected, teacher)
    (loss.backward(), reference.backward())
    torch.testing.assert_close((loss, found.grad), (reference, expected.grad), rtol=1e-12, atol=1e-14)


def test_a_row_without_a_sampled_token_has_the_candidates_alone():
    student, teacher = distributions()
    ids = top_candidates(student, 2)
    sampled = ids.new_tensor([int(student[0].argmin()), -100, -100])
    mixed = call(student, teacher, ids, sampled, num_items=1)
    alone = call(student[1:], teacher[1:], ids[1:], num_items=1)
    torch.testing.assert_close(mixed, alone + call(student[:1], teacher[:1], ids[:1], sampled[:1]))


@pytest.mark.parametrize("form", ["logits", "inplace", "lazy"])
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_chunks_masks_and_heads(form, chunk_rows):
    """Against the sum of each row by itself. Rows that do not count may hold anything."""
    *tensors, softcap, scale = projected(torch.float64)
    teacher, mask = draw(3, 7, 19, seed=5, dtype=torch.float64).log_softmax(-1), draw(3, 7, seed=6) > 0
    sampled = torch.randint(19, (3, 7), generator=torch.Generator().manual_seed(9))
    ids = top_candidates(whole(*tensors, softcap, scale), 4)
    expected, found = ([leaf(tensor) for tensor in tensors] for _ in range(2))
    rows = whole(*expected, softcap, scale)[mask].split(1)
    parts = [x[mask].split(1) for x in (teacher, ids, sampled)]
    reference = sum(call(*row) for row in zip(rows, *parts, strict=True)) / 5
    reference.backward()
    outside = ~mask.unsqueeze(-1)
    loss = candidate_reverse_kl(
        lazy(*found, softcap, scale) if form == "lazy" else whole(*found, softcap, scale) * 1.0,
        ids.masked_fill(outside, -7).int(),
        teacher.gather(-1, ids).masked_fill(outside, math.nan),
        sampled=sampled,
        sampled_logprobs=teacher.gather(-1, sampled.unsqueeze(-1)).squeeze(-1).masked_fill(~mask, math.nan),
        mask=mask,
        num_items=5,
        inplace=form == "inplace",
        chunk_rows=chunk_rows,
    )
    loss.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
    for ours, plainly in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.grad, plainly.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_float32_and_half_precision(dtype, spread):
    """As in float64, but for rounding; also where a rest holds less than float32 can tell from nothing."""
    student, teacher = draw(40, 50, dtype=dtype, spread=spread), draw(40, 50, seed=1, spread=spread).log_softmax(-1)
    ids = top_candidates(student, 5)
    sampled = student.float().softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    found, expected = leaf(student), leaf(student.double())
    loss, reference = call(found, teacher, ids, sampled), call(expected, teacher.double(), ids, sampled)
    (loss.backward(), reference.backward())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-4, atol=1e-5)
    error = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
    assert error < max(1e-4, torch.finfo(dtype).eps)


@pytest.mark.parametrize("lead", [(6,), (2, 3)])
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_top_candidates_are_the_most_likely_words(lead, chunk_rows):
    hidden, weight = draw(*lead, 4), draw(9, 4, seed=1)
    logits = hidden @ weight.T
    expected = logits.topk(3).indices
    for student in (leaf(logits), LazyLogits(leaf(hidden), Head(weight))):
        assert torch.equal(top_candidates(student, 3, chunk_rows=chunk_rows), expected)


def test_without_rows_that_count_it_is_a_zero_with_a_gradient():
    student, teacher = leaf(draw(2, 9)), draw(2, 9, seed=1).log_softmax(-1)
    loss = call(student, teacher, torch.arange(3).expand(2, -1), mask=torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def refused(ids=((0, 1), (2, 3)), logprobs=None, **options):
    ids = torch.tensor(ids)
    return candidate_reverse_kl(draw(2, 9), ids, draw(*ids.shape) if logprobs is None else logprobs, **options)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: refused(((0, 1), (3, 3))), "a row has a candidate twice; .*top_candidates"),
        (lambda: refused(((0, 9), (2, 3))), "candidates run from 0 to 9; expected 0 to 8"),
        (lambda: refused(((0, -1), (2, 3))), "candidates run from -1 to 3"),
        (lambda: refused(((0, 1),)), r"candidates have the leading axes \(1,\); expected \(2,\)"),
        (lambda: refused(logprobs=draw(2, 3)), r"candidates are \(2, 2\) and candidate_logprobs \(2, 3\)"),
        (lambda: refused([[*range(9), 0]] * 2), "a row has 10 candidates; expected 1 to 9"),
        (lambda: refused(((0.0, 1.0), (2.0, 3.0))), "candidates are torch.float32"),
        (lambda: refused(sampled=torch.tensor([1, 2])), "sampled is given and sampled_logprobs is None"),
        (lambda: refused(sampled_logprobs=draw(2)), "sampled_logprobs is given and sampled is None"),
        (lambda: refused(sampled=torch.tensor([1, 2]), sampled_logprobs=draw(2, 1)), r"sampled_logprobs are \(2, 1\)"),
        (lambda: refused(sampled=torch.tensor([1, 9]), sampled_logprobs=draw(2)), "sampled tokens run from 1 to 9"),
        (lambda: refused(mask=torch.ones(3)), r"mask is \(3,\)"),
        (lambda: top_candidates(draw(2, 9), 10), "c is 10; expected 1 to 9"),
    ],
)  # fmt: skip
def test_refused_with_what_was_found(call, told):
    with pytest.raises(ValueError, match=told):
        call()
