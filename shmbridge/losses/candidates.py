"""Reverse KL on words that the student proposes, for teachers that give the log-probabilities of a few words alone."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from shmbridge.losses import divergence
from shmbridge.losses.checks import check_candidates, check_mask, check_settings, check_student, check_words
from shmbridge.losses.chunked import Term, default_chunk_rows, run
from shmbridge.losses.divergence import Candidates
from shmbridge.losses.labels import IGNORE_INDEX
from shmbridge.losses.sources import LazyLogits, chunks, device_of, plain, read, ready


def candidate_reverse_kl(
    student: Tensor | LazyLogits,
    candidates: Tensor,
    candidate_logprobs: Tensor,
    *,
    sampled: Tensor | None = None,
    sampled_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """KL(student || teacher) at temperature 1, exact on the candidates, estimated elsewhere from a sampled token.

    The rest of a row is every word that is not one of its candidates. Averaged over what `sampled` could have been, the
    value and the gradient are those of reverse KL over the whole vocabulary, provided that

    - each sampled token was drawn from the student's whole softmax at temperature 1, without top-k or top-p, with the
      parameters that the loss is computed with, and
    - the candidates were chosen without looking at the sampled token, as `top_candidates` chooses them.

    A row whose sampled token is a candidate, or -100, gives KL over c + 1 buckets: the candidates, and the rest as one.
    Without `sampled` every row does. That alone is biased: it is below reverse KL by q_R KL(q | rest || p | rest),
    where q_R is the student's mass of the rest and q | rest, p | rest are the two distributions within it.

    The sampled token adds its log-ratio log q(x) - log p(x) minus a baseline, the log-ratio of the two masses of the
    rest. Any baseline that does not depend on the sampled token leaves value and gradient unbiased. This one leaves no
    variance where student and teacher agree on the proportions within the rest. docs/losses.md has the derivation.

    The gradient for one sampled token is not the derivative of the value for that token; only their means belong
    together. The value of a row may be negative.

    Args:
        student: logits (..., vocab) of at least two dimensions, or LazyLogits; float64, float32, bfloat16 or float16.
        candidates: (..., c) int64 or int32; words of each row, none twice.
        candidate_logprobs: (..., c) float; the teacher's log-probabilities of them under its whole softmax at
            temperature 1, a reply's `candidate_logprobs`.
        sampled: (...) int64 or int32; the token that the student drew after each row, -100: none.
        sampled_logprobs: (...) float; the teacher's log-probabilities of these, a reply's `logprobs`.
        mask, num_items, inplace, chunk_rows: as in `distillation_loss`.

    Returns:
        A scalar, float64 for float64 logits and float32 otherwise.

    Raises:
        ValueError: shapes, vocabularies, dtypes or a setting do not fit, or a word is a row's candidate twice.
    """
    return _loss(
        student, candidates, candidate_logprobs, sampled, sampled_logprobs, mask, num_items, inplace, chunk_rows
    )


def _compute(
    student: Tensor | LazyLogits,
    candidates: Tensor,
    candidate_logprobs: Tensor,
    sampled: Tensor | None,
    sampled_logprobs: Tensor | None,
    mask: Tensor | None,
    num_items: float | Tensor | None,
    inplace: bool,
    chunk_rows: int | None,
) -> Tensor:
    check_settings(num_items, chunk_rows)
    *lead, vocab = check_student(student, inplace)
    rows = prod(lead)
    counted = None if mask is None else check_mask(mask, lead).to(device_of(student))
    check_candidates(candidates, candidate_logprobs, lead, vocab, counted)
    if (sampled is None) != (sampled_logprobs is None):
        given, missing = (
            ("sampled", "sampled_logprobs") if sampled_logprobs is None else ("sampled_logprobs", "sampled")
        )
        raise ValueError(f"{given} is given and {missing} is None; expected both or none.")
    if sampled is None or sampled_logprobs is None:
        words = torch.full((rows,), IGNORE_INDEX)
        of_words = torch.zeros(rows)
    else:
        words = check_words("the sampled tokens", sampled, lead, vocab)
        if sampled_logprobs.shape != sampled.shape or not sampled_logprobs.is_floating_point():
            raise ValueError(
                f"sampled_logprobs are {tuple(sampled_logprobs.shape)} {sampled_logprobs.dtype}; expected "
                f"{tuple(sampled.shape)}, a float for each sampled token."
            )
        of_words = plain(sampled_logprobs).reshape(-1)
    teacher = Candidates(candidates, candidate_logprobs, words, of_words)
    term = Term(divergence.candidate_reverse_kl, 1.0, counted, num_items)
    return run(student, [term], iter([(slice(0, rows), [teacher])]), inplace=inplace, chunk_rows=chunk_rows)[0]


_loss: Callable[..., Tensor] = torch.compiler.disable(_compute)  # type: ignore[no-untyped-call]


@torch.no_grad()
def top_candidates(student: Tensor | LazyLogits, c: int, *, chunk_rows: int | None = None) -> Tensor:
    """The c most likely words of each of the student's rows: (..., c) int64. The logits of LazyLogits are computed a
    few rows at a time.

    Raises:
        ValueError: c is not within the vocabulary, or the student is not as in `candidate_reverse_kl`.
    """
    check_settings(None, chunk_rows)
    *lead, vocab = check_student(student, inplace=False)
    if not 1 <= c <= vocab:
        raise ValueError(f"c is {c}; expected 1 to {vocab}, the student's vocabulary.")
    dtype, device, rows = torch.float32, device_of(student), prod(lead)
    source = ready(student, dtype, device)
    words = torch.empty((rows, c), dtype=torch.int64, device=device)
    for part, _ in chunks(None, slice(0, rows), chunk_rows or default_chunk_rows(vocab, dtype, None)):
        logits = read(source, part, dtype, device)
        assert isinstance(logits, Tensor)
        words[part] = logits.topk(c, -1).indices
    return words.view(*lead, c)
