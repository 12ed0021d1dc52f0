"""Teachers of a test's own, named as `teachers:build...` with tests/scripts as the working directory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from shmbridge.losses import Head

VOCAB = 128


class Linear:
    """Logits of a seeded table: (rows, seq, VOCAB)."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))

    def __call__(self, batch):
        return {"logits": self.table[batch.input_ids]}


def build(settings):
    return Linear()


class Hidden(Linear):
    """The same distribution as hidden states and a head, for payload.hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head(self.table.T.contiguous())

    def __call__(self, batch):
        return {"hidden": torch.nn.functional.one_hot(batch.input_ids.long(), VOCAB).float()}


def build_hidden(settings):
    return Hidden()


class Gated(Linear):
    """Loads, and answers each step, only when the ranks have made a file that says so: see default_group.py."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.rounds = -2  # the probe's two batches

    def __call__(self, batch):
        if self.rounds >= 0:
            wait_for(self.directory / f"computing-{self.rounds}")
        self.rounds += 1
        return super().__call__(batch)


def build_gated(settings):
    directory = Path(settings.teacher.args["directory"])
    wait_for(directory / "loading")
    return Gated(directory)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} was never made: a collective of the training group waited for the teacher")
        time.sleep(0.005)


def build_dying(settings):
    """Killed by SIGKILL in the forward of token 13."""
    linear = Linear()

    def forward(batch):
        if (batch.input_ids == 13).any():
            os.kill(os.getpid(), 9)
        return linear(batch)

    return forward


def build_raising(settings):
    raise RuntimeError("the weights are made of cheese")


def build_summing(settings):
    """Sums; where teacher.args.once names a file that is not there, it makes it and is killed in the forward of token 13."""
    once = Path(settings.teacher.args.get("once", "/"))

    def forward(batch):
        if (batch.input_ids == 13).any() and not once.exists():
            once.touch()
            os.kill(os.getpid(), 9)
        return {"answer": batch.input_ids * 2}

    forward.vocab_size = VOCAB
    return forward
