"""A student in training: forward, update, and the record of both."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from budget import Line, bar
from held_out import HeldOut, Score
from student import head_of, hidden_states
from torch.nn.parallel import DistributedDataParallel

WARMUP = 0.1  # share of the training


class Trainee:
    """One student under DDP with AdamW. Rank 0 writes its losses to `out`/NAME.jsonl, a line for each step; spaces of its name
    are dashes there."""

    def __init__(
        self, name: str, student: torch.nn.Module, lr: float, autocast: torch.autocast, out: Path, line: Line
    ) -> None:
        self.name = name
        self.student = student
        self.head = head_of(student)
        self.seconds = 0.0  # in training steps
        self.steps = 0
        self.tokens = 0  # of all ranks
        self.scores: list[tuple[int, Score]] = []  # (steps so far, held-out text)
        self._lr = lr
        self._autocast = autocast
        self._line = line
        losses = out / f"{name.replace(' ', '-')}.jsonl"
        self._file = open(losses, "w") if dist.get_rank() == 0 else None  # noqa: SIM115
        self._device = device = next(student.parameters()).device
        self._trunk = DistributedDataParallel(student.model, device_ids=[device] if device.type == "cuda" else None)
        self._weights = [weight for weight in student.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, seq, width) of token IDs (batch, seq), the begin of a step."""
        self._started = time.monotonic()
        self.tokens += input_ids.numel() * dist.get_world_size()
        with self._autocast:
            return hidden_states(self._trunk, input_ids.to(self._device))

    def learn(self, loss: torch.Tensor, share: float, note: str = "") -> None:
        """The rest of the step: backward and update, at the learning rate that belongs to `share` of the training."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * learning_rate(share)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        mean = loss.detach()
        dist.all_reduce(mean)
        mean = float(mean) / dist.get_world_size()
        self.steps += 1
        self.seconds += time.monotonic() - self._started
        if self._file:
            self._file.write(json.dumps({"step": self.steps, "seconds": self.seconds, "loss": mean}) + "\n")
            self._file.flush()
        self._line.show(
            f"{self.name:<10} {bar(share)} step {self.steps:<4} {self.tokens / self.seconds:>6.0f} tokens/s  "
            f"loss {mean:6.3f}{note}"
        )

    def score(self, text: HeldOut) -> None:
        self.scores.append((self.steps, text.score(self.student, self._autocast)))


def learning_rate(share: float) -> float:
    """Linear warm-up, then a cosine down to a tenth; a factor of --lr."""
    if share < WARMUP:
        return max(0.01, share / WARMUP)
    return 0.55 + 0.45 * math.cos(math.pi * (share - WARMUP) / (1 - WARMUP))
