"""A rank and the teacher of the benchmark `trainer`: `python -m benchmarks.trainee OUT CASES` under the launcher.

The device of the teacher takes as many milliseconds for a forward as the largest token ID says. The student's takes a third of
`student_s` from the embedding to the output head, and two thirds for the backward; what the small model computes is within it.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.device import sleep_until
from benchmarks.group import FORWARD_SHARE

VOCAB, TOKENS, EPOCHS = 512, 8, 2


class Turn(NamedTuple):
    """What a rank saw of one case; in seconds, of steps that are not the first of their epoch."""

    steps: list[float]
    first: float
    """The first step of an epoch takes so much longer, in the mean."""


class SimulatedTeacher:
    vocab_size = VOCAB

    def __call__(self, batch: Any) -> dict[str, torch.Tensor]:
        deadline = time.monotonic() + int(batch.input_ids.max()) / 1000
        logits = torch.zeros(*batch.input_ids.shape, VOCAB)
        sleep_until(deadline)
        return {"logits": logits}


def build(settings: Any) -> SimulatedTeacher:
    return SimulatedTeacher()


class _Clock:
    """The student's device: when its forward and its backward began."""

    forward_at = backward_at = 0.0


class _Sleep(torch.autograd.Function):
    """In the forward, sleep to the end of the forward's time; in the backward, begin its time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, clock: _Clock, student_s: float) -> torch.Tensor:
        ctx.clock = clock
        sleep_until(clock.forward_at + FORWARD_SHARE * student_s)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.clock.backward_at = time.monotonic()
        return gradient, None, None


class _SleepBack(torch.autograd.Function):
    """In the forward, begin its time; in the backward, sleep to the end of the backward's time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, clock: _Clock, student_s: float) -> torch.Tensor:
        ctx.clock, ctx.student_s = clock, student_s
        clock.forward_at = time.monotonic()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        sleep_until(ctx.clock.backward_at + (1 - FORWARD_SHARE) * ctx.student_s)
        return gradient, None, None


def student(student_s: float) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    clock = _Clock()
    model.model.embed_tokens.register_forward_hook(lambda *given: _SleepBack.apply(given[-1], clock, student_s))
    model.model.norm.register_forward_hook(lambda *given: _Sleep.apply(given[-1], clock, student_s))
    return model


class _Times(TrainerCallback):
    def __init__(self) -> None:
        self.epochs: list[list[float]] = []  # the begin of each, and the end of each of its steps

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.epochs.append([time.monotonic()])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs[-1].append(time.monotonic())

    def turn(self) -> Turn:
        spans = [[after - before for before, after in itertools.pairwise(ends)] for ends in self.epochs]
        steps = [span for epoch in spans for span in epoch[1:]]
        return Turn(steps, statistics.mean(epoch[0] for epoch in spans) - statistics.mean(steps))


def measure(out: Path, teacher_ms: int, student_ms: float, accumulation: int, steps: int, distils: bool) -> Turn:
    """Two epochs of a case."""
    torch.distributed.is_initialized() and torch.distributed.barrier()
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=EPOCHS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    row = {"input_ids": [teacher_ms] * TOKENS, "labels": [teacher_ms] * TOKENS}
    given: dict[str, Any] = {"model": student(student_ms / 1000), "args": arguments}
    given["train_dataset"] = [row] * (steps * accumulation * arguments.world_size)
    if distils:
        from shmbridge.integrations.transformers import DistillationTrainer

        trainer: Trainer = DistillationTrainer(**given)
    else:
        trainer = Trainer(**given)
    times = _Times()
    trainer.add_callback(times)
    trainer.train()
    return times.turn()


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    turns = [measure(out, **case) for case in cases]
    rank = torch.distributed.get_rank()
    (out / f"rank-{rank}.json").write_text(json.dumps(turns))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
