"""The checks that losses make before they compute: shapes, vocabularies, dtypes, settings, word IDs, gaps in a
stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from shmbridge.losses.chunked import Piece
from shmbridge.losses.divergence import TopK
from shmbridge.losses.labels import IGNORE_INDEX
from shmbridge.losses.sources import LazyLogits, Source, plain, shape


def pieces(
    teacher: Source | Iterable[Piece], lead: list[int], vocab: int, mask: Tensor | None, kind: Any
) -> Iterator[Piece]:
    """The teacher's rows as a stream, checked: every position once and in order."""
    total = math.prod(lead)
    if isinstance(teacher, (Tensor, LazyLogits, TopK)):
        _check_teacher(teacher, [lead, [total]], vocab, kind)
        _check_ids(teacher, vocab, mask)
        yield slice(0, total), teacher
        return
    reached = 0
    for rows, piece in teacher:
        if rows.start != reached or not reached <= rows.stop <= total or rows.step not in (None, 1):
            raise ValueError(f"the stream gave {rows} after {reached} of {total} rows; expected slice({reached}, ...).")
        count = rows.stop - rows.start
        _check_teacher(piece, [[count], [1, count]], vocab, kind)
        _check_ids(piece, vocab, None if mask is None else mask[rows])
        yield rows, piece
        reached = rows.stop
    if reached != total:
        raise ValueError(f"the stream ended after {reached} of {total} rows; a stream can be read once only.")


def check_settings(
    num_items: float | Tensor | None, chunk_rows: int | None, *, temperature: float = 1.0, beta: float = 0.5
) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a number above 0.")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; expected 0 (forward KL) to 1 (reverse KL).")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items is {tuple(num_items.shape)}; expected one number, such as count_items gives.")
    if not isinstance(num_items, Tensor) and num_items is not None and not 0.0 < num_items < math.inf:
        raise ValueError(f"num_items is {num_items}; expected a number above 0, or None for the rows of this call.")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; expected 1 or more, or None for what CHUNK_BYTES allow.")


def check_weights(kd_weight: float, ce_weight: float, teacher: object, targets: Tensor | None) -> None:
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight}; expected 0 or a number above it.")
    if ce_weight and targets is None:
        raise ValueError(
            f"ce_weight is {ce_weight} and targets are None; expected the next token of each of the student's rows, "
            "such as targets_from_labels(labels) gives."
        )
    if not ce_weight and (teacher is None or not kd_weight):
        raise ValueError(
            f"kd_weight is {kd_weight} and ce_weight {ce_weight}, {'without' if teacher is None else 'with'} a teacher: "
            "no term would give a gradient. Set ce_weight above 0, or kd_weight with a teacher."
        )


def check_student(student: Tensor | LazyLogits, inplace: bool) -> tuple[int, ...]:
    """The student's shape (..., vocab)."""
    if isinstance(student, LazyLogits):
        _check_projection("student", student)
        if inplace:
            raise ValueError("inplace is for a student given as logits; LazyLogits has none to overwrite.")
    found = shape(student)
    dtype = student.hidden.dtype if isinstance(student, LazyLogits) else student.dtype
    if len(found) < 2 or not dtype.is_floating_point:
        raise ValueError(f"the student is {found} {dtype}; expected float logits (batch, seq, vocab) or (rows, vocab).")
    return found


def _check_projection(side: str, source: LazyLogits) -> None:
    hidden, weight, bias = source.hidden, source.head.weight, source.head.bias
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the {side}'s hidden states are {tuple(hidden.shape)} and its head's weight {tuple(weight.shape)}; "
            "expected (..., dim) and (vocab, dim)."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the {side}'s head has a bias {tuple(bias.shape)}; expected ({weight.shape[0]},).")


def check_mask(mask: Tensor, lead: list[int]) -> Tensor:
    """(rows,) bool."""
    if list(mask.shape) not in (lead, [math.prod(lead)]):
        raise ValueError(f"the mask is {tuple(mask.shape)}; expected {tuple(lead)}, the student's rows.")
    if mask.is_floating_point():
        raise ValueError(f"the mask is {mask.dtype}; expected bool, or integers of which 0 leaves a row out.")
    return plain(mask).reshape(-1) != 0


def check_words(what: str, words: Tensor, lead: list[int], vocab: int) -> Tensor:
    """One for each row, or IGNORE_INDEX: (rows,) int64."""
    if list(words.shape) not in (lead, [math.prod(lead)]):
        raise ValueError(f"{what} are {tuple(words.shape)}; expected {tuple(lead)}, the student's rows.")
    if words.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{what} are {words.dtype}; expected int64 token IDs.")
    words = plain(words).reshape(-1)
    if words.numel():
        low, high = (int(bound) for bound in torch.aminmax(words.masked_fill(words == IGNORE_INDEX, 0)))
        if low < 0 or high >= vocab:
            raise ValueError(
                f"{what} run from {low} to {high}; expected 0 to {vocab - 1}, the student's vocabulary, or "
                f"{IGNORE_INDEX} for a row without one."
            )
    return words.long()


