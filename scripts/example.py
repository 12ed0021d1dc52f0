"""Distil a teacher into a student: a DDP loop with the teacher behind the bridge. Copy it and change what is yours.

    shmbridge-launch --config eight-gpus --teacher TEACHER -- scripts/example.py STUDENT TEXT OUT
    shmbridge-launch --config cpu --teacher TEACHER -- scripts/example.py STUDENT TEXT OUT

STUDENT: a model with its tokenizer and the teacher's vocabulary; its loss needs payload.hidden={}, which both configs set.
TEXT: a file with one document a line. OUT: where the student is saved; after a stop the same command goes on from there.
"""

import os
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

import shmbridge
from shmbridge.losses import LazyLogits, count_items, forward_kl, mask_from_labels

EPOCHS, BATCH, LENGTH, LR = 2, 4, 512, 1e-4
student_path, text, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
tokenizer = AutoTokenizer.from_pretrained(student_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
student = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).to(device)
model = torch.nn.parallel.DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None)
optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
step, checkpoint = 0, out / "checkpoint.pt"
if checkpoint.exists():
    step, weights, moments = torch.load(checkpoint, map_location=device)
    student.load_state_dict(weights)
    optimizer.load_state_dict(moments)


def batches():
    texts = text.read_text().splitlines()
    sampler = DistributedSampler(texts)
    how = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    loader = DataLoader(texts, BATCH, sampler=sampler, collate_fn=lambda rows: tokenizer(rows, **how))
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        yield from loader


def save():
    if dist.get_rank() == 0:
        torch.save((step, student.state_dict(), optimizer.state_dict()), out / "partial")
        os.replace(out / "partial", checkpoint)


with shmbridge.connect() as bridge:
    bridge.wait_ready(vocab_size=student.get_output_embeddings().weight.shape[0], tokenizer=tokenizer)
    bridge.on_stop(save)  # at a signal, or the loss of the teacher or of another rank
    for batch, pending in bridge.prefetch(islice(batches(), step, None)):  # the teacher is one batch ahead
        ids, attention_mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        mask = mask_from_labels(ids.masked_fill(attention_mask == 0, -100), shifted=False)  # False at padding
        num_items = count_items([mask])  # of all ranks: each has another number of tokens
        logits = model(input_ids=ids, attention_mask=attention_mask).logits
        loss = F.cross_entropy(logits[mask].float(), ids.roll(-1, 1)[mask], reduction="sum") / num_items
        with pending.wait() as reply:
            if not reply.missing:  # it is with --no-teacher
                loss = loss + forward_kl(logits, LazyLogits(reply.hidden, bridge.head), mask=mask, num_items=num_items)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(f"step {step}  loss {loss.item():.6f}", flush=True)  # the mean over ranks is the mean over tokens
if dist.get_rank() == 0:
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)
del model  # before its process group: torch may hang where the reducer goes last
dist.destroy_process_group()
