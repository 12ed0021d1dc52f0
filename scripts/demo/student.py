"""A student that is cut out of its teacher; how it is trained, and how well it predicts text that nobody trained on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import shmbridge
from shmbridge.losses import Head, LazyLogits, forward_kl

WARMUP = 0.1  # share of the training


def cut(base: str, layers: int) -> torch.nn.Module:
    """Every n-th layer of the model `base`, the first and the last among them, as in DistilBERT (Sanh et al. 2019).

    The result is in float32. Its embeddings and its output head are the teacher's, and frozen. Such a cut predicts worse than
    a uniform guess over the vocabulary, and it learns fast. Any decoder of Llama's shape in transformers can be cut.

    Raises:
        SystemExit: `base` has fewer layers than `layers`.
    """
    student = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    depth = len(student.model.layers)
    if layers > depth:
        raise SystemExit(f"--layers is {layers}, but {base} has {depth} layers; give --layers {depth} or fewer")
    kept = torch.linspace(0, depth - 1, layers).round().long().tolist()
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in kept)
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i  # of its keys and values in generate's cache
    student.config.num_hidden_layers = layers
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in kept]
    student.get_input_embeddings().requires_grad_(False)
    student.get_output_embeddings().requires_grad_(False)
    return student


def hidden_states(trunk: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """What the output head is given: (batch, seq, width)."""
    return trunk(input_ids=input_ids, use_cache=False).last_hidden_state


def head_of(student: torch.nn.Module) -> Head:
    module = student.get_output_embeddings()
    return Head(module.weight, module.bias)


def cross_entropy(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Of the next tokens, in nats per token: row i of the logits (batch, seq, vocab) predicts token i + 1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten().to(logits.device))


class Score(NamedTuple):
    kl: float  # KL(teacher || student), nats per token
    perplexity: float  # of the next token of the text


class HeldOut:
    """The held-out rows of this rank. The teacher sees them once; its hidden states are kept for every later score."""

    def __init__(
        self, rows: torch.Tensor, bridge: shmbridge.Bridge, device: torch.device, autocast: torch.autocast
    ) -> None:
        """`rows`: (rows, seq) int64 on the CPU, as many on every rank."""
        self.rows = rows
        self._head, self._autocast = bridge.head, autocast
        self._answers = [
            (ids.to(device), answer.copy().hidden.to(device)) for ids, answer in bridge.prefetch(rows.split(1))
        ]

    @torch.no_grad()
    def score(self, student: torch.nn.Module) -> Score:
        """A collective: the mean over the rows of all ranks."""
        head, scores = head_of(student), []
        student.eval()
        for input_ids, hidden in self._answers:
            with self._autocast:
                logits = head(hidden_states(student.model, input_ids))
            kl = forward_kl(logits, LazyLogits(hidden, self._head))
            scores.append(torch.stack((kl, cross_entropy(logits, input_ids))))
        student.train()
        return self._mean(scores)

    def teacher(self) -> Score:
        """The teacher's own. A collective."""
        losses = (cross_entropy(self._head(hidden), input_ids) for input_ids, hidden in self._answers)
        return self._mean([torch.stack((torch.zeros_like(loss), loss)) for loss in losses])

    def _mean(self, scores: list[torch.Tensor]) -> Score:
        mean = torch.stack(scores).double().mean(0)
        dist.all_reduce(mean)
        kl, loss = (mean / dist.get_world_size()).tolist()
        return Score(kl, math.exp(loss))


class Budget:
    """A training time, the same on all ranks: rank 0 looks at its clock and tells the others.

    The number of steps is not known beforehand, so a schedule follows the share of the time that is used.
    """

    def __init__(self, minutes: float, device: torch.device) -> None:
        self._seconds = 60 * minutes
        self._device = device
        self._used = 0.0

    def steps(self, until: float) -> Iterator[float]:
        """The share of the time that is used before each step, from 0, as long as it is below `until`.

        A collective in each step. What happens between two calls of this method is not counted.
        """
        while True:
            share = torch.tensor(self._used / self._seconds, dtype=torch.float64, device=self._device)
            dist.broadcast(share, src=0)
            if share >= until:
                return
            started = time.monotonic()
            yield float(share)
            self._used += time.monotonic() - started


class Trainee:
    """One student under DDP with AdamW. Rank 0 writes its losses to `out`/NAME.jsonl, a line for each step (spaces of its name
    are dashes there), and shows its progress: in a terminal in one line, else every five seconds."""

    def __init__(
        self, name: str, student: torch.nn.Module, lr: float, autocast: torch.autocast, out: Path, *, terminal: bool
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
        self._terminal = terminal
        self._shown = 0.0
        self._file = (out / f"{name.replace(' ', '-')}.jsonl").open("w") if dist.get_rank() == 0 else None
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
        self.steps += 1
        self.seconds += time.monotonic() - self._started
        if self._file:
            self._tell(float(mean) / dist.get_world_size(), share, note)

    def score(self, text: HeldOut) -> None:
        self.scores.append((self.steps, text.score(self.student)))

    def _tell(self, loss: float, share: float, note: str) -> None:
        self._file.write(json.dumps({"step": self.steps, "seconds": self.seconds, "loss": loss}) + "\n")
        self._file.flush()
        if time.monotonic() - self._shown < (0.5 if self._terminal else 5.0):
            return
        self._shown = time.monotonic()
        full = round(min(1.0, share) * 8)
        bar, speed = "█" * full + "░" * (8 - full), self.tokens / self.seconds
        # With the prefix of the launcher and a note of 13 characters this fits a terminal of 80 columns.
        line = f"{self.name:<10} {bar} step {self.steps:<4} {speed:>6.0f} tok/s  loss {loss:6.3f}{note}"
        print(f"\r{line}" if self._terminal else line, end="" if self._terminal else "\n", flush=True)


def learning_rate(share: float) -> float:
    """Linear warm-up, then a cosine down to a tenth; a factor of --lr."""
    if share < WARMUP:
        return max(0.01, share / WARMUP)
    return 0.55 + 0.45 * math.cos(math.pi * (share - WARMUP) / (1 - WARMUP))
