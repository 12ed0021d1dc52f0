"""Fingerprints of tensors and tokenizers, which the parity check compares.

The fingerprint of an output is, for each position (or row), its projection onto a fixed vector, and the count of
entries that are not finite. A wrong word, a shift by one position, a temperature applied twice or an -inf in the
padding all change it; rounding changes it in proportion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from shmbridge.output_spec import OutputSpec, Tokens

_GOLDEN = 2.399963229728653  # radians, the golden angle: the directions cos(i * angle) never repeat


def of(spec: OutputSpec, tensor: torch.Tensor) -> tuple[float, ...]:
    """One number for each position of `tensor` (for each row if it has no sequence axis), then the count of entries
    that are not finite. For integers, which ties may reorder, the number is the first entry of the position."""
    width = spec.item_width
    flat = tensor.detach().cpu().reshape(-1, width).double()
    finite = flat.isfinite()
    if not tensor.dtype.is_floating_point:
        return (*flat[:, 0].tolist(), 0.0)
    directions = torch.cos(torch.arange(1, width + 1, dtype=torch.float64) * _GOLDEN)
    values = torch.where(finite, flat, 0.0) @ directions
    return (*(float(f"{value:.6g}") for value in values.tolist()), float((~finite).sum()))


def differ(found: tuple[float, ...], expected: tuple[float, ...], tolerance: float) -> str | None:
    """A text that tells how two fingerprints of one output differ by more than `tolerance` (relative to the largest
    number), or None."""
    *values, odd = found
    *wanted, odd_wanted = expected
    if len(values) != len(wanted):
        return f"{len(values)} positions instead of {len(wanted)}"
    if odd != odd_wanted:
        return f"{odd:.0f} entries that are not finite, instead of {odd_wanted:.0f}"
    scale = max((abs(value) for value in wanted), default=0.0) or 1.0
    if _far(values, wanted, scale) <= tolerance:
        return None
    for shift in (1, -1):
        if _most_agree(_shifted(values, shift), _shifted(wanted, -shift), scale * tolerance):
            return f"shifted by one position: row i holds what row i{-shift:+d} should"
    ratio = sum(a * b for a, b in zip(values, wanted, strict=True)) / (sum(b * b for b in wanted) or 1.0)
    if ratio and _far([value / ratio for value in values], wanted, scale) <= tolerance:
        return f"{ratio:.3g} times what the model gives: a temperature or a scale is applied twice"
    return f"off by {_far(values, wanted, scale):.1%} of its range"


def of_tokenizer(tokenizer: Any) -> Tokens:
    """A tokenizer's table. `tokenizer` has the transformers library's get_vocab()."""
    table: Mapping[str, int] = tokenizer.get_vocab()
    digest = hashlib.sha256()
    for token, index in sorted(table.items(), key=lambda entry: (entry[1], entry[0])):
        digest.update(f"{index}\0{token}\0".encode(errors="surrogatepass"))
    return Tokens(max(table.values(), default=-1) + 1, digest.hexdigest())


def _far(values: list[float], wanted: list[float], scale: float) -> float:
    return max((abs(a - b) for a, b in zip(values, wanted, strict=True)), default=0.0) / scale


def _most_agree(values: list[float], wanted: list[float], within: float) -> bool:
    """Whether at least seven in eight agree; at the ends of rows shifted values do not."""
    near = sum(abs(a - b) <= within for a, b in zip(values, wanted, strict=True))
    return len(values) >= 3 and near >= 7 / 8 * len(values)


def _shifted(values: list[float], by: int) -> list[float]:
    return values[by:] if by > 0 else values[:by]
