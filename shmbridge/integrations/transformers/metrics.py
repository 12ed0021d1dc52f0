"""What is logged: how long the rank waited, the share of the teacher's time that was hidden, and the loss's parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shmbridge import Bridge

Sums = dict[str, Tensor | float]
"""By name, since the last report. Those of tokens are on the training device, so that nothing waits for them."""

NAMES = (
    *("kd", "ce", "tokens"),  # of the replies
    *("waited_s", "teacher_s"),
    *("sampled_kd", "sampled_tokens", "samples"),  # of the replies to the student's own samples
    "generate_s",
)


@dataclass
class Metrics:
    """Sums over training, and sums over evaluations, which interrupt it."""

    bridge: Bridge
    divergence: str  # the name of the KD metric
    _sums: dict[str, Sums] = field(default_factory=lambda: {"train": _zero(), "eval": _zero()})
    _mode: str = "train"
    _waited_s: float = 0.0
    _teacher_s: float = 0.0

    def __post_init__(self) -> None:
        self._account()

    def add(self, mode: str, **sums: Tensor | float) -> None:
        """Add to the sums of NAMES in the mode `train` or `eval`."""
        if mode != self._mode:
            self._account()
            self._mode = mode
        for name, value in sums.items():
            self._sums[mode][name] = self._sums[mode][name] + value

    def report(self, mode: str, steps: int, accelerator: Any) -> dict[str, float]:
        """Means over ranks and tokens since the last report of `mode`; empty if no rank had a reply.

        A collective. `steps`: optimizer steps since then.
        """
        self._account()
        sums, self._sums[mode] = self._sums[mode], _zero()
        local = torch.stack([torch.as_tensor(sums[name], dtype=torch.float64, device="cpu") for name in NAMES])
        ranks = accelerator.num_processes
        if ranks > 1:
            local = accelerator.reduce(local.float().to(accelerator.device), "sum").double().cpu()
        total = dict(zip(NAMES, local.tolist(), strict=True))
        if not total["tokens"]:
            return {}
        report = {
            f"kd/{self.divergence}": total["kd"] / total["tokens"],
            "kd/ce": total["ce"] / total["tokens"],
            "shmbridge/wait_s": total["waited_s"] / ranks / max(steps, 1),
        }
        if total["teacher_s"]:
            report["shmbridge/hidden_share"] = min(1.0, max(0.0, 1.0 - total["waited_s"] / total["teacher_s"]))
        if total["sampled_tokens"]:
            report[f"on_policy/{self.divergence}"] = total["sampled_kd"] / total["sampled_tokens"]
            report["on_policy/new_tokens"] = total["sampled_tokens"] / total["samples"]
        if total["generate_s"]:
            report["on_policy/generate_s"] = total["generate_s"] / ranks / max(steps, 1)
        return report

    def _account(self) -> None:
        """Add the time waited and computed since the last call to the current mode."""
        stats = self.bridge.stats()
        sums = self._sums[self._mode]
        sums["waited_s"] += stats.waited_s - self._waited_s
        sums["teacher_s"] += stats.teacher_s - self._teacher_s
        self._waited_s, self._teacher_s = stats.waited_s, stats.teacher_s


def _zero() -> Sums:
    return dict.fromkeys(NAMES, 0.0)
