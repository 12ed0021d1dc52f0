"""Teachers that fail in their own ways: `--teacher teachers:NAME`. Each writes down what its forwards saw."""

from __future__ import annotations

import os
import signal
import time

import torch
from notes import note, wait_for

WORDS = 128
LETHAL, BAD, SLOW = 13, 66, 77


class Forward:
    """Logits of a seeded table."""

    vocab_size = WORDS

    def __init__(self) -> None:
        self.table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0))

    def __call__(self, batch):
        self.look(batch.input_ids)
        with open("seen", "a") as file:
            file.write("".join(f"{word}\n" for word in batch.input_ids.unique().tolist()))
        return {"logits": self.table[batch.input_ids]}

    def look(self, ids: torch.Tensor) -> None:
        """May fail."""


def plain(settings):
    note(f"loaded-{os.getpid()}")
    return Forward()


def raising(settings):
    """While loading, with both ranks at the barrier."""
    wait_for("barrier-0", "barrier-1")
    note("fault")
    raise RuntimeError("the weights are made of cheese")


def failing_late(settings):
    """When the ranks have all but ended, without having connected."""
    wait_for("alone-0", "alone-1")
    raise RuntimeError("the weights are made of cheese")


def loading(settings):
    """For longer than anybody waits."""
    note("loading", os.getpid())
    time.sleep(600)


class Mortal(Forward):
    """Killed in the forward of one token, the first time."""

    def look(self, ids: torch.Tensor) -> None:
        if (ids == LETHAL).any() and not os.path.exists("note-fault"):
            note("fault")
            os.kill(os.getpid(), signal.SIGKILL)


def mortal(settings):
    return Mortal()


class Small(Forward):
    """Has memory for two rows, and raises for one token."""

    def look(self, ids: torch.Tensor) -> None:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB (simulated)")
        if (ids == BAD).any():
            raise ArithmeticError("this batch is bad")


def small(settings):
    return Small()


class Large(Forward):
    """Its outputs are larger than /dev/shm, as only the loaded teacher can tell."""

    def __call__(self, batch):
        return {"states": torch.empty(1).expand(*batch.input_ids.shape, 1 << 20)}


def large(settings):
    note("loading", os.getpid())
    return Large()
