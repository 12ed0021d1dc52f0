"""Divergence and cross entropy in one pass, against plain formulas in float64; what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shmbridge.losses import (
    LOG_FLOOR,
    Head,
    LazyLogits,
    chunked,
    cross_entropy,
    distillation_loss,
    forward_kl,
    mask_from_labels,
    targets_from_labels,
)
from tests.unit.test_losses import (
    NewStorages,
    draw,
    lazy,
    leaf,
    plain_forward,
    plain_jsd,
    plain_reverse,
    plain_topk,
    projected,
    top3,
    whole,
)
from tests.unit.test_losses_streams import pieces

BETA, TEMPERATURE = 0.3, 2.0
PLAIN = {
    "forward_kl": plain_forward,
    "reverse_kl": plain_reverse,
    "jsd": lambda *x: plain_jsd(*x, BETA),
    "topk": plain_topk,
}


def rows_that_count():
    """(mask, targets): of the same rows, of different ones, every row, and one term without any."""
    words = torch.randint(19, (3, 7), generator=torch.Generator().manual_seed(7))
    mask, other = draw(3, 7, seed=6) > 0, draw(3, 7, seed=8) > 0
    return {
        "same": (mask, words.masked_fill(~mask, -100)),
        "different": (mask, words.masked_fill(~other, -100)),
        "all": (None, words),
        "all of one": (None, words.masked_fill(~other, -100)),
        "none of one": (mask, torch.full_like(words, -100)),
    }


def plain(name, logits, teacher, mask, targets, kd_weight, ce_weight, num_items=None):
    """(loss, kd, ce) with the graph."""
    mask = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask
    kd = PLAIN[name](logits, teacher, TEMPERATURE)[mask].sum() / (num_items or max(1, int(mask.sum())))
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    ce = ce / (num_items or max(1, int((targets != -100).sum())))
    return kd_weight * kd + ce_weight * ce, kd, ce


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("form", ["logits", "inplace", "lazy", "streamed"])
@pytest.mark.parametrize("rows", rows_that_count())
def test_both_terms_and_their_gradient(name, form, rows):
    mask, targets = rows_that_count()[rows]
    *tensors, softcap, scale = projected(torch.float64)
    teacher = draw(3, 7, 19, dtype=torch.float64, seed=5)
    expected = [leaf(tensor) for tensor in tensors]
    for chunk_rows, num_items in ((1, None), (3, None), (None, 5.0)):
        reference = plain(name, whole(*expected, softcap, scale), teacher, mask, targets, 0.7, 0.4, num_items)
        gradients = torch.autograd.grad(reference[0], expected)
        found = [leaf(tensor) for tensor in tensors]
        theirs = top3(teacher, TEMPERATURE) if name == "topk" else teacher
        loss = distillation_loss(
            lazy(*found, softcap, scale) if form == "lazy" else whole(*found, softcap, scale) * 1.0,
            pieces(theirs, 1, 7, 7, 12) if form == "streamed" else theirs,
            loss=name,
            temperature=TEMPERATURE,
            beta=BETA,
            kd_weight=0.7,
            ce_weight=0.4,
            targets=targets,
            mask=mask,
            num_items=num_items,
            inplace=form == "inplace",
            chunk_rows=chunk_rows,
        )
        loss.loss.backward()
        for ours, plainly in zip(loss, reference, strict=True):
            torch.testing.assert_close(ours.detach(), plainly.detach(), rtol=1e-12, atol=1e-12)
        assert not loss.kd.requires_grad
        assert not loss.ce.requires_grad
        for ours, plainly in zip(found, gradients, strict=True):
            torch.testing.assert_close(ours.grad, plainly, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ["same", "different"])
def test_the_gradient_is_rounded_once_to_the_logits_dtype(dtype, rows):
    """In float16 twice. Were each term rounded by itself, the sum would be rounded once more."""
    mask, targets = rows_that_count()[rows]
    logits, teacher = draw(3, 7, 19, dtype=dtype), draw(3, 7, 19, seed=5)
    found, expected = leaf(logits), leaf(logits.double())
    loss, *terms = plain("forward_kl", expected, teacher, mask, targets, 1e-4, 2e-4)
    (loss * 1024).backward()
    ours = distillation_loss(
        found, teacher, temperature=TEMPERATURE, kd_weight=1e-4, ce_weight=2e-4, targets=targets, mask=mask
    )
    (ours.loss * 1024).backward()
    torch.testing.assert_close(torch.stack(ours[1:]).double(), torch.stack(terms).detach(), rtol=1e-5, atol=0)
    assert ours.loss.dtype == ours.kd.dtype == ours.ce.dtype == torch.float32
    ulps = 1.0 if dtype == torch.float16 else 0.5
    tiny = 2.0**-24 if dtype == torch.float16 else 1e-7
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1.1 * ulps * torch.finfo(dtype).eps, atol=tiny)


class Matmuls(TorchDispatchMode):
    """Counts the matrix products."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("rows", ["same", "different"])
