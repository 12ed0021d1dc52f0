"""What is logged: how long the rank waited, the share of the teacher's time that was hidden, and the loss's parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shmbridge import Bridge


@dataclass
class _Sums:
    """Sums over the replies since the last report."""

    kd: Tensor | float = 0.0  # of the tokens; on the training device, so that nothing waits for it
    ce: Tensor | float = 0.0
    tokens: Tensor | float = 0.0
    waited_s: float = 0.0
    teacher_s: float = 0.0


@dataclass
class Metrics:
    """Sums over training, and sums over evaluations, which interrupt it."""

    bridge: Bridge
    divergence: str  # the name of the KD metric
    _sums: dict[str, _Sums] = field(default_factory=lambda: {"train": _Sums(), "eval": _Sums()})
    _mode: str = "train"
    _waited_s: float = 0.0
    _teacher_s: float = 0.0

    def __post_init__(self) -> None:
        self._account()

    def add(self, mode: str, kd: Tensor, ce: Tensor, tokens: float | Tensor) -> None:
        """One reply's sums over its tokens, in the mode `train` or `eval`."""
        if mode != self._mode:
            self._account()
            self._mode = mode
        sums = self._sums[mode]
        sums.kd = sums.kd + kd
        sums.ce = sums.ce + ce
        sums.tokens = sums.tokens + tokens

    def report(self, mode: str, steps: int, accelerator: Any) -> dict[str, float]:
        """Means over the ranks and the tokens since the last report of `mode`; empty where there was no reply in any rank.

        A collective. `steps`: optimizer steps since then.
        """
        self._account()
        sums, self._sums[mode] = self._sums[mode], _Sums()
        found = [sums.kd, sums.ce, sums.tokens, sums.waited_s, sums.teacher_s, 1.0]
        local = torch.stack([torch.as_tensor(each, dtype=torch.float64, device="cpu") for each in found])
        if accelerator.num_processes > 1:
            local = accelerator.reduce(local.float().to(accelerator.device), "sum").double().cpu()
        kd, ce, tokens, waited_s, teacher_s, ranks = local.tolist()
        if not tokens:
            return {}
        report = {f"kd/{self.divergence}": kd / tokens, "kd/ce": ce / tokens}
        report["shmbridge/wait_s"] = waited_s / ranks / max(steps, 1)
        if teacher_s:
            report["shmbridge/hidden_share"] = min(1.0, max(0.0, 1.0 - waited_s / teacher_s))
        return report

    def _account(self) -> None:
        """Add what was waited and computed since the last call to the current mode."""
        stats = self.bridge.stats()
        sums = self._sums[self._mode]
        sums.waited_s += stats.waited_s - self._waited_s
        sums.teacher_s += stats.teacher_s - self._teacher_s
        self._waited_s, self._teacher_s = stats.waited_s, stats.teacher_s
