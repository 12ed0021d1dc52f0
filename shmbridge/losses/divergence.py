"""The formulas, for one chunk of rows: loss and gradient by the student's logits, written out by hand.

P is the teacher, Q the student, both softmax(logits / T); a row's loss is T^2 times its divergence (Hinton, Vinyals,
Dean 2015), so its gradient carries T^2 / T = T:

    forward KL   sum p (log p - log q)            T (q - p)
    reverse KL   sum q u,  u = log q - log p      T q (u - sum q u)
    JSD          see `generalized_jsd`            T (1 - beta) q (u - sum q u),  u = log q - log m
    top-k KL     forward KL over k + 1 buckets    as above for the k words, T q (1 - p_tail / q_tail) for the others

Cross entropy with a target w is forward KL of a teacher whose mass is all on w, at T = 1: -log q(w), gradient q - [w].
Reverse KL from candidates and a sampled word is derived in docs/losses.md.

Every function takes logits that it may overwrite, (rows, vocab) float32 or float64, and returns the rows' losses
(rows,) and `weight` () times the gradient (rows, vocab), or None where `weight` is None. They work in place: no more
than TEMPORARIES tensors of the chunk's size live at once, the two arguments included.

Where the true value is infinite, because one side has mass on a word that the other rules out, the log-probability that
would be -inf counts as LOG_FLOOR. The gradient is that of the value with this clamp: a word that the student rules out
gets none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shmbridge.losses.labels import IGNORE_INDEX

TEMPORARIES = 5
LOG_FLOOR = -1e5
_BOUND = 1e20  # -inf and finfo.min as numbers that differences and temperatures leave finite
_LN_2 = math.log(2)
_LEAST = torch.finfo(torch.float32).eps  # mass that 1 - sum of float32 probabilities can tell from none

LossAndGradient = tuple[Tensor, Tensor | None]


class TopK(NamedTuple):
    """The teacher's k most likely words and the mass of all others. Leading axes as in the student's logits.

    logprobs: (..., k) float; log-probabilities of the full softmax at temperature 1.
    ids: (..., k) int32 or int64; their words, no word twice in a row.
    tail_logmass: (...) float; log of the probability of all other words, at the temperature of the loss; -inf: none.
    """

    logprobs: Tensor
    ids: Tensor
    tail_logmass: Tensor


class Targets(NamedTuple):
    """The words of cross entropy: ids (rows, 1) integer."""

    ids: Tensor


class Candidates(NamedTuple):
    """Words of each row and what the teacher gives them.

    ids: (..., c) integer, no word twice in a row.
    logprobs: (..., c) float; log-probabilities of the full softmax at temperature 1.
    sampled: (...) integer; a word drawn from the student, IGNORE_INDEX: none.
    sampled_logprobs: (...) float, as logprobs.
    """

    ids: Tensor
    logprobs: Tensor
    sampled: Tensor
    sampled_logprobs: Tensor


def forward_kl(student: Tensor, teacher: Tensor, weight: Tensor | None, *, temperature: float) -> LossAndGradient:
    """KL(P || Q)."""
    q, log_q = _softmax_(student, temperature)
    p, log_p = _softmax_(teacher, temperature)
    clamped = log_q < LOG_FLOOR
    losses = log_p.sub_(log_q.clamp_(min=LOG_FLOOR)).mul_(p).sum(-1) * temperature**2
    if weight is None:
        return losses, None
    p.masked_fill_(clamped, 0.0)
    return losses, q.mul_(p.sum(-1, keepdim=True)).sub_(p).mul_(temperature * weight)


def reverse_kl(student: Tensor, teacher: Tensor, weight: Tensor | None, *, temperature: float) -> LossAndGradient:
    """KL(Q || P)."""
    q, log_q = _softmax_(student, temperature)
    u = log_q.sub_(_softmax_(teacher, temperature)[1].clamp_(min=LOG_FLOOR))
    row = (q * u).sum(-1, keepdim=True)
    gradient = u.sub_(row).mul_(q).mul_(temperature * weight) if weight is not None else None
    return row.squeeze(-1) * temperature**2, gradient


def generalized_jsd(
    student: Tensor, teacher: Tensor, weight: Tensor | None, *, temperature: float, beta: float
) -> LossAndGradient:
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q and 0 < beta < 1.

    Agarwal et al. 2023, equation 1. From z = log((1 - beta) q / (beta p)): log p - log m = -log(beta) - softplus(z) and
    log q - log m = -log(1 - beta) - softplus(-z), which keeps small divergences exact.
    """
    log_beta, log_rest = math.log(beta), math.log1p(-beta)
    q, log_q = _softmax_(student, temperature)
    p, log_p = _softmax_(teacher, temperature)
    z = log_q.sub_(log_p).add_(log_rest - log_beta)
    from_teacher = -(F.softplus(z).add_(log_beta).mul_(p).sum(-1))
    u = F.softplus(z.neg_()).add_(log_rest).neg_()
    row = torch.mul(q, u, out=z).sum(-1, keepdim=True)
    losses = (beta * from_teacher + (1 - beta) * row.squeeze(-1)) * temperature**2
    return losses, u.sub_(row).mul_(q).mul_((1 - beta) * temperature * weight) if weight is not None else None


