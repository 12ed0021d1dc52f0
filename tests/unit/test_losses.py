"""Values and gradients of every loss, against the plain formula in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shmbridge.losses import (
    LOG_FLOOR,
    Head,
    LazyLogits,
    TopK,
    chunked,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    topk_kl,
)

FP32 = torch.finfo(torch.float32).eps
INF = math.inf


def floored(logits, temperature):
    return torch.log_softmax(logits.double() / temperature, -1).clamp(min=LOG_FLOOR)


def plain_forward(student, teacher, temperature):
    q, p = floored(student, temperature), floored(teacher, temperature)
    return (p.exp() * (p - q)).sum(-1) * temperature**2


def plain_reverse(student, teacher, temperature):
    return plain_of_q(floored(student, temperature), floored(teacher, temperature)) * temperature**2


def plain_of_q(q, p):
    return (q.exp() * (q - p)).sum(-1)


def plain_jsd(student, teacher, temperature, beta):
    q, p = floored(student, temperature), floored(teacher, temperature)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return (beta * plain_of_q(p, m) + (1 - beta) * plain_of_q(q, m)) * temperature**2


def plain_topk(student, teacher, temperature):
    """Over the buckets of the teacher's own top 3, from its full logits."""
    ids = teacher.topk(3).indices
    q, p = (buckets(torch.log_softmax(x.double() / temperature, -1), ids) for x in (student, teacher))
    return (p.exp() * (p.clamp(min=LOG_FLOOR) - q.clamp(min=LOG_FLOOR))).sum(-1) * temperature**2


def buckets(logprobs, ids):
    rest = logprobs.scatter(-1, ids, -INF).logsumexp(-1, keepdim=True)
    return torch.cat((logprobs.gather(-1, ids), rest), -1)


def top3(teacher, temperature):
    teacher = teacher.double()
    logprobs, ids = torch.log_softmax(teacher, -1).topk(3)
    tail = buckets(torch.log_softmax(teacher / temperature, -1), ids)[..., -1]
    return TopK(logprobs, ids.int(), tail)


def ours_topk(student, teacher, *, temperature=1.0, **options):
    """topk_kl from a teacher's full logits."""
    return topk_kl(student, top3(teacher, temperature), temperature=temperature, **options)


LOSSES = {
    "forward": (forward_kl, plain_forward),
    "reverse": (reverse_kl, plain_reverse),
    "jsd-0.5": (generalized_jsd, partial(plain_jsd, beta=0.5)),
    "jsd-0.1": (partial(generalized_jsd, beta=0.1), partial(plain_jsd, beta=0.1)),
    "jsd-0.9": (partial(generalized_jsd, beta=0.9), partial(plain_jsd, beta=0.9)),
    "jsd-0": (partial(generalized_jsd, beta=0.0), plain_forward),
    "jsd-1": (partial(generalized_jsd, beta=1.0), plain_reverse),
    "topk": (ours_topk, plain_topk),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def draw(*shape, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def plain(formula, student, teacher, temperature=1.0, mask=None):
    """The mean over the rows of the mask, with gradients left in `student` (a leaf)."""
    rows = formula(student, teacher, temperature)
    loss = rows.mean() if mask is None else rows[mask].sum() / max(1, int(mask.sum()))
    loss.backward()
    return loss.detach()


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def check(name, student, teacher, *, temperature=1.0, mask=None, scale=1.0, **options):
    """Value and gradient of logits against float64. `scale`: the largest |log p - log q|, whose rounding both carry."""
    ours, formula = LOSSES[name]
    found, expected = leaf(student), leaf(student.double())
    reference = plain(formula, expected, teacher, temperature, mask)
    loss = ours(found * 1.0, teacher, temperature=temperature, mask=mask, **options)  # inplace takes no leaf's data
    loss.backward()
    roundings = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 1, torch.float16: 2}[
        student.dtype
    ]  # of half an ulp
    own = roundings * torch.finfo(student.dtype).eps / 2
    working = 1e-15 if student.dtype == torch.float64 else FP32
    tiny = torch.finfo(torch.float16).smallest_normal * FP32 if student.dtype != torch.float16 else 2.0**-24
    rows = student[..., 0].numel() if mask is None else max(1, int(mask.sum()))
    assert found.grad.dtype == student.dtype
    torch.testing.assert_close(loss.double(), reference, rtol=0, atol=16 * working * temperature**2 * scale)
    tolerance = 16 * working * temperature * scale / rows + tiny
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=own + 16 * working, atol=tolerance)
    assert loss.isfinite()
    assert found.grad.isfinite().all()
    return loss


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_logits(name, dtype, temperature, inplace):
    student, teacher = draw(3, 7, 19, dtype=dtype), draw(3, 7, 19, dtype=dtype, seed=1)
    mask = draw(3, 7, seed=2) > 0
    check(name, student, teacher, temperature=temperature, inplace=inplace, chunk_rows=4, scale=30)
    check(name, student, teacher, temperature=temperature, inplace=inplace, chunk_rows=4, scale=30, mask=mask)


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_extreme_logits(name, temperature):
    student, teacher = draw(6, 9).sign() * 1e4, draw(6, 9, seed=1).sign() * 1e4
    student[3:] += draw(3, 9, seed=2)
    teacher[3:] += draw(3, 9, seed=3)
    check(name, student, teacher, temperature=temperature, scale=2e4 / temperature)


