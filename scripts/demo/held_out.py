"""Text that no student was trained on, and how well a student predicts it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from student import head_of, hidden_states

import shmbridge
from shmbridge.losses import LazyLogits, forward_kl


class Score(NamedTuple):
    kl: float  # KL(teacher || student), nats per token
    perplexity: float  # of the next token of the text


class HeldOut:
    """The held-out rows of this rank. The teacher sees them once; its hidden states are kept for every later score."""

    def __init__(self, rows: torch.Tensor, bridge: shmbridge.Bridge, device: torch.device) -> None:
        """`rows`: (rows, seq) int64 on the CPU, as many on every rank."""
        self._head = bridge.head
        self._rows = [
            (row.to(device), pending.copy().hidden.to(device)) for row, pending in bridge.prefetch(rows.split(1))
        ]
        self._device = device

    def score(self, student: torch.nn.Module, autocast: torch.autocast) -> Score:
        """A collective: the mean over the rows of all ranks."""
        head = head_of(student)
        student.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for input_ids, hidden in self._rows:
                with autocast:
                    logits = head(hidden_states(student.model, input_ids))
                sums[0] += forward_kl(logits, LazyLogits(hidden, self._head))
                sums[1] += cross_entropy(logits, input_ids)
        student.train()
        kl, loss = self._mean(sums)
        return Score(kl, math.exp(loss))

    def teacher(self) -> Score:
        """The teacher's own. A collective."""
        losses = [cross_entropy(self._head(hidden), input_ids) for input_ids, hidden in self._rows]
        (loss,) = self._mean(torch.stack(losses).sum(0, keepdim=True).double())
        return Score(0.0, math.exp(loss))

    def _mean(self, sums: torch.Tensor) -> list[float]:
        dist.all_reduce(sums)
        return (sums / (len(self._rows) * dist.get_world_size())).tolist()


def cross_entropy(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Of the next tokens, in nats per token: row i of the logits (batch, seq, vocab) predicts token i + 1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten().to(logits.device))
