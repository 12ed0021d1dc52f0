"""One training loop under accelerate, first with the teacher's logits computed in this process, then over bridge.prefetch.

Both must tell the same: whether each micro-step ended an accumulation, its learning rate and loss, the rows that
gather_for_metrics kept, and the same of an evaluation inside the loop. Nothing of prefetch is in the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import GradientState
from teachers import VOCAB, Linear
from torch.utils.data import DataLoader, Dataset

import shmbridge

directory, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
teacher = Linear()


class Rows(Dataset):
    def __init__(self, count: int, seed: int) -> None:
        self.ids = torch.randint(0, VOCAB, (count, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "row": torch.tensor(row)}


def kl(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")


def of_model(batch) -> torch.Tensor:
    return teacher.table[batch["input_ids"]]


def train(bridge, accumulate: int, dispatch: bool, rows: int, evaluation: str, lopsided: bool = False) -> list:
    """`bridge` None: the control."""
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch),
    )
    torch.manual_seed(1)  # the teacher's is 0
    model = torch.nn.Embedding(VOCAB, VOCAB)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    loader = DataLoader(Rows(rows, seed=1), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))
    held_out = DataLoader(Rows(5, seed=2), batch_size=2)
    model, optimizer, scheduler, loader, held_out = accelerator.prepare(model, optimizer, scheduler, loader, held_out)
    told: list = []
    kept = []

    def evaluate() -> None:
        if bridge and evaluation == "prefetch":
            found = ((batch, pending.copy().logits) for batch, pending in bridge.prefetch(held_out))
        elif bridge:
            found = ((batch, bridge.exchange(batch["input_ids"]).logits) for batch in held_out)
        else:
            found = ((batch, of_model(batch)) for batch in held_out)
        for batch, wanted in found:
            with torch.no_grad():
                loss = kl(model(batch["input_ids"]), wanted)
            told.append(("eval", loss.item(), accelerator.gather_for_metrics(batch["row"]).tolist()))

    def micro_step(batch, wanted) -> None:
        with accelerator.accumulate(model):
            loss = kl(model(batch["input_ids"]), wanted)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        rows = accelerator.gather_for_metrics(batch["row"]).tolist()
        told.append((accelerator.sync_gradients, scheduler.get_last_lr()[0], loss.item(), rows))
        if evaluation and len(told) % 3 == 0:
            evaluate()

    for _epoch in range(2):
        if bridge:
            for batch, pending in bridge.prefetch(loader):
                with pending.wait() as reply:
                    wanted = reply.logits.clone()
                if lopsided and bridge.rank == 1:  # its ring has less room
                    kept.clear()
                    kept.append(bridge.submit(batch["input_ids"]))
                micro_step(batch, wanted)
        else:
            for batch in loader:
                micro_step(batch, of_model(batch))
    return told


def refused_in_one_rank(bridge) -> list:
    """dispatch_batches, and a batch that rank 1 cannot submit: it is told in its turn, and no rank waits for another before."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    loader = accelerator.prepare(DataLoader(Rows(40, seed=4), batch_size=2))
    told: list = []

    def tokens(batch):
        if bridge.rank == 1 and batch["row"][0] >= 10:
            raise ValueError("a bad row")
        return batch["input_ids"]

    try:
        for batch, pending in bridge.prefetch(loader, tokens):
            pending.cancel()
            if len(told) == 2:
                break
            told.append(accelerator.gather(batch["row"]).tolist())
    except ValueError as error:
        told.append(str(error))
    return told


with shmbridge.connect() as bridge:
    bridge.wait_ready()
    found = {}
    for name, case in cases.items():
        found[name] = train(None, **{**case, "lopsided": False}), train(bridge, **case)
    found["refused"] = refused_in_one_rank(bridge)
    (directory / f"rank-{bridge.rank}.json").write_text(json.dumps(found))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
