"""Text that every machine with Python has: the standard library's own source, as windows of token IDs.

Whole files are held out, chosen by the hash of their path, so no window of the held-out text overlaps one of training.
Left out are tests, and folders whose files are tables or near copies of each other, which would leak.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

HELD_OUT_ONE_IN = 10
CHARACTERS = 4_000_000  # about a million tokens, tokenised in a few seconds
SKIPPED = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}


def build(tokenizer: Any, cache: Path) -> None:
    """Tokenise the corpus into `cache`, unless this tokenizer's tokens are there. One rank calls it; the others wait."""
    if cache.exists():
        return
    train, held_out = split(sources())
    tokens = {"train": tokenise(tokenizer, train), "held_out": tokenise(tokenizer, held_out)}
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(".partial")
    torch.save(tokens, partial)
    partial.rename(cache)


def load(cache: Path, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out windows, (windows, seq) int64 each, that do not overlap."""
    tokens = torch.load(cache, weights_only=True)
    return windows(tokens["train"], seq), windows(tokens["held_out"], seq)


def sources() -> list[tuple[str, Path]]:
    """The (name, path) of standard library files in an order that depends on nothing but their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = ((file.relative_to(root), file) for file in root.rglob("*.py"))
    named = [(name.as_posix(), file) for name, file in files if not SKIPPED & set(name.parts)]
    return sorted(named, key=lambda each: _digest(each[0]))


def split(files: Iterable[tuple[str, Path]]) -> tuple[list[str], list[str]]:
    """The texts to train on and the texts held out, CHARACTERS in all."""
    train: list[str] = []
    held_out: list[str] = []
    room = CHARACTERS
    for name, file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        room -= len(text)
        if room < 0:
            break
        (held_out if _digest(name) % HELD_OUT_ONE_IN == 0 else train).append(text)
    return train, held_out


def tokenise(tokenizer: Any, texts: Iterable[str]) -> torch.Tensor:
    """All texts as one row of int32 tokens, each text ended by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


def windows(tokens: torch.Tensor, seq: int) -> torch.Tensor:
    count = len(tokens) // seq
    return tokens[: count * seq].view(count, seq).long()


def shuffled(rows: torch.Tensor, batch: int, rank: int, world: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of this rank without end; every epoch is a new order, and no two ranks see the same window in it."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(rows) // (batch * world)
    if not steps:
        raise ValueError(f"{len(rows)} windows are fewer than {world} ranks x batch {batch}; take a smaller --batch")
    while True:
        order = torch.randperm(len(rows), generator=generator)[: steps * batch * world]
        for step in order.view(steps, world, batch):
            yield rows[step[rank]]


def spread(rows: torch.Tensor, batches: int, batch: int, rank: int, world: int) -> list[torch.Tensor]:
    """This rank's share of `batches` fixed batches for each rank, spread evenly over `rows`; fewer where those are few."""
    batches = min(batches, len(rows) // (batch * world))
    if not batches:
        raise ValueError(
            f"{len(rows)} held-out windows are fewer than {world} ranks x batch {batch}; take a smaller --batch"
        )
    chosen = torch.arange(batches * world * batch) * len(rows) // (batches * world * batch)
    return list(rows[chosen.view(batches, world, batch)[:, rank]])


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