def check_candidates(candidates: Tensor, logprobs: Tensor, lead: list[int], vocab: int, mask: Tensor | None) -> None:
    if candidates.ndim < 2 or candidates.shape != logprobs.shape:
        raise ValueError(
            f"the candidates are {tuple(candidates.shape)} and candidate_logprobs {tuple(logprobs.shape)}; expected "
            "(..., c) both."
        )
    *found, c = candidates.shape
    _check_lead("the candidates", found, [lead, [math.prod(lead)]])
    if not 1 <= c <= vocab:
        raise ValueError(f"a row has {c} candidates; expected 1 to {vocab}, the student's vocabulary.")
    if candidates.dtype not in (torch.int32, torch.int64) or not logprobs.is_floating_point():
        raise ValueError(
            f"the candidates are {candidates.dtype} and candidate_logprobs {logprobs.dtype}; expected int64 and a float "
            "dtype."
        )
    ids = plain(candidates).reshape(math.prod(lead), c)
    ids = ids if mask is None else ids[mask.to(ids.device)]
    if not ids.numel():
        return
    ids = ids.sort(-1).values
    low, high = int(ids[:, 0].min()), int(ids[:, -1].max())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"the candidates run from {low} to {high}; expected 0 to {vocab - 1}, the student's vocabulary."
        )
    if (ids.diff() == 0).any():
        raise ValueError("a row has a candidate twice; expected different words, such as top_candidates gives.")


def _check_teacher(teacher: Source, leads: list[list[int]], vocab: int, kind: Any) -> None:
    if not isinstance(teacher, kind):
        wanted = "a TopK" if kind is TopK else "logits or LazyLogits"
        raise ValueError(f"the teacher's rows are a {type(teacher).__name__}; expected {wanted} for this loss.")
    if isinstance(teacher, TopK):
        _check_topk(teacher, leads, vocab)
        return
    if isinstance(teacher, LazyLogits):
        _check_projection("teacher", teacher)
    elif not teacher.is_floating_point():
        raise ValueError(f"the teacher's logits are {teacher.dtype}; expected a float dtype.")
    *lead, words = shape(teacher)
    _check_lead("the teacher's rows", lead, leads)
    if words != vocab:
        remedy = (
            f"Set payload.vocab to {vocab}, which trims a teacher's padded vocabulary."
            if words > vocab
            else f"Trim the student's padded words: logits[..., :{words}], or the head's weight[:{words}]."
        )
        raise ValueError(f"the teacher has {words} words and the student {vocab}; expected the same. {remedy}")


def _check_topk(teacher: TopK, leads: list[list[int]], vocab: int) -> None:
    logprobs, ids, tail = teacher
    if logprobs.ndim < 2 or ids.shape != logprobs.shape or tail.shape != logprobs.shape[:-1]:
        raise ValueError(
            f"topk_logprobs are {tuple(logprobs.shape)}, topk_ids {tuple(ids.shape)} and tail_logmass "
            f"{tuple(tail.shape)}; expected (..., k), (..., k) and (...): of a reply's tail_logmass, the column of "
            "this loss's temperature."
        )
    _check_lead("topk_logprobs", list(logprobs.shape[:-1]), leads)
    if not 1 <= logprobs.shape[-1] <= vocab:
        raise ValueError(f"k is {logprobs.shape[-1]}; expected 1 to {vocab}, the student's vocabulary.")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids are {ids.dtype}; expected int32 or int64.")
    if not (logprobs.is_floating_point() and tail.is_floating_point()):
        raise ValueError(f"topk_logprobs are {logprobs.dtype} and tail_logmass {tail.dtype}; expected a float dtype.")


def _check_ids(teacher: Source, vocab: int, mask: Tensor | None) -> None:
    """An ID outside the vocabulary would be a device-side assert on a GPU. Rows that do not count may hold anything."""
    if not isinstance(teacher, TopK) or not teacher.ids.numel():
        return
    ids = plain(teacher.ids)
    if mask is not None:
        ids = ids.masked_fill(~mask.to(ids.device).view(*ids.shape[:-1], 1), 0)
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocab:
        raise ValueError(
            f"topk_ids run from {low} to {high}; expected 0 to {vocab - 1}, the student's vocabulary. Set "
            f"payload.vocab to {vocab} if the teacher's is padded."
        )


def _check_lead(what: str, lead: list[int], leads: list[list[int]]) -> None:
    if lead not in leads:
        raise ValueError(f"{what} have the leading axes {tuple(lead)}; expected {tuple(leads[0])}, the student's rows.")
