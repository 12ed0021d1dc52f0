"""The regression that started the project: collectives of the default group while the teacher loads, waits and computes.

The teacher (teachers:build_gated) goes on only when this script has finished its collectives and made a file, so each
kind of collective provably ran to its end in each of the three states; none of them can have waited for the teacher.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import shmbridge

STEPS = 3
directory = Path(sys.argv[1])


def collectives(moment: str) -> None:
    """Everything that a training loop does on its default group."""
    dist.barrier()
    total = torch.ones(4)
    dist.all_reduce(total)
    assert bool((total == dist.get_world_size()).all())
    group = dist.new_group()
    dist.barrier(group)
    dcp.save({"weight": torch.ones(2) * dist.get_rank()}, checkpoint_id=directory / f"checkpoint-{moment}")
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, moment)
    assert gathered == [moment] * dist.get_world_size()
    dist.destroy_process_group(group)
    dist.barrier()
    if dist.get_rank() == 0:
        (directory / moment).touch()


dist.init_process_group("gloo")
with shmbridge.connect() as bridge:
    collectives("loading")
    bridge.wait_ready()
    for step in range(STEPS):
        collectives(f"waiting-{step}")
        ids = torch.full((2, 5), step + 10 * bridge.rank)
        pending = bridge.submit(ids, step=step)
        collectives(f"computing-{step}")
        with pending.wait() as reply:
            assert reply.logits.shape == (2, 5, 128)
    collectives("closing")
collectives("after")
dist.destroy_process_group()
print("every collective returned", flush=True)
