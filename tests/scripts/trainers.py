"""Loops with the habits of other trainers, with the bridge where docs/hosts/ puts it, each beside a control.

The control is the same loop with the teacher's logits computed in this process; nothing of the bridge is in it. Both tell
the rows and the loss of every micro-step, in rank-N.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from teachers import VOCAB, Linear
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import shmbridge
from shmbridge.losses import forward_kl

BATCH, SEQ, ACCUMULATE = 2, 6, 3
directory, loops = Path(sys.argv[1]), sys.argv[2:]
teacher = Linear()


class Rows(Dataset):
    def __len__(self) -> int:
        return 14  # four batches of two a rank, the last of one row

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, VOCAB, (SEQ,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": ids, "row": torch.tensor(row)}


def student() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)  # the teacher's is 0
    model = torch.nn.Embedding(VOCAB, VOCAB)
    return model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def fabric(bridge) -> list:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model, optimizer = fabric.setup(*student())
    rows = DataLoader(Rows(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))
    loader = fabric.setup_dataloaders(rows, move_to_device=False)
    told = []

    def step(turn: int, batch, logits: torch.Tensor) -> None:
        syncs = turn % 2 == 1
        with fabric.no_backward_sync(model, enabled=not syncs):
            loss = forward_kl(model(fabric.to_device(batch["input_ids"])), logits)
            fabric.backward(loss)
        if syncs:
            optimizer.step()
            optimizer.zero_grad()
        told.append((batch["row"].tolist(), loss.item()))

    for _epoch in range(2):
        if bridge:
            for turn, (batch, pending) in enumerate(bridge.prefetch(loader, ahead=1)):
                with pending.wait() as reply:
                    step(turn, batch, reply.logits)
        else:
            for turn, batch in enumerate(loader):
                step(turn, batch, teacher.table[batch["input_ids"]])
    return told


def lightning(bridge) -> list:
    import lightning as L

    told = []

    class WithTeacher:
        def __init__(self, loader) -> None:
            self.loader, self.sampler = loader, loader.sampler

        def __iter__(self):
            yield from bridge.prefetch(self.loader, ahead=1)

        def __len__(self) -> int:
            return len(self.loader)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optimizer = student()

        def configure_optimizers(self):
            return self.optimizer

        def training_step(self, batch, _):
            if bridge:
                batch, pending = batch
                with pending.wait() as reply:
                    loss = forward_kl(self.model(batch["input_ids"]), reply.logits)
            else:
                loss = forward_kl(self.model(batch["input_ids"]), teacher.table[batch["input_ids"]])
            told.append((batch["row"].tolist(), loss.item()))
            return loss

        def validation_step(self, batch, _):
            ids = batch["input_ids"]
            logits = bridge.exchange(ids).logits if bridge else teacher.table[ids]
            told.append(("validation", forward_kl(self.model(ids), logits).item()))

    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        accumulate_grad_batches=2,
        val_check_interval=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Rows(), BATCH, sampler=DistributedSampler(Rows(), 2, dist_rank(), seed=3))
    trainer.fit(Module(), WithTeacher(loader) if bridge else loader, DataLoader(Rows(), BATCH))
    return told


def nanochat(bridge) -> list:
    """One loader without an end, whose batches are views of one buffer, and the next batch taken behind each backward."""
    model, optimizer = student()
    model = torch.nn.parallel.DistributedDataParallel(model)
    loader = views_of_one_buffer()
    told = []
    if bridge:
        own = ((x.clone(), y.clone(), state) for x, y, state in loader)
        loader = bridge.prefetch(own, tokens=lambda batch: batch[0], ahead=2)
        (x, y, state), pending = next(loader)
    else:
        x, y, state = next(loader)
    for _step in range(3):
        for _micro_step in range(ACCUMULATE):
            logits = model(x)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            if bridge:
                with pending.wait() as reply:
                    loss = loss + forward_kl(logits, reply.logits)
            else:
                loss = loss + forward_kl(logits, teacher.table[x])
            (loss / ACCUMULATE).backward()
            told.append((state, loss.item()))
            if bridge:
                (x, y, state), pending = next(loader)
            else:
                x, y, state = next(loader)
        optimizer.step()
        optimizer.zero_grad()
    if bridge:
        loader.close()
        pending.cancel()
        told_of_views(bridge)
    return told


def views_of_one_buffer() -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, int]]]:
    """(inputs, targets, state to resume behind them). The next batch overwrites this one."""
    inputs, targets = torch.empty(2, BATCH, SEQ, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5 + dist_rank())
    for position in range(1, 1000):
        tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
        inputs.copy_(tokens[:, :-1])
        targets.copy_(tokens[:, 1:])
        yield inputs, targets, {"position": position}


def told_of_views(bridge) -> None:
    """IDs are copied when a batch is taken, so a reply is that of its own batch even where the batch was overwritten since."""
    wanted = (teacher.table[inputs] for inputs, _, _ in views_of_one_buffer())
    with bridge.prefetch(views_of_one_buffer(), tokens=lambda batch: batch[0], ahead=3) as batches:
        for _ in range(5):
            _, pending = next(batches)
            assert torch.equal(pending.copy().logits, next(wanted))


class Exhausted(Exception):
    """The data ran out; as in torchtitan no StopIteration, which a generator may not raise."""


class PackedTokens:
    """Batches of a single row of packed documents, without a batch axis. The state is that behind the batch taken last."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        generator = torch.Generator().manual_seed(7 + dist_rank())
        for self.taken in range(1, 2 * ACCUMULATE + 3):  # the third step is not whole
            tokens = torch.randint(0, VOCAB, (2 * SEQ,), generator=generator)
            labels = tokens.roll(-1)
            labels[torch.randint(0, 2 * SEQ, (3,), generator=generator)] = -100
            yield {"input": tokens, "positions": torch.arange(SEQ).repeat(2)}, labels

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}


