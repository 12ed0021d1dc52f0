"""What both scripts of the demo have in common: options, process group, text, teacher."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import corpus
import torch
import torch.distributed as dist
from student import HeldOut, Trainee
from transformers import AutoTokenizer

import shmbridge


def parser(description: str, *, minutes: float, batch: int, held_out: int) -> argparse.ArgumentParser:
    """The options, with these defaults."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--minutes", type=float, default=minutes, help="training time of a student")
    made.add_argument("--batch", type=int, default=batch, help="rows of each rank")
    made.add_argument("--seq", type=int, default=64, help="tokens of each row")
    made.add_argument("--layers", type=int, default=4, help="of the students, taken evenly from the teacher's")
    made.add_argument("--lr", type=float, default=2e-3)
    made.add_argument("--bf16", action="store_true", help="autocast; fast on GPUs and CPUs with AVX512-BF16 or AMX")
    made.add_argument("--held-out", type=int, default=held_out, help="held-out rows of each rank")
    made.add_argument("--characters", type=int, default=1_000_000, help="of text, of which a tenth is held out")
    made.add_argument("--terminal", action="store_true", help="draw the progress line over itself")
    made.add_argument("--out", type=Path, default=Path("runs/demo"))
    return made


@contextmanager
def connected() -> Iterator[tuple[shmbridge.Bridge, torch.device]]:
    """The bridge and this rank's device, in a process group of the ranks."""
    with shmbridge.connect() as bridge:
        if not bridge.enabled:
            raise SystemExit("the demo needs its teacher; scripts/example.py runs with --no-teacher too")
        device = torch.device("cpu")
        if bridge.settings.train.gpus:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield bridge, device
    dist.destroy_process_group()


class Stage:
    """The text, as tokens of the teacher's tokenizer, and what is made for a student."""

    def __init__(self, args: argparse.Namespace, bridge: shmbridge.Bridge, device: torch.device) -> None:
        self.args, self.bridge, self.device = args, bridge, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
        self.model = bridge.teacher.path
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        args.out.mkdir(parents=True, exist_ok=True)
        self._tokens = args.out / f"tokens-{Path(self.model).name}-{args.characters}.pt"
        if self.rank == 0:
            corpus.build(self.tokenizer, args.characters, self._tokens)
        dist.barrier()

    def batches(self) -> Iterator[torch.Tensor]:
        """(batch, seq) token IDs without end; the same in each call."""
        windows = corpus.windows(self._tokens, "train", self.args.seq)
        return corpus.shuffled(windows, self.args.batch, self.rank, self.world)

    def held_out(self, seq: int) -> HeldOut:
        windows = corpus.windows(self._tokens, "held_out", seq)
        rows = corpus.spread(windows, self.args.held_out, self.rank, self.world)
        return HeldOut(rows, self.bridge, self.device, self.autocast)

    def trainee(self, name: str, student: Any, lr: float) -> Trainee:
        return Trainee(name, student, lr, self.autocast, self.args.out, terminal=self.args.terminal)
