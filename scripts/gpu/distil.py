"""A rank of scripts/gpu/train.py: the same training loop with its teacher behind the bridge, in its own process, or not at all.

Under `shmbridge-launch --no-teacher` it measures the two controls, else the bridge. Rank 0 writes what was found to --out.
Every arm starts from the same student, on the same batches in the same order.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import shmbridge
from shmbridge.losses import Head, LazyLogits, forward_kl

GIB = 2**30
# Entered after the student's forward, left after the backward.
Answer = Callable[[], AbstractContextManager[LazyLogits]]


def main() -> None:
    options = _parse()
    device = torch.device("cpu")
    if options.cards:  # ranks may share a card
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % options.cards)
        torch.cuda.set_device(device)
    dist.init_process_group(options.backend)
    with shmbridge.connect(device=device) as bridge:
        if bridge.enabled:
            bridge.wait_ready()
        found = (bridged if bridge.enabled else controls)(Rank(options, device), bridge)
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--teacher", "--student", "--tokens", "--out"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--steps", "--warmup", "--batch", "--cards"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--backend", required=True)
    return parser.parse_args()


def bridged(rank: Rank, bridge: shmbridge.Bridge) -> dict[str, Any]:
    """The teacher one batch ahead, then asked when the batch's turn has come."""
    found = {}
    for name, ahead in (("bridge, teacher ahead", 1), ("bridge, teacher not ahead", 0)):
        asked = bridge.prefetch(rank.batches(), ahead=ahead)
        answers = ((ids, _lease(pending, bridge.head)) for ids, pending in asked)
        found[name] = rank.train(answers)
        if ahead:  # medians, of this arm alone
            stats = bridge.stats()
            found[name] |= {"teacher_s": stats.step_teacher_s, "waited_share": stats.wait_share}
    return found


def _lease(pending: shmbridge.Pending, head: Head) -> Answer:
    @contextmanager
    def answer() -> Iterator[LazyLogits]:
        with pending.wait() as reply:
            yield LazyLogits(reply.hidden, head)

    return answer


def controls(rank: Rank, _: shmbridge.Bridge) -> dict[str, Any]:
    """The teacher in this very process, then the student alone, whose loss has one and the same answer in every step."""
    in_process, fixed = _in_process(rank)
    alone = rank.train((ids, lambda: nullcontext(fixed)) for ids in rank.batches())
    return {"teacher in the rank's process": in_process, "student alone": alone}


def _in_process(rank: Rank) -> tuple[dict[str, Any], LazyLogits]:
    """What was found, and one answer that outlives the teacher."""
    teacher = AutoModelForCausalLM.from_pretrained(rank.options.teacher, dtype=rank.dtype).to(rank.device).eval()
    head = Head(teacher.get_output_embeddings().weight.detach())

    def ask(ids: torch.Tensor) -> LazyLogits:
        with torch.inference_mode():
            hidden = teacher.base_model(input_ids=ids.to(rank.device, non_blocking=True), use_cache=False)[0]
        return LazyLogits(hidden, head)

    found = rank.train((ids, lambda ids=ids: nullcontext(ask(ids))) for ids in rank.batches())
    return found, LazyLogits(ask(next(rank.batches())).hidden.clone(), Head(head.weight.clone()))


class Rank:
    """What the arms have in common."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32  # the teacher's; the student computes in it
        self._rows = torch.load(options.tokens, weights_only=True)

    def batches(self) -> Iterator[torch.Tensor]:
        """(batch, seq) int64 on the CPU for each step; ranks have different rows."""
        rank, world, size = dist.get_rank(), dist.get_world_size(), self.options.batch
        for step in range(self.options.steps):
            first = (step * world + rank) * size
            ids = self._rows[torch.arange(first, first + size) % len(self._rows)]
            yield ids.pin_memory() if self.cuda else ids

    def train(self, batches: Iterable[tuple[torch.Tensor, Answer]]) -> dict[str, Any]:
        """Time and memory of the steps behind the warm-up, and the losses of all, as means over the ranks."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        student = AutoModelForCausalLM.from_pretrained(self.options.student, dtype=torch.float32).to(self.device)
        several = dist.get_world_size() > 1
        model = DistributedDataParallel(student, [self.device] if self.cuda else None) if several else student
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=self.cuda)
        losses = []
        for step, (ids, answer) in enumerate(batches):
            if step == self.options.warmup:
                began = self._together()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
                logits = model(input_ids=ids.to(self.device, non_blocking=True), use_cache=False).logits
            with answer() as teacher:
                loss = forward_kl(logits, teacher)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        step_s = (self._together() - began) / (self.options.steps - self.options.warmup)
        mean = torch.stack(losses)
        dist.all_reduce(mean)
        return {
            "step_s": step_s,
            "tokens_per_s": ids.numel() * dist.get_world_size() / step_s,
            "losses": (mean / dist.get_world_size()).tolist(),
            **self._memory(),
        }

    def _together(self) -> float:
        """The time at which every rank has come here and its GPU is done."""
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter()

    def _memory(self) -> dict[str, Any]:
        """In GiB: the most that a rank took, and what is in use on each card now, all processes and their caches included."""
        if not self.cuda:
            return {"rank_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, "cards_gib": []}
        most = torch.tensor(torch.cuda.max_memory_allocated() / GIB, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return {"rank_gib": float(most), "cards_gib": cards_gib()}


def cards_gib() -> list[float]:
    """Memory in use on each card of the machine; empty without nvidia-smi, as in some containers."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:
        return []
    return [int(mib) / 1024 for mib in told if mib.isdecimal()]


if __name__ == "__main__":
    main()
