"""What a rank may submit: token IDs and a mask, as contiguous arrays once every limit was checked.

An ID outside the vocabulary would be a device-side assert that kills the teacher, so it is refused here, in the rank that
sent it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shmbridge.errors import RequestRefused
from shmbridge.offer import Offer
from shmbridge.session import Shape

IntArray = np.ndarray[Any, np.dtype[Any]]

_UNSIGNED = {np.dtype(np.int64): np.uint64, np.dtype(np.int32): np.uint32}


def check_ids(input_ids: torch.Tensor | IntArray, agreed: Offer, shape: Shape) -> IntArray:
    """The IDs as a contiguous array, once every limit was checked. Raises RequestRefused."""
    ids = _to_array("input_ids", input_ids)
    unsigned = _UNSIGNED.get(ids.dtype)
    if unsigned is None:
        raise RequestRefused(f"input_ids has dtype {ids.dtype}; expected int32 or int64.")
    if ids.ndim != 2:
        raise RequestRefused(f"input_ids has shape {ids.shape}; expected (batch, seq).")
    if ids.size == 0:
        raise RequestRefused(f"input_ids is empty, shape {ids.shape}; skip the exchange for an empty batch.")
    batch, seq = ids.shape
    if ids.size > shape.max_tokens:
        raise RequestRefused(
            f"input_ids has {batch} x {seq} = {ids.size} tokens; a request takes {shape.max_tokens}. "
            f"Raise ring.max_tokens (it sizes the reply memory), or submit fewer rows at a time."
        )
    if batch > shape.max_batch:
        raise RequestRefused(f"input_ids has {batch} rows; a request takes {shape.max_batch}. Raise ring.max_batch.")
    if agreed.max_seq is not None and seq > agreed.max_seq:
        raise RequestRefused(
            f"input_ids is {seq} tokens long; the teacher {agreed.model} has {agreed.max_seq} positions."
        )
    if not ids.flags.c_contiguous:
        ids = np.ascontiguousarray(ids)
    limit = agreed.vocab_size or 2**31
    if np.maximum.reduce(ids.view(unsigned), axis=None) >= limit:  # one pass: a negative ID is a huge unsigned one
        row, column = np.argwhere(ids.view(unsigned) >= limit)[0]
        raise RequestRefused(
            f"input_ids[{row}, {column}] is {ids[row, column]}; the teacher {agreed.model} takes 0 to {limit - 1}. "
            "Use the teacher's tokenizer, or mask positions such as -100 out before you submit."
        )
    return ids


def check_mask(attention_mask: torch.Tensor | IntArray, ids: IntArray) -> IntArray:
    """The mask as contiguous uint8. Raises RequestRefused."""
    mask = _to_array("attention_mask", attention_mask)
    if mask.shape != ids.shape:
        raise RequestRefused(f"attention_mask has shape {mask.shape}; expected that of input_ids, {ids.shape}.")
    if not ((mask == 0) | (mask == 1)).all():
        raise RequestRefused("attention_mask holds values other than 0 and 1; expected 1 for a token, 0 for padding.")
    return np.ascontiguousarray(mask, dtype=np.uint8)


def _to_array(name: str, value: torch.Tensor | IntArray) -> IntArray:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise RequestRefused(
                f"{name} is on {value.device}; submit the CPU tensor that the loader gave, before .to(device): fetching it "
                "from the GPU would make the training stream wait."
            )
        try:
            return value.detach().numpy() if value.requires_grad else value.numpy()
        except (TypeError, RuntimeError) as error:
            raise RequestRefused(f"{name} is a tensor of {value.dtype}, {value.layout}: {error}.") from None
    if isinstance(value, np.ndarray):
        return value
    raise RequestRefused(f"{name} is a {type(value).__name__}; expected a torch.Tensor or a NumPy array.")