def topk_kl(student: Tensor, teacher: TopK, weight: Tensor | None, *, temperature: float) -> LossAndGradient:
    """KL over k + 1 buckets: the teacher's k words, and all others as one."""
    ids = teacher.ids
    log_p = _log_buckets(teacher, temperature)
    scaled = _centred_(student, temperature)
    top = scaled.gather(-1, ids)
    rest = scaled.scatter_(-1, ids, torch.finfo(scaled.dtype).min)
    rest_max = rest.amax(-1, keepdim=True)
    within = rest.sub_(rest_max).exp_()  # the student's distribution over the rest, once divided by its sum
    rest_sum = within.sum(-1, keepdim=True)
    log_rest = rest_max + rest_sum.log()
    log_q = torch.cat((top, log_rest), -1)
    log_q = log_q.sub_(torch.logaddexp(top.logsumexp(-1, keepdim=True), log_rest))
    p = log_p.exp()
    losses = (p * (log_p - log_q.clamp(min=LOG_FLOOR))).sum(-1) * temperature**2
    if weight is None:
        return losses, None
    p.masked_fill_(log_q < LOG_FLOOR, 0.0)
    buckets = log_q.exp().mul_(p.sum(-1, keepdim=True)).sub_(p).mul_(temperature * weight)
    gradient = within.mul_(buckets[:, -1:] / rest_sum)
    return losses, gradient.scatter_(-1, ids, buckets[:, :-1])


def cross_entropy(student: Tensor, targets: Targets, weight: Tensor | None) -> LossAndGradient:
    """-log q(target), at temperature 1."""
    q, log_q = _softmax_(student, 1.0)
    of_target = log_q.gather(-1, targets.ids)
    losses = -of_target.clamp(min=LOG_FLOOR).squeeze(-1)
    if weight is None:
        return losses, None
    clamped = of_target < LOG_FLOOR
    q.scatter_add_(-1, targets.ids, torch.full_like(of_target, -1.0))
    return losses, q.mul_(torch.where(clamped, 0.0, weight))


def candidate_reverse_kl(student: Tensor, teacher: Candidates, weight: Tensor | None) -> LossAndGradient:
    """KL(Q || P) over c + 1 buckets, the candidates and the rest, and what a sampled word tells of the rest.

    With the rest's mass q_R and p_R, b = log(q_R / p_R), and s = log q(x) - log p(x) - b for a sampled word x of the rest,
    else 0:

        value       v = sum_C q u + q_R b + s,  u = log q - log p
        gradient    q (u - v) for the candidates, q (b - v) for the rest, and s more for x
    """
    ids, log_p, sampled, sampled_log_p = teacher
    q, log_q = _softmax_(student, 1.0)
    u = log_q.gather(-1, ids).clamp_(min=LOG_FLOOR) - log_p.clamp(min=LOG_FLOOR)
    q_ids = q.gather(-1, ids)
    rest = q.scatter_(-1, ids, 0.0)
    q_rest, p_rest = rest.sum(-1, keepdim=True), 1.0 - log_p.exp().sum(-1, keepdim=True)
    b = q_rest.clamp(min=_LEAST).log() - p_rest.clamp(min=_LEAST).log()
    outside = (sampled != IGNORE_INDEX) & (ids != sampled).all(-1, keepdim=True)
    x = torch.where(outside, sampled, 0)
    of_x = log_q.gather(-1, x).clamp_(min=LOG_FLOOR) - sampled_log_p.clamp(min=LOG_FLOOR)
    s = torch.where(outside, of_x - b, 0.0)
    value = (q_ids * u).sum(-1, keepdim=True) + q_rest * b + s
    if weight is None:
        return value.squeeze(-1), None
    gradient = rest.mul_(b - value).scatter_(-1, ids, q_ids * (u - value)).scatter_add_(-1, x, s)
    return value.squeeze(-1), gradient.mul_(weight)


def _centred_(logits: Tensor, temperature: float) -> Tensor:
    """(logits - max) / T in place; the maximum goes first, so that large logits lose nothing to the division."""
    logits.clamp_(-_BOUND, _BOUND)
    return logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)


def _softmax_(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(probabilities, log-probabilities), the latter in the logits' own memory."""
    scaled = _centred_(logits, temperature)
    probabilities = scaled.exp()
    total = probabilities.sum(-1, keepdim=True)
    return probabilities.div_(total), scaled.sub_(total.log())


def _log_buckets(teacher: TopK, temperature: float) -> Tensor:
    """(rows, k + 1) log-probabilities at temperature T: those of the k words share what the tail leaves."""
    tail = teacher.tail_logmass.clamp(-_BOUND, 0.0)
    # log(1 - exp(tail)), in the form that keeps its digits
    left = torch.where(tail > -_LN_2, torch.log(-torch.expm1(tail)), torch.log1p(-torch.exp(tail)))
    shares = torch.log_softmax(teacher.logprobs.clamp(min=-_BOUND) / temperature, -1)
    return torch.cat((shares + left.clamp(min=-_BOUND), tail), -1)