@every_loss
@pytest.mark.parametrize("side", ["student", "teacher", "both", "finfo.min"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padded_words_of_minus_infinity(name, side, dtype):
    """Also the clamp: where one side rules out what the other does not, the true value is infinite."""
    student, teacher = draw(5, 12, dtype=dtype), draw(5, 12, dtype=dtype, seed=1)
    if side == "finfo.min":
        student[:, -2:] = torch.finfo(dtype).min
        teacher[:, -2:] = -INF
    if side in ("student", "both"):
        student[:, -3:] = -INF
    if side in ("teacher", "both"):
        teacher[:, -3:] = -INF
    infinite = (name in ("forward", "jsd-0", "topk") and side == "student") or (
        name in ("reverse", "jsd-1") and side == "teacher"
    )
    loss = check(name, student, teacher, temperature=2.0, scale=-LOG_FLOOR if infinite else 30)
    if side == "both":
        assert loss < 100
    if infinite and name != "topk":
        assert loss > 100


@every_loss
def test_a_row_without_any_possible_word_stays_finite(name):
    student, teacher = leaf(torch.full((2, 5), -INF)), draw(2, 5)
    loss = LOSSES[name][0](student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@every_loss
def test_infinite_student_logits_in_one_word_count_as_all_of_its_mass(name):
    student = leaf(torch.tensor([[INF, 0.0, 1.0, 2.0]]))
    loss = LOSSES[name][0](student, draw(1, 4))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_a_diverged_student_is_seen():
    assert forward_kl(torch.full((1, 4), math.nan), draw(1, 4)).isnan()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_teacher_has_no_distance_to_itself(name, dtype, temperature):
    teacher = draw(4, 40, dtype=dtype)
    student = leaf(teacher)
    loss = LOSSES[name][0](student, teacher, temperature=temperature)
    loss.backward()
    assert abs(loss.item()) < 4 * FP32 * temperature**2
    assert student.grad.abs().max() < FP32 * temperature


@every_loss
def test_gradcheck(name):
    student, teacher = leaf(draw(3, 5, dtype=torch.float64, spread=1)), draw(3, 5, dtype=torch.float64, seed=1)
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(partial(LOSSES[name][0], teacher=teacher, temperature=1.5, mask=mask), (student,))


@every_loss
def test_gradcheck_through_a_head(name):
    shapes = (3, 2), (5, 2), (5,)
    inputs = [leaf(draw(*shape, dtype=torch.float64, seed=i, spread=1)) for i, shape in enumerate(shapes)]
    teacher = draw(3, 5, dtype=torch.float64, seed=9)

    def loss(hidden, weight, bias):
        student = LazyLogits(hidden, Head(weight, bias, softcap=2.0, scale=0.7))
        return LOSSES[name][0](student, teacher, temperature=1.5, chunk_rows=2)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("beta", [1e-4, 1 - 1e-4])
def test_jsd_tends_to_forward_and_reverse_kl(beta):
    student, teacher = draw(4, 9, dtype=torch.float64, spread=1), draw(4, 9, dtype=torch.float64, seed=1, spread=1)
    limit = forward_kl(student, teacher) if beta < 0.5 else reverse_kl(student, teacher)
    scaled = generalized_jsd(student, teacher, beta=beta) / min(beta, 1 - beta)
    torch.testing.assert_close(scaled, limit, rtol=1e-2, atol=0)


def test_the_temperature_squared_keeps_the_gradient_of_large_temperatures():
    """Hinton et al. 2015: as T grows the gradient tends to (student - teacher) / vocab, each centred."""
    student, teacher = (
        leaf(draw(2, 6, dtype=torch.float64, spread=1)),
        draw(2, 6, dtype=torch.float64, seed=1, spread=1),
    )
    forward_kl(student, teacher, temperature=1e4, num_items=1).backward()
    centred = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(student.grad, (centred / 6).detach(), rtol=1e-3, atol=1e-4)


# Heads


def projected(dtype, *, bias=True, softcap=5.0, scale=0.5, seed=0, vocab=19, dim=6, lead=(3, 7)):
    hidden, weight = draw(*lead, dim, dtype=dtype, seed=seed, spread=1), draw(vocab, dim, dtype=dtype, seed=seed + 50)
    return hidden, weight, draw(vocab, dtype=dtype, seed=seed + 60) if bias else None, softcap, scale


def lazy(hidden, weight, bias, softcap, scale):
    return LazyLogits(hidden, Head(weight, bias, softcap, scale))


def whole(hidden, weight, bias, softcap, scale):
    return Head(weight, bias, softcap, scale)(hidden)


@every_loss
@pytest.mark.parametrize("settings_", [{}, {"softcap": None, "scale": 1.0}, {"bias": False}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hidden_and_head(name, settings_, dtype):
    """Against the plain formula over the same head's logits; in bfloat16 both backwards round alike."""
    ours, formula = LOSSES[name]
    *tensors, softcap, scale = projected(dtype, **settings_)
    teacher, mask = draw(3, 7, 19, seed=5), draw(3, 7, seed=6) > 0
    expected = [None if tensor is None else leaf(tensor.double()) for tensor in tensors]
    found = [None if tensor is None else leaf(tensor) for tensor in tensors]
    if dtype == torch.bfloat16:
        expected = [None if tensor is None else leaf(tensor) for tensor in tensors]
    reference = plain_loss = formula(whole(*expected, softcap, scale), teacher, 2.0)[mask].mean()
    plain_loss.backward()
    loss = ours(lazy(*found, softcap, scale), teacher, temperature=2.0, mask=mask, chunk_rows=4)
    loss.backward()
    torch.testing.assert_close(loss.double(), reference.detach(), rtol=1e-5, atol=1e-6)
    relative = {torch.float64: 1e-12, torch.float32: 16 * FP32, torch.bfloat16: 2 * torch.finfo(dtype).eps}[dtype]
    for ours_, theirs in zip(found, expected, strict=True):
        if ours_ is not None:
            assert ours_.grad.dtype == dtype
            close_in_norm(ours_.grad, theirs.grad, relative)


def close_in_norm(found, expected, relative):
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < relative, f"{error:.2e} > {relative:.2e}"


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "topk"])
def test_any_side_may_be_hidden_states(name):
    mine, theirs = projected(torch.float32), projected(torch.float32, seed=1)
    losses = [
        LOSSES[name][0](make(*mine), other(*theirs), temperature=2.0)
        for make in (lazy, whole)
        for other in (lazy, whole)
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-7)


def test_the_weight_gradient_is_summed_in_float32():
    """In bfloat16 a sum over 512 chunks would stop growing at 256 equal addends."""
    hidden, weight = torch.ones(512, 1, dtype=torch.bfloat16), leaf(torch.zeros(2, 1, dtype=torch.bfloat16))
    teacher = torch.tensor([[40.0, -40.0]]).expand(512, 2)
    forward_kl(LazyLogits(hidden, Head(weight)), teacher, num_items=1, chunk_rows=1).backward()
    assert weight.grad.tolist() == [[-256.0], [256.0]]


def test_only_what_asks_for_a_gradient_gets_one():
    hidden, weight, bias, *rest = projected(torch.float32)
    hidden, bias = leaf(hidden), leaf(bias)
    teacher = leaf(draw(3, 7, 19))
    forward_kl(lazy(hidden, weight, bias, *rest), teacher).backward()
    assert hidden.grad is not None
    assert bias.grad is not None
    assert weight.grad is None
    assert teacher.grad is None


def test_the_head_gives_the_bits_of_a_linear_layer():
    linear = torch.nn.Linear(6, 11)
    hidden = draw(2, 3, 6)
    assert torch.equal(Head(linear.weight, linear.bias)(hidden), linear(hidden))
    capped = Head(linear.weight, linear.bias, softcap=3.0, scale=2.0)(hidden)
    torch.testing.assert_close(capped, torch.tanh(2 * linear(hidden) / 3) * 3)


def test_the_head_works_in_the_hidden_states_dtype():
    assert Head(draw(5, 3))(draw(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


# Rows


shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(3, 9), st.integers(1, 8))


@settings(max_examples=60, deadline=None, database=None)
@given(shapes, st.sampled_from(sorted(LOSSES)), st.data())
def test_any_shape_mask_and_chunk_size(shape, name, data):
    batch, seq, vocab, chunk_rows = shape
    bits = data.draw(st.lists(st.booleans(), min_size=batch * seq, max_size=batch * seq))
    mask = torch.tensor(bits).view(batch, seq)
    student, teacher = draw(batch, seq, vocab), draw(batch, seq, vocab, seed=1)
    inplace = data.draw(st.booleans())
    check(name, student, teacher, mask=mask, chunk_rows=chunk_rows, scale=30, inplace=inplace)


@every_loss
@pytest.mark.parametrize("form", ["logits", "inplace", "lazy"])
def test_no_row_counts(name, form):
    tensors = projected(torch.float32)
    inputs = [leaf(tensor) for tensor in (tensors[:3] if form == "lazy" else [whole(*tensors)])]
    student = lazy(*inputs, *tensors[3:]) if form == "lazy" else inputs[0] * 1.0
    mask = torch.zeros(3, 7, dtype=torch.bool)
    loss = LOSSES[name][0](student, draw(3, 7, 19), mask=mask, inplace=form == "inplace")
    loss.backward()
    assert loss.item() == 0.0
    assert all(not tensor.grad.any() for tensor in inputs)


@every_loss
@pytest.mark.parametrize("form", ["logits", "inplace", "lazy"])
def test_rows_that_do_not_count_may_hold_anything(name, form):
    tensors, teacher, mask = projected(torch.float32), draw(3, 7, 19, seed=5), draw(3, 7, seed=6) > 0
    losses, gradients = [], []
    for filler in (0.0, math.nan):
        source = (tensors[0] if form == "lazy" else whole(*tensors)).masked_fill(~mask.unsqueeze(-1), filler)
        source = leaf(source)
        student = lazy(source, *tensors[1:]) if form == "lazy" else source * 1.0
        theirs = teacher.masked_fill(~mask.unsqueeze(-1), filler)
        losses.append(LOSSES[name][0](student, theirs, mask=mask, inplace=form == "inplace"))
        losses[-1].backward()
        gradients.append(source.grad)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)
    assert not gradients[0][~mask].any()


@every_loss
def test_flat_and_batched_are_one(name):
    student, teacher = draw(3, 7, 19), draw(3, 7, 19, seed=1)
    mask = draw(3, 7, seed=2) > 0
    batched, flat = (check(name, *x, mask=m) for x, m in (
        ((student, teacher), mask), ((student.flatten(0, 1), teacher.flatten(0, 1)), mask.flatten()),
    ))  # fmt: skip
    assert torch.equal(batched, flat)


@every_loss
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_that_are_not_contiguous(name, inplace, masked):
    """HuggingFace's logits[:, :-1] is not; it is neither copied whole nor misread."""
    ours, formula = LOSSES[name]
    student, teacher = draw(3, 8, 19), draw(3, 8, 19, seed=1)[:, :-1]
    mask = draw(3, 7, seed=2) > 0 if masked else None
    found, expected = leaf(student), leaf(student.double())
    reference = formula(expected[:, :-1], teacher, 1.0)
    (reference if mask is None else reference[mask]).mean().backward()
    ours((found * 1.0)[:, :-1], teacher, mask=mask, inplace=inplace, chunk_rows=4).backward()
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)
    assert not found.grad[:, -1].any()


# Memory


class NewStorages(TorchDispatchMode):
    """Every storage that an operation makes; held, so that none is counted twice or reused."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.found[storage.data_ptr()] = storage
        return result

    def of(self, nbytes, *known):
        """Sizes of those of `nbytes` or more, `known` tensors left out."""
        old = {tensor.untyped_storage().data_ptr() for tensor in known}
        return [s.nbytes() for pointer, s in self.found.items() if pointer not in old and s.nbytes() >= nbytes]


@every_loss
@pytest.mark.parametrize("form", ["logits", "inplace", "lazy", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_of_the_logits_size_is_made_but_their_gradient(name, form, dtype, masked, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1 << 12)
    batch, seq, vocab, dim = 2, 32, 40, 4
    hidden, weight = leaf(draw(batch, seq, dim, dtype=dtype)), leaf(draw(vocab, dim, dtype=dtype))
    logits = (hidden @ weight.T).detach().requires_grad_()
    teacher = draw(batch, seq, vocab, dtype=dtype)
    if form == "strided":
        logits = leaf(draw(batch, seq + 1, vocab, dtype=dtype))[:, 1:].detach().requires_grad_()
    mask = draw(batch, seq, seed=1) > 0 if masked else None
    student = LazyLogits(hidden, Head(weight)) if form == "lazy" else logits
    theirs = top3(teacher, 2.0) if name == "topk" else teacher
    loss_of = topk_kl if name == "topk" else LOSSES[name][0]
    with NewStorages() as made:
        loss = loss_of(student, theirs, temperature=2.0, mask=mask, inplace=form == "inplace", chunk_rows=4)
        torch.autograd.grad(loss, (hidden, weight) if form == "lazy" else logits)
    size = batch * seq * vocab * dtype.itemsize
    expected = [size] if form in ("logits", "strided") else []
    assert made.of(size // 2, logits, teacher) == expected


# Autograd


@every_loss
@pytest.mark.parametrize("form", ["logits", "inplace", "lazy"])
def test_the_incoming_gradient_scales(name, form):
    tensors, teacher = projected(torch.float32), draw(3, 7, 19, seed=5)
    gradients = []
    for scale in (1.0, 1024.0):
        source = leaf(tensors[0] if form == "lazy" else whole(*tensors))
        student = lazy(source, *tensors[1:]) if form == "lazy" else source * 1.0
        (LOSSES[name][0](student, teacher, inplace=form == "inplace") * scale).backward()
        gradients.append(source.grad)
    torch.testing.assert_close(gradients[1] / 1024, gradients[0], rtol=2 * FP32, atol=0)


def test_loss_scaling_reaches_float16_before_the_division_by_many_items():
    """Two million items: without the scaling nothing of the gradient would be left in float16."""
    student, teacher = leaf(draw(2, 5, dtype=torch.float16)), draw(2, 5, seed=1)
    expected = leaf(student.double())
    (plain_forward(expected, teacher, 1.0).sum() * 2.0**16 / 2e6).backward()
    (forward_kl(student, teacher, num_items=2e6) * 2.0**16).backward()
    torch.testing.assert_close(student.grad.double(), expected.grad, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_divisor_and_loss_scaling_are_not_rounded_to_the_logits_dtype(dtype):
    """0.7479 would be 0.7461 in bfloat16: every gradient too small by a quarter of a percent."""
    for settings_, factor in (({"num_items": 1 / 0.7479}, 1.0), ({"num_items": 1.0}, 0.7479)):
        student, teacher = leaf(draw(64, 40, dtype=dtype)), draw(64, 40, seed=1)
        expected = leaf(student.double())
        (plain_forward(expected, teacher, 1.0).sum() * 0.7479).backward()
        (forward_kl(student, teacher, **settings_) * factor).backward()
        assert abs(student.grad.double().norm() / expected.grad.norm() - 1) < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_graph_gives_the_same_gradient_again(dtype):
    student, teacher = leaf(draw(4, 9, dtype=dtype)), draw(4, 9, seed=1)
    loss = forward_kl(student, teacher)
    first, second = (torch.autograd.grad(loss, student, torch.tensor(s), retain_graph=s == 1.0)[0] for s in (1.0, 2.0))
    torch.testing.assert_close(second, 2 * first)


def test_nothing_is_computed_for_a_gradient_under_no_grad():
    student, teacher = leaf(draw(4, 9)), draw(4, 9, seed=1)
    before = student.detach().clone()
    with torch.no_grad():
        loss = forward_kl(student, teacher, inplace=True)
    assert not loss.requires_grad
    assert torch.equal(student, before)
    torch.testing.assert_close(loss, forward_kl(student, teacher).detach())


def test_inplace_leaves_the_gradient_in_the_logits():
    student = leaf(draw(4, 9))
    logits = student * 1.0
    forward_kl(logits, draw(4, 9, seed=1), inplace=True).backward()
    assert torch.equal(logits, student.grad)


def test_inplace_is_refused_by_autograd_where_a_layer_still_needs_the_logits():
    student = leaf(draw(4, 9))
    loss = forward_kl(torch.tanh(student), draw(4, 9, seed=1), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_loss
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing(name, reentrant):
    hidden, weight, *rest = projected(torch.float32)
    teacher = draw(3, 7, 19, seed=5)
    gradients = []
    for run in (lambda f, *x: f(*x), partial(checkpoint, use_reentrant=reentrant)):
        inputs = leaf(hidden), leaf(weight)
        run(lambda h, w: LOSSES[name][0](lazy(h.sin(), w, *rest), teacher), *inputs).backward()
        gradients.append([tensor.grad for tensor in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_loss
def test_under_autocast_a_head_multiplies_as_a_linear_layer_does(name):
    hidden, weight, *rest = projected(torch.float32, softcap=None, scale=1.0)
    teacher = draw(3, 7, 19, seed=5)
    ours, formula = LOSSES[name]
    found, expected = (leaf(hidden), leaf(weight)), (leaf(hidden), leaf(weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(lazy(*found, *rest), teacher)
        reference = formula(F.linear(*expected, rest[0]), teacher, 1.0).mean()
    loss.backward()
    reference.backward()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        assert a.grad.dtype == torch.float32
        close_in_norm(a.grad, b.grad, 2 * torch.finfo(torch.bfloat16).eps)


@every_loss
def test_autocast_does_not_touch_given_logits(name):
    student, teacher = draw(4, 9), draw(4, 9, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        check(name, student, teacher, scale=30)


# Top k


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_top_k_of_the_whole_vocabulary_is_forward_kl(temperature):
    student, teacher = draw(4, 9, dtype=torch.float64), draw(4, 9, dtype=torch.float64, seed=1)
    logprobs, ids = torch.log_softmax(teacher, -1).topk(9)
    everything = TopK(logprobs, ids, torch.full((4,), -INF, dtype=torch.float64))
    found, expected = leaf(student), leaf(student)
    topk_kl(found, everything, temperature=temperature).backward()
    forward_kl(expected, teacher, temperature=temperature).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_the_students_tail_is_never_one_minus_a_sum():
    """With e^-60 left for the tail, 1 - sum is 0 in float64 as well; its logarithm is exact all the same."""
    student = torch.tensor([[60.0, 0.0, -1.0, -2.0]])
    teacher = TopK(torch.log(torch.tensor([[0.5]])), torch.tensor([[0]]), torch.log(torch.tensor([0.5])))
    tail = math.log(1 + math.exp(-1) + math.exp(-2)) - 60
    torch.testing.assert_close(topk_kl(student, teacher).item(), math.log(0.5) - 0.5 * tail, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tail", [0.0, 1e-7, -1e-8, -200.0, -INF])
def test_tails_at_the_edges(tail):
    student = leaf(draw(2, 6))
    loss = topk_kl(student, TopK(torch.tensor([[-0.5, -INF]] * 2), torch.tensor([[1, 2]] * 2), torch.full((2,), tail)))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