def torchtitan(bridge) -> list:
    """All micro-batches of a step are taken before the first forward; the loss is divided by the labels of all ranks."""
    model, optimizer = student()
    model = torch.nn.parallel.DistributedDataParallel(model)
    dataloader = PackedTokens()
    told: list = []

    def batch_generator() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        yield from dataloader
        raise Exhausted

    def tokens(batch) -> dict[str, torch.Tensor]:
        return {"input_ids": batch[0]["input"][None], "position_ids": batch[0]["positions"][None]}

    data_iterator = batch_generator()
    if bridge:
        data_iterator = bridge.prefetch(data_iterator, tokens, ahead=2, state=dataloader.state_dict)
        dataloader.state_dict = lambda: data_iterator.state

    def train_step() -> None:
        microbatches = []
        for _ in range(ACCUMULATE):
            if bridge:
                (input_dict, labels), input_dict["pending"] = next(data_iterator)
            else:
                input_dict, labels = next(data_iterator)
            microbatches.append((input_dict, labels))
        valid_tokens = sum((labels != -100).sum() for _, labels in microbatches)
        dist.all_reduce(valid_tokens)
        for input_dict, labels in microbatches:
            pred, mask = model(input_dict["input"]), labels != -100
            loss = F.cross_entropy(pred, labels, reduction="sum") / valid_tokens
            if bridge:
                with input_dict.pop("pending").wait() as reply:
                    loss = loss + forward_kl(pred, reply.logits[0], mask=mask, num_items=valid_tokens)
            else:
                loss = loss + forward_kl(pred, teacher.table[input_dict["input"]], mask=mask, num_items=valid_tokens)
            loss.backward()
            told.append((input_dict["input"].tolist(), loss.item()))
        optimizer.step()
        optimizer.zero_grad()
        told.append(dataloader.state_dict())

    for _step in range(3):
        try:
            train_step()
        except Exhausted:
            told.append("ran out of data")
    if bridge:
        assert torch.equal(bridge.exchange(torch.ones(1, 4, dtype=torch.int64)).logits[0, 0], teacher.table[1])
    return told


def dist_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


dist.init_process_group("gloo")
with shmbridge.connect() as bridge:
    bridge.wait_ready(vocab_size=VOCAB)
    told = {name: (globals()[name](None), globals()[name](bridge)) for name in loops}
    (directory / f"rank-{bridge.rank}.json").write_text(json.dumps(told))
dist.barrier()
dist.destroy_process_group()