def test_the_logits_of_a_row_are_computed_once(rows):
    mask, targets = rows_that_count()[rows]
    hidden, weight, *_ = projected(torch.float32)
    counted = mask | (targets != -100)
    with Matmuls() as forward:
        distillation_loss(
            LazyLogits(hidden, Head(weight)), draw(3, 7, 19), ce_weight=1.0, targets=targets, mask=mask, chunk_rows=4
        )
    assert forward.count == math.ceil(int(counted.sum()) / 4)


@pytest.mark.parametrize("form", ["logits", "inplace", "lazy"])
def test_nothing_of_the_logits_size_is_made_but_their_gradient(form, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1 << 12)
    hidden, weight, teacher = leaf(draw(2, 32, 4)), leaf(draw(40, 4)), draw(2, 32, 40)
    targets = torch.arange(64).view(2, 32) % 40
    logits = leaf(hidden @ weight.T)
    student = LazyLogits(hidden, Head(weight)) if form == "lazy" else logits
    with NewStorages() as made:
        loss = distillation_loss(student, teacher, ce_weight=1.0, targets=targets, inplace=form == "inplace").loss
        torch.autograd.grad(loss, (hidden, weight) if form == "lazy" else logits)
    assert made.of(logits.nbytes // 2, logits, teacher) == ([logits.nbytes] if form == "logits" else [])


def test_the_teacher_may_hold_anything_where_only_the_target_counts():
    mask, targets = rows_that_count()["different"]
    outside = ~mask & (targets == -100)
    gradients = []
    for filler in (0.0, math.nan):
        student = leaf(draw(3, 7, 19).masked_fill(outside.unsqueeze(-1), filler))
        teacher = draw(3, 7, 19, seed=5).masked_fill(~mask.unsqueeze(-1), filler)
        distillation_loss(student, teacher, ce_weight=1.0, targets=targets, mask=mask, chunk_rows=4).loss.backward()
        gradients.append(student.grad)
    assert torch.equal(*gradients)
    assert not gradients[0][outside].any()


@pytest.mark.parametrize("form", ["logits", "inplace", "lazy"])
def test_a_term_of_weight_zero_is_told_and_changes_nothing(form):
    mask, targets = rows_that_count()["different"]
    teacher = draw(3, 7, 19, seed=5)

    def run(**options):
        hidden, *rest = projected(torch.float32)
        hidden = leaf(hidden)
        student = lazy(hidden, *rest) if form == "lazy" else whole(hidden, *rest) * 1.0
        loss = distillation_loss(student, teacher, mask=mask, inplace=form == "inplace", chunk_rows=1, **options)
        loss.loss.backward()
        return loss, hidden.grad

    kd, of_kd = run()
    both, of_both = run(ce_weight=1.0, targets=targets)
    told, of_told = run(ce_weight=0.0, targets=targets)
    torch.testing.assert_close((told.loss, of_told), (kd.loss, of_kd))
    ce, of_ce = run(kd_weight=0.0, ce_weight=1.0, targets=targets)
    torch.testing.assert_close((told.kd, told.ce), (ce.kd, ce.loss))
    torch.testing.assert_close((both.loss, of_both), (kd.loss + ce.loss, of_kd + of_ce))


@pytest.mark.parametrize("form", ["logits", "inplace", "lazy"])
def test_no_row_counts(form):
    tensors = projected(torch.float32)
    inputs = [leaf(tensor) for tensor in (tensors[:3] if form == "lazy" else [whole(*tensors)])]
    student = lazy(*inputs, *tensors[3:]) if form == "lazy" else inputs[0] * 1.0
    loss = distillation_loss(
        student,
        draw(3, 7, 19),
        ce_weight=1.0,
        targets=torch.full((3, 7), -100),
        mask=torch.zeros(3, 7, dtype=torch.bool),
        inplace=form == "inplace",
    )
    loss.loss.backward()
    assert [value.item() for value in loss] == [0.0, 0.0, 0.0]
    assert all(not tensor.grad.any() for tensor in inputs)


def test_under_no_grad_the_student_is_left_as_it_is():
    student, teacher, targets = leaf(draw(3, 9)), draw(3, 9, seed=1), torch.tensor([1, -100, 3])
    before = student.detach().clone()
    with torch.no_grad():
        loss = distillation_loss(student, teacher, ce_weight=1.0, targets=targets, inplace=True)
    assert not loss.loss.requires_grad
    assert torch.equal(student, before)
    torch.testing.assert_close(
        loss.loss, distillation_loss(student, teacher, ce_weight=1.0, targets=targets).loss.detach()
    )


# Cross entropy alone


def test_cross_entropy_is_torchs():
    student, targets = draw(3, 7, 19), rows_that_count()["same"][1]
    found, expected = leaf(student), leaf(student)
    loss = cross_entropy(found, targets, chunk_rows=4)
    reference = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    (loss.backward(), reference.backward())
    torch.testing.assert_close((loss, found.grad), (reference, expected.grad))
    alone = distillation_loss(student, None, ce_weight=1.0, targets=targets)
    assert torch.equal(alone.loss, loss)
    assert torch.equal(alone.ce, loss)
    assert alone.kd.item() == 0.0


def test_a_target_that_the_student_rules_out_counts_as_the_floor():
    student = leaf(torch.tensor([[0.0, -math.inf, 1.0], [0.0, 1.0, 2.0]]))
    loss = cross_entropy(student, torch.tensor([1, 2]), num_items=1)
    loss.backward()
    torch.testing.assert_close(loss.item(), -LOG_FLOOR + math.log(1 + math.exp(-1) + math.exp(-2)))
    assert not student.grad[0].any()
    assert student.grad[1].all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_targets_are_the_next_labels(dtype):
    labels = torch.tensor([[-100, -100, 7, 8], [5, -100, -100, 9]], dtype=dtype)
    targets = targets_from_labels(labels)
    assert targets.tolist() == [[-100, 7, 8, -100], [-100, -100, 9, -100]]
    assert targets.dtype == torch.int64
    assert torch.equal(targets != -100, mask_from_labels(labels, shifted=False))


# What is refused


def refused(student=None, teacher=None, **options):
    return distillation_loss(draw(2, 9) if student is None else student, teacher, **options)


WORDS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: refused(teacher=draw(2, 9), loss="kl"), "loss is 'kl'; expected one of forward_kl, reverse_kl, jsd, topk"),
        (lambda: refused(teacher=draw(2, 9), loss="jsd", beta=-0.1), "beta is -0.1"),
        (lambda: refused(teacher=draw(2, 9), ce_weight=0.5), "ce_weight is 0.5 and targets are None; .*targets_from_labels"),
        (lambda: refused(teacher=draw(2, 9), kd_weight=-1.0), "kd_weight is -1.0; expected 0 or"),
        (lambda: refused(ce_weight=math.nan, targets=WORDS), "ce_weight is nan"),
        (lambda: refused(targets=WORDS), "without a teacher: no term would give a gradient. Set ce_weight"),
        (lambda: refused(teacher=draw(2, 9), kd_weight=0.0), "kd_weight is 0.0 and ce_weight 0.0, with a teacher"),
        (lambda: cross_entropy(draw(2, 9), torch.tensor([-1, 9])), "targets run from -1 to 9; expected 0 to 8.*-100"),
        (lambda: cross_entropy(draw(2, 9), torch.tensor([1])), r"targets are \(1,\); expected \(2,\)"),
        (lambda: cross_entropy(draw(2, 9), torch.ones(2)), "targets are torch.float32; expected int64"),
        (lambda: cross_entropy(LazyLogits(draw(2, 4), Head(draw(9, 4))), WORDS, inplace=True), "inplace is for"),
    ],
)  # fmt: skip
def test_refused_with_what_was_found(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_forward_kl_is_the_default():
    student, teacher = draw(2, 9), draw(2, 9, seed=1)
    assert torch.equal(distillation_loss(student, teacher).loss, forward_kl(student, teacher))
