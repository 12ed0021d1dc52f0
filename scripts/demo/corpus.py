"""Text that every machine with Python has: the standard library's own source, as windows of token IDs.

Files come in the order of their names' hashes. Every tenth is held out as a whole, so no held-out window overlaps one of
training. Tests are left out, and so are folders whose files are tables or near copies of each other, which would leak.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

HELD_OUT_ONE_IN = 10
SKIPPED = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}


def build(tokenizer: Any, characters: int, cache: Path) -> None:
    """Tokenise `characters` of text at most into `cache`, unless the file is there. One rank calls it; the others wait."""
    if cache.exists():
        return
    train, held_out = split(sources(), characters)
    tokens = {"train": tokenise(tokenizer, train), "held_out": tokenise(tokenizer, held_out)}
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(".partial")
    torch.save(tokens, partial)
    partial.rename(cache)


def windows(cache: Path, part: str, seq: int) -> torch.Tensor:
    """Windows of `part`, train or held_out, that do not overlap: (windows, seq) int64."""
    tokens = torch.load(cache, weights_only=True)[part]
    return tokens[: len(tokens) // seq * seq].view(-1, seq).long()


def sources() -> list[tuple[str, Path]]:
    """The (name, path) of standard library files in an order that depends on nothing but their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = ((file.relative_to(root), file) for file in root.rglob("*.py"))
    named = [(name.as_posix(), file) for name, file in files if not SKIPPED & set(name.parts)]
    return sorted(named, key=lambda each: hashlib.sha256(each[0].encode()).digest())


def split(files: Iterable[tuple[str, Path]], characters: int) -> tuple[list[str], list[str]]:
    """The texts to train on and the texts held out, `characters` in all at most."""
    train: list[str] = []
    held_out: list[str] = []
    room = characters
    for i, (_, file) in enumerate(files):
        text = file.read_text(encoding="utf-8", errors="replace")
        room -= len(text)
        if room < 0:
            break
        (train if i % HELD_OUT_ONE_IN else held_out).append(text)
    return train, held_out


def tokenise(tokenizer: Any, texts: Iterable[str]) -> torch.Tensor:
    """All texts as one row of int32 tokens, each text ended by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


def shuffled(rows: torch.Tensor, batch: int, rank: int, world: int) -> Iterator[torch.Tensor]:
    """Batches of this rank without end; every epoch is a new order, and no two ranks see the same window in it.

    Two calls give the same batches.

    Raises:
        ValueError: there are too few windows for one batch of every rank.
    """
    generator = torch.Generator().manual_seed(0)
    steps = len(rows) // (batch * world)
    if not steps:
        raise ValueError(f"{len(rows)} windows are fewer than {world} ranks x batch {batch}; take a smaller --batch")
    while True:
        order = torch.randperm(len(rows), generator=generator)[: steps * batch * world]
        for step in order.view(steps, world, batch):
            yield rows[step[rank]]


def spread(rows: torch.Tensor, count: int, rank: int, world: int) -> torch.Tensor:
    """This rank's share of `count` fixed rows for each rank, spread evenly over `rows`; fewer where those are few."""
    count = min(count, len(rows) // world)
    if not count:
        raise ValueError(f"{len(rows)} held-out windows are fewer than {world} ranks; give more --characters")
    chosen = torch.arange(count * world) * len(rows) // (count * world)
    return rows[chosen.view(world, count)[rank]]
