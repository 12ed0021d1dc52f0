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
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.group import FORWARD_SHARE
from benchmarks.processes import sleep_until

VOCAB, TOKENS, EPOCHS = 512, 8, 2


def build(settings: Any) -> Any:
    """The teacher."""

    def forward(batch: Any) -> dict[str, torch.Tensor]:
        deadline = time.monotonic() + int(batch.input_ids.max()) / 1000
        logits = torch.zeros(*batch.input_ids.shape, VOCAB)
        sleep_until(deadline)
        return {"logits": logits}

    forward.vocab_size = VOCAB
    return forward


def student(student_s: float) -> LlamaForCausalLM:
    """A small model on a simulated device: it sleeps before the output head, and where the gradient reaches the embedding."""
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model, began = LlamaForCausalLM(shape), {"forward": 0.0, "backward": 0.0}

    def embedded(module: Any, inputs: Any, hidden: torch.Tensor) -> None:
        began["forward"] = time.monotonic()
        if hidden.requires_grad:  # not where Trainer checks a teacher's replies
            hidden.register_hook(lambda _: sleep_until(began["backward"] + (1 - FORWARD_SHARE) * student_s))

    def normed(module: Any, inputs: Any, hidden: torch.Tensor) -> None:
        sleep_until(began["forward"] + FORWARD_SHARE * student_s)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: began.update(backward=time.monotonic()))

    model.model.embed_tokens.register_forward_hook(embedded)
    model.model.norm.register_forward_hook(normed)
    return model


class Times(TrainerCallback):
    """When each epoch began and each of its steps ended."""

    def __init__(self) -> None:
        self.epochs: list[list[float]] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.epochs.append([time.monotonic()])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs[-1].append(time.monotonic())


def measure(
    out: Path, teacher_ms: int, student_ms: float, accumulation: int, steps: int, distils: bool
) -> tuple[list[float], float]:
    """The fields of benchmarks.trainer.Turn, of two epochs of a case."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
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
    trainer_class: Any = Trainer
    if distils:
        from shmbridge.integrations.transformers import DistillationTrainer as trainer_class  # noqa: N813
    row = {"input_ids": [teacher_ms] * TOKENS, "labels": [teacher_ms] * TOKENS}
    dataset, times = [row] * (steps * accumulation * arguments.world_size), Times()
    trainer_class(student(student_ms / 1000), arguments, train_dataset=dataset, callbacks=[times]).train()
    spans = [[after - before for before, after in itertools.pairwise(ends)] for ends in times.epochs]
    later = [span for epoch in spans for span in epoch[1:]]
    return later, statistics.mean(epoch[0] for epoch in spans) - statistics.mean(later)


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    turns = [measure(out, **case) for case in cases]
    if torch.distributed.get_rank() == 0:
        (out / "rank-0.json").write_text(json.dumps(turns))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
