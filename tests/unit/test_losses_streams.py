"""What a loss is divided by, which rows count, a teacher that streams, and what is refused."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from shmbridge.losses import (
    Head,
    LazyLogits,
    TopK,
    count_items,
    forward_kl,
    generalized_jsd,
    mask_from_labels,
    reverse_kl,
    topk_kl,
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def top(teacher, k):
    logprobs = torch.log_softmax(teacher, -1)
    values, ids = logprobs.topk(k)
    return TopK(values, ids.int(), logprobs.scatter(-1, ids, -math.inf).logsumexp(-1))


# Masks and items


def test_labels_aligned_with_input_ids_belong_to_the_row_before():
    labels = torch.tensor([[-100, -100, 7, 8], [5, -100, -100, 9]])
    assert mask_from_labels(labels, shifted=False).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]


def test_labels_already_shifted_belong_to_their_own_row():
    labels = torch.tensor([[-100, 7, 8, -100]])
    assert mask_from_labels(labels, shifted=True).int().tolist() == [[0, 1, 1, 0]]


def test_both_kinds_of_labels_name_the_same_rows():
    ids = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    aligned = ids.masked_fill(draw(3, 8) < 0, -100)
    shifted = torch.cat((aligned[:, 1:], torch.full((3, 1), -100)), 1)
    assert torch.equal(mask_from_labels(aligned, shifted=False), mask_from_labels(shifted, shifted=True))


@pytest.mark.parametrize("labels", [torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool), torch.tensor(3)])
def test_labels_that_are_no_token_ids(labels):
    with pytest.raises(ValueError, match=r"labels are .*expected integer token IDs"):
        mask_from_labels(labels, shifted=False)


def test_items_of_one_process_are_the_rows_that_count():
    masks = [torch.tensor([[1, 0, 1]]), torch.tensor([[True, True, False]])]
    assert count_items(masks).item() == 4
    assert count_items([torch.zeros(2, 3)]).item() == 1
    assert count_items([]).item() == 1


@pytest.mark.parametrize("number", [float, lambda items: items])
def test_micro_steps_of_unequal_items_sum_to_the_mean_over_all(number):
    student, teacher, mask = leaf(draw(4, 5, 9)), draw(4, 5, 9, seed=1), draw(4, 5, seed=2) > 0.5
    whole = forward_kl(student, teacher, mask=mask)
    whole.backward()
    expected, student.grad = student.grad, None
    items = number(count_items(mask.split(1)))
    losses = []
    for i in range(4):
        losses.append(forward_kl(student[i : i + 1], teacher[i : i + 1], mask=mask[i : i + 1], num_items=items))
        losses[-1].backward()
    torch.testing.assert_close(sum(losses), whole)
    torch.testing.assert_close(student.grad, expected)


def test_an_integer_mask_is_as_good_as_a_bool_one():
    student, teacher, mask = draw(4, 9), draw(4, 9, seed=1), torch.tensor([1, 0, 1, 1])
    assert torch.equal(forward_kl(student, teacher, mask=mask), forward_kl(student, teacher, mask=mask.bool()))


# A teacher that streams


def pieces(teacher, *cuts):
    """(slice, rows) as pending.chunks() gives them, each destroyed once the next is asked for."""
    flat = [tensor.flatten(0, 1) for tensor in (teacher if isinstance(teacher, TopK) else [teacher])]
    for start, stop in zip((0, *cuts), (*cuts, len(flat[0])), strict=True):
        rows = [tensor[start:stop].clone() for tensor in flat]
        yield slice(start, stop), TopK(*rows) if isinstance(teacher, TopK) else rows[0]
        for tensor in rows:
            tensor.fill_(3)


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, generalized_jsd, topk_kl])
@pytest.mark.parametrize("form", ["logits", "inplace", "lazy"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_streamed_teacher_gives_what_the_whole_gives(loss, form, masked):
    teacher = top(draw(3, 6, 9), 2) if loss is topk_kl else draw(3, 6, 9)
    mask = draw(3, 6, seed=2) > 0 if masked else None
    results = []
    for given in (teacher, pieces(teacher, 1, 7, 7, 12)):
        hidden, weight = leaf(draw(3, 6, 4, seed=3)), leaf(draw(9, 4, seed=4))
        student = LazyLogits(hidden, Head(weight)) if form == "lazy" else hidden @ weight.T
        value = loss(student, given, mask=mask, inplace=form == "inplace", chunk_rows=4)
        value.backward()
        results.append((value, hidden.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_loss_and_backward_for_each_piece_gives_the_same():
    teacher, mask = draw(3, 6, 9), (draw(3, 6, seed=2) > 0).flatten()
    hidden, weight = leaf(draw(18, 4, seed=3)), leaf(draw(9, 4, seed=4))
    forward_kl(LazyLogits(hidden, Head(weight)), teacher.flatten(0, 1), mask=mask).backward()
    expected = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    items = count_items([mask])
    for rows, piece in pieces(teacher, 5, 12):
        student = LazyLogits(hidden[rows], Head(weight))
        forward_kl(student, piece, mask=mask[rows], num_items=items).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_a_stream_of_hidden_states():
    hidden, head = draw(2, 5, 3, seed=1), Head(draw(9, 3, seed=2))
    student = draw(2, 5, 9)
    stream = ((rows, LazyLogits(piece, head)) for rows, piece in pieces(hidden, 4))
    torch.testing.assert_close(forward_kl(student, stream), forward_kl(student, head(hidden)))


@pytest.mark.parametrize(
    ("spans", "told"),
    [
        ([slice(0, 4), slice(5, 10)], r"slice\(5, 10, None\) after 4 of 10 rows; expected slice\(4"),
        ([slice(0, 4), slice(2, 10)], r"slice\(2, 10, None\) after 4 of 10"),
        ([slice(0, 12)], r"slice\(0, 12, None\) after 0 of 10"),
        ([slice(0, 8)], r"ended after 8 of 10 rows"),
        ([], r"ended after 0 of 10 rows; a stream can be read once only"),
    ],
)
def test_a_stream_gives_every_row_once(spans, told):
    teacher = draw(12, 9)
    with pytest.raises(ValueError, match=told):
        forward_kl(draw(2, 5, 9), ((rows, teacher[rows]) for rows in spans))


def test_the_graph_does_not_hold_the_teacher():
    """A lease may end before backward: everything was read in the forward."""
    student, teacher = leaf(draw(4, 9)), draw(4, 9, seed=1)
    gone = weakref.ref(teacher)
    gc.disable()
    try:
        loss = forward_kl(student, teacher)
        del teacher
        assert gone() is None
    finally:
        gc.enable()
    loss.backward()


# What is refused


def head(vocab=9, dim=4):
    return Head(draw(vocab, dim))


REFUSED = [
    (lambda: forward_kl(draw(2, 9), draw(2, 12)), "teacher has 12 words and the student 9.*payload.vocab to 9"),
    (lambda: forward_kl(draw(2, 12), draw(2, 9)), r"teacher has 9 words and the student 12.*logits\[..., :9\]"),
    (lambda: forward_kl(LazyLogits(draw(2, 4), head()), LazyLogits(draw(2, 4), head(12))), "12 words.*student 9"),
    (lambda: forward_kl(draw(2, 3, 9), draw(3, 2, 9)), r"leading axes \(3, 2\); expected \(2, 3\)"),
    (lambda: forward_kl(draw(9), draw(9)), r"student is \(9,\).*expected float logits"),
    (lambda: forward_kl(torch.ones(2, 9, dtype=torch.int64), draw(2, 9)), "student is .*int64"),
    (lambda: forward_kl(draw(2, 9), torch.ones(2, 9, dtype=torch.int64)), "teacher's logits are torch.int64"),
    (lambda: forward_kl(draw(2, 9), top(draw(2, 9), 2)), "are a TopK; expected logits"),
    (lambda: topk_kl(draw(2, 9), draw(2, 9)), "are a Tensor; expected a TopK"),
    (lambda: forward_kl(draw(2, 9), draw(2, 9), mask=torch.ones(3)), r"mask is \(3,\); expected \(2,\)"),
    (lambda: forward_kl(draw(2, 9), draw(2, 9), mask=torch.ones(2)), "mask is torch.float32; expected bool"),
    (lambda: forward_kl(draw(2, 9), draw(2, 9), temperature=0.0), "temperature is 0.0"),
    (lambda: forward_kl(draw(2, 9), draw(2, 9), temperature=math.nan), "temperature is nan"),
    (lambda: forward_kl(draw(2, 9), draw(2, 9), num_items=0), "num_items is 0"),
    (lambda: forward_kl(draw(2, 9), draw(2, 9), num_items=torch.ones(2)), r"num_items is \(2,\)"),
    (lambda: forward_kl(draw(2, 9), draw(2, 9), chunk_rows=0), "chunk_rows is 0"),
    (lambda: generalized_jsd(draw(2, 9), draw(2, 9), beta=1.5), "beta is 1.5"),
    (lambda: forward_kl(LazyLogits(draw(2, 4), head()), draw(2, 9), inplace=True), "inplace is for a student given"),
    (lambda: forward_kl(LazyLogits(draw(2, 5), head()), draw(2, 9)), r"hidden states are \(2, 5\).*\(9, 4\)"),
    (
        lambda: forward_kl(LazyLogits(draw(2, 4), Head(draw(9, 4), draw(4))), draw(2, 9)),
        r"bias \(4,\); expected \(9,\)",
    ),
    (lambda: topk_kl(draw(2, 9), top(draw(2, 9), 2)._replace(tail_logmass=draw(3))), r"tail_logmass \(3,\)"),
    (lambda: topk_kl(draw(2, 9), top(draw(3, 9), 2)), r"leading axes \(3,\); expected \(2,\)"),
    (lambda: topk_kl(draw(2, 9), top(draw(2, 12), 11)), "k is 11; expected 1 to 9"),
    (lambda: topk_kl(draw(2, 9), TopK(draw(2, 2), draw(2, 2), draw(2))), "topk_ids are torch.float32"),
    (lambda: topk_kl(draw(2, 9), TopK(draw(2, 1), torch.tensor([[3], [9]]), draw(2))), "from 3 to 9; .*payload.vocab"),
    (lambda: topk_kl(draw(2, 9), TopK(draw(2, 1), torch.tensor([[-1], [2]]), draw(2))), "from -1 to 2"),
]


@pytest.mark.parametrize(("call", "told"), REFUSED)
def test_refused_with_what_was_found(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_word_ids_of_rows_that_do_not_count_are_not_looked_at():
    teacher = TopK(draw(2, 1), torch.tensor([[3], [-7]], dtype=torch.int32), draw(2).abs().neg())
    assert topk_kl(draw(2, 9), teacher, mask=torch.tensor([True, False])).isfinite()
