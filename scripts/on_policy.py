"""Distil on the student's own samples: the student generates, the teacher scores. Copy it and change what is yours.

    shmbridge-launch --config eight-gpus --teacher TEACHER -- scripts/on_policy.py STUDENT DATA OUT --on-policy 0.5
    shmbridge-launch --config cpu --teacher TEACHER -- scripts/on_policy.py STUDENT DATA OUT --on-policy 0.5

STUDENT: a model with its tokenizer and the teacher's vocabulary. DATA: a file of JSON lines with "prompt" and "completion".
OUT: where the student is saved. The loss is the reverse KL of whole distributions with payload.hidden={}, which both configs
set. With `payload.hidden=null 'payload.logprobs={candidates: 16}'` it is that of the student's 16 most likely words and the
sampled one. docs/on_policy.md compares them. scripts/example.py has checkpoints.
"""

import argparse
import json
import os
import random
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import shmbridge
from shmbridge.losses import LazyLogits, candidate_reverse_kl, count_items, reverse_kl, top_candidates

EPOCHS, BATCH = 2, 8
parser = argparse.ArgumentParser()
for name in ("student", "data", "out"):
    parser.add_argument(name)
parser.add_argument(
    "--on-policy", type=float, default=1.0, help="the share of the steps whose completions are generated"
)
parser.add_argument("--length", type=int, default=256, help="the most tokens of a prompt, and of a completion")
parser.add_argument("--lr", type=float, default=1e-5)
parser.add_argument("--ahead", type=int, default=1, help="steps by which the student that generates is older; 0: none")
args = parser.parse_args()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
torch.manual_seed(dist.get_rank())  # the ranks' samples are independent
tokenizer = AutoTokenizer.from_pretrained(args.student)
end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id or 0
student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32).to(device)
checkpoint_generation = student.generation_config
student.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
model = torch.nn.parallel.DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None)
optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr)


def padded(rows, value, side="right"):
    return pad_sequence([torch.tensor(row) for row in rows], True, value, side)


@torch.no_grad()
def generate(prompts):
    """A sample for each prompt from the student's own distribution, up to its first end-of-text token."""
    student.eval()
    ids, mask = (
        padded(prompts, pad, "left").to(device),
        padded([[1] * len(row) for row in prompts], 0, "left").to(device),
    )
    found = student.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=args.length)
    student.train()
    samples = found[:, ids.shape[1] :].tolist()
    return [sample[: sample.index(end) + 1] if end in sample else sample for sample in samples]


def requests():
    """Padded on the right: teacher and student give every token the same position."""
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    loader = DataLoader(rows, BATCH, sampler=DistributedSampler(rows), collate_fn=list)
    for step, batch in enumerate(chain.from_iterable(loader for _ in range(EPOCHS))):
        prompts = [tokenizer(row["prompt"]).input_ids[-args.length :] for row in batch]
        responses = [tokenizer(row["completion"], add_special_tokens=False).input_ids[: args.length] for row in batch]
        own = random.Random(step).random() < args.on_policy  # the same in every rank
        if own:
            responses = generate(prompts)
        pairs = list(zip(prompts, responses, strict=True))
        request = {
            "input_ids": padded([prompt + response for prompt, response in pairs], pad),
            "attention_mask": padded([[1] * len(prompt + response) for prompt, response in pairs], 0),
            # the rows that predict the response: from the prompt's last token to the response's last but one
            "positions": padded([[0] * (len(prompt) - 1) + [1] * len(response) + [0] for prompt, response in pairs], 0),
        }
        if candidates:
            with torch.no_grad():
                logits = student(request["input_ids"].to(device), request["attention_mask"].to(device)).logits
            request["candidates"] = top_candidates(logits, candidates).cpu()
        yield own, request


with shmbridge.connect() as bridge:
    bridge.wait_ready(vocab_size=student.get_output_embeddings().weight.shape[0], tokenizer=tokenizer)
    logprobs = bridge.settings.payload.logprobs
    candidates = logprobs.candidates if logprobs else 0
    # A request is generated after the one before it was sent, and before that one's reply is read.
    batches = bridge.prefetch(requests(), lambda batch: batch[1], ahead=args.ahead)
    for step, ((own, request), pending) in enumerate(batches, 1):
        rows = request["positions"].bool()
        num_items = count_items([rows])  # of all ranks: each has another number of tokens
        logits = model(request["input_ids"].to(device), request["attention_mask"].to(device)).logits[rows.to(device)]
        with pending.wait() as reply:
            if candidates:
                words = request["candidates"][rows].to(device)
                sampled = request["input_ids"].roll(-1, 1)[rows].to(device)
                drawn = {"sampled": sampled, "sampled_logprobs": reply["logprobs"]} if own else {}
                loss = candidate_reverse_kl(logits, words, reply["candidate_logprobs"], num_items=num_items, **drawn)
            else:
                loss = reverse_kl(logits, LazyLogits(reply.hidden, bridge.head), num_items=num_items)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.6f}", flush=True)  # the mean over ranks is the mean over tokens
student.generation_config = checkpoint_generation
if dist.get_rank() == 0:
    student.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
del model  # before its process group: torch may hang where the reducer goes last
dist.destroy_process_group()
