"""Which rows count, and how many there are over all micro-steps and ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

IGNORE_INDEX = -100


def mask_from_labels(labels: Tensor, *, shifted: bool) -> Tensor:
    """The rows whose next token is a label: (..., seq) bool, on the labels' device.

    Row i is the distribution after token i, so its label is the token that follows.

    Args:
        labels: (..., seq) integer, -100 where a token is to be ignored.
        shifted: False for labels aligned with input_ids, as HuggingFace models take them: row i belongs to
            labels[i + 1], and the last row to none. True where the data set has moved them already: row i belongs to
            labels[i].
    """
    return (_checked(labels) if shifted else targets_from_labels(labels)) != IGNORE_INDEX


def targets_from_labels(labels: Tensor) -> Tensor:
    """The next token of each row: (..., seq) int64, on the labels' device; -100 where it is to be ignored.

    Row i gets labels[i + 1], the last row -100. Labels that the data set has moved already are targets as they are.

    Args:
        labels: (..., seq) integer, aligned with input_ids, as HuggingFace models take them; -100 where a token is to be
            ignored.
    """
    targets = torch.full_like(_checked(labels), IGNORE_INDEX, dtype=torch.int64)
    targets[..., :-1] = labels[..., 1:]
    return targets


def _checked(labels: Tensor) -> Tensor:
    if labels.ndim == 0 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}; expected integer token IDs (..., seq).")
    return labels


def count_items(masks: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """What every loss of one optimizer step is divided by: the items of all micro-steps and ranks, over the ranks.

    DDP and FSDP average gradients over ranks. With this as `num_items` that average is the gradient of the mean over
    all items, however unevenly they are spread, and the mean of the ranks' summed losses is the mean loss.

    A collective: every rank of the group calls it, once per optimizer step, also a rank whose masks are empty.

    Args:
        masks: this rank's masks, one for each micro-step of the optimizer step.
        group: the ranks that average their gradients; None: all. Without torch.distributed there is one rank.

    Returns:
        () float64 on the masks' device (on the GPU under NCCL); never 0, so that a step without items is a loss of 0.
    """
    counts = [(mask != 0).sum() for mask in masks]
    total = torch.stack([count.to(counts[0].device) for count in counts]).sum() if counts else torch.zeros(())
    total = total.double()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size(group)
        if dist.get_backend(group) == "nccl":
            total = total.cuda()
        dist.all_reduce(total, group=group)
    return total.clamp(min=1.0) / ranks
