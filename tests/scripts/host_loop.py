"""A loop with the habits of lingua's apps/main/train.py, and the bridge in the places that docs/hosts/lingua.md names.

The habits that matter: one ExitStack; the root logger at NOTSET with its handlers cleared; SIGUSR2 asks for a checkpoint;
gc off; a generator of (numpy batch, state) whose batch is (batch, seq, 2), which is read ahead; gradient accumulation; collectives
everywhere.
"""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import shmbridge
from shmbridge.losses import LazyLogits, forward_kl

BATCH, SEQ, VOCAB, ACCUMULATE = 2, 8, 128, 2
directory, steps = Path(sys.argv[1]), int(sys.argv[2])
preempted = {"flag": False}


def on_usr2(signum, frame):
    preempted["flag"] = True


def batches(rank: int, position: int):
    """(numpy batch of inputs and shifted labels, state to resume after it)."""
    while True:
        tokens = np.random.default_rng((rank, position)).integers(0, VOCAB, (BATCH, SEQ + 1))
        position += 1
        yield np.stack([tokens[:, :-1], tokens[:, 1:]], axis=-1), {"position": position}


def train() -> None:
    with ExitStack() as stack:
        root = logging.getLogger()
        root.setLevel(logging.NOTSET)
        root.handlers.clear()
        root.addHandler(logging.StreamHandler(sys.stdout))
        signal.signal(signal.SIGUSR2, on_usr2)
        dist.init_process_group("gloo")
        stack.callback(dist.destroy_process_group)
        rank = dist.get_rank()
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Embedding(VOCAB, VOCAB))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        gc.disable()
        bridge = stack.enter_context(shmbridge.connect())
        bridge.wait_ready(vocab_size=VOCAB)
        step = acc_step = 0
        state = {"position": 0}
        numbered = enumerate(batches(rank, 0), step * ACCUMULATE)
        tokens = lambda it: {"input_ids": it[1][0][:, :, 0], "step": it[0] // ACCUMULATE}  # noqa: E731
        loader = bridge.prefetch(numbered, tokens)
        stop = torch.zeros(())
        while step < steps and not stop:
            acc_step = (acc_step + 1) % ACCUMULATE
            (_, (batch, state)), pending = next(loader)
            batch = torch.tensor(batch, dtype=torch.long)
            input_ids, labels = batch[:, :, 0], batch[:, :, 1]
            logits = model(input_ids)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            with pending.wait() as reply:
                missing = reply.missing
                if not missing:
                    teacher = LazyLogits(reply.hidden, bridge.head) if "hidden" in reply else reply.logits
                    loss = loss + forward_kl(logits, teacher)
            (loss / ACCUMULATE).backward()
            if acc_step == 0:
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                stop = torch.tensor(float(preempted["flag"]))
                dist.all_reduce(stop)  # the ranks get the signal at different steps and stop at the same one
                print(f"step {step} loss {loss.item():.4f} teacher {not missing}", flush=True)
        if rank == 0:
            saved = {"step": step, "preempted": bool(stop), **state}
            (directory / "checkpoint.json").write_text(json.dumps(saved))
        dist.barrier()
        # A reducer that outlives its group ends the group with the GIL held, while gloo's thread may need it to drop the
        # barrier's tensor: torch 2.13 then hangs.
        del model


train()
