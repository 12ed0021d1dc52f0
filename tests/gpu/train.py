"""A training script for the real launcher: ranks that may share a card, over gloo. `train.py MODEL RESULTS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import shmbridge

STEPS = 20


def main(model: str, results: Path) -> None:
    card = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(card)  # before connect has anything to do with a GPU
    dist.init_process_group("gloo")  # NCCL refuses two ranks on one card
    with shmbridge.connect() as bridge:
        bridge.wait_ready()  # the parity check is on
        own = AutoModelForCausalLM.from_pretrained(model).to("cuda").eval()
        equal = 0
        for step in range(STEPS):
            world = dist.get_world_size()
            everyone = torch.randint(0, 512, (2 * world, 9 + step), generator=torch.Generator().manual_seed(step))
            mine = slice(2 * bridge.rank, 2 * bridge.rank + 2)
            pending = bridge.submit(everyone[mine], step=step)
            with torch.inference_mode():
                expected = own(everyone[mine].to("cuda")).logits
            with pending.wait() as reply:
                assert reply.logits.device == expected.device
                equal += torch.allclose(reply.logits, expected, rtol=1e-3, atol=1e-3)
            dist.barrier()
        plane, where = bridge.settings.plane, card
    told = {"equal": equal, "plane": plane, "card": where, "world": dist.get_world_size()}
    (results / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
