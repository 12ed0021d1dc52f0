#!/usr/bin/env python3
"""Replies far larger than memory: 32,768 tokens x 128,256 words are 7.8 GiB of bfloat16 logits, through 188 MiB.

    python scripts/stream_long.py                                        # 4k to 32k tokens; some minutes on two cores
    python scripts/stream_long.py --tokens 1024 4096 --words 8192

Each line is a run of its own by shmbridge-launch: a teacher and one rank, of random weights, a narrow trunk and a full
vocabulary. Replies are whole distributions (payload.logits) and come in chunks (payload.stream). The student's logits are
never whole either: shmbridge.losses takes the teacher's chunks and the student's hidden states, and computes both gradients
as they come.

Peaks are the largest RssAnon of each process, sampled every 5 ms: its memory without what is shared or read from files.
They hold PyTorch, the weights and a few chunks of logits. What may grow with the tokens are IDs and hidden states: the
teacher's trunk has three copies of these at a time, the student's, with its backward, twice as many. At the smallest size
the loss is computed once more from a whole reply, after the peaks were taken.
"""

from __future__ import annotations

import argparse
import atexit
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shmbridge
from shmbridge.head import Head
from shmbridge.losses import LazyLogits, forward_kl

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def main() -> int:
    args = parse()
    if args.rank_to:
        train(args)
        return 0
    print(
        f"{args.words:,} words, hidden states of {args.width} float32; MiB, each line a fresh teacher and a fresh rank\n"
    )
    print(f"{'tokens':>8}{'reply':>10}{'pool':>8}{'teacher':>10}{'student':>10}{'seconds':>10}{'loss':>12}")
    results = []
    for tokens in sorted(args.tokens):
        results.append(found := launch(args, tokens, check=not results))
        reply, pool, teacher, student = (found[name] / MIB for name in ("reply", "pool", "teacher", "student"))
        sizes = f"{reply:>10,.0f}{pool:>8,.0f}{teacher:>10,.0f}{student:>10,.0f}"
        print(f"{tokens:>8,}{sizes}{found['seconds']:>10.1f}{found['loss']:>12.6f}", flush=True)
    first, last = results[0], results[-1]
    print(f"\nloss of a whole reply of {min(args.tokens):,} tokens: {first['whole']:.6f}")
    added = max(args.tokens) - min(args.tokens)
    one_copy = added * (8 + 4 * args.width) / MIB
    took = ", ".join(f"the {side} took {(last[side] - first[side]) / MIB:+.0f} MiB" for side in ("teacher", "student"))
    print(f"{added:,} tokens more are {one_copy:.0f} MiB of IDs and hidden states, in one copy; {took}")
    return 0 if abs(first["whole"] - first["loss"]) <= 1e-4 * abs(first["whole"]) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Stream replies that are far larger than memory, and measure both sides."
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="of a request, one row"
    )
    parser.add_argument("--words", type=int, default=128_256, help="of the vocabulary")
    parser.add_argument("--width", type=int, default=64, help="of the hidden states")
    parser.add_argument("--chunk", type=int, default=256, help="positions of a chunk; there are three")
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)  # the same script as the training script
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def launch(args: argparse.Namespace, tokens: int, check: bool) -> dict[str, Any]:
    """One run; what both sides wrote."""
    with tempfile.TemporaryDirectory() as directory:
        teacher, student = Path(directory, "teacher"), Path(directory, "student")
        command = [
            *(sys.executable, "-m", "shmbridge.launch", "--cpu", "1", "--teacher", "scripts.stream_long:build"),
            "payload.logits={}",
            f"payload.stream={{chunk_positions: {args.chunk}, chunks: 3}}",
            f"ring={{depth: 1, max_tokens: {tokens}}}",
            f"teacher.args={{words: {args.words}, width: {args.width}, peak_to: {teacher}}}",
            f"run_dir={directory}/runs",
            *("--", "scripts/stream_long.py", f"--tokens={tokens}", f"--words={args.words}", f"--width={args.width}"),
            *(f"--rank-to={student}", *["--check"] * check),
        ]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stdout)
        return {**json.loads(student.read_text()), "teacher": json.loads(teacher.read_text())}


# The teacher


def build(settings: Any) -> Any:
    """A custom teacher: hidden states, and a head that the bridge applies to a chunk of them at a time."""
    args = settings.teacher.args
    trunk, head = model(args["words"], args["width"], seed=1)
    peak = Peak()
    atexit.register(lambda: Path(args["peak_to"]).write_text(json.dumps(peak.nbytes)))

    def forward(batch: Any) -> dict[str, torch.Tensor]:
        return {"hidden": trunk(batch.input_ids)}

    forward.head = Head(head.weight.detach())
    forward.vocab_size = args["words"]
    return forward


def model(words: int, width: int, seed: int) -> tuple[nn.Module, nn.Linear]:
    """A trunk of one layer, whose cost is linear in the tokens, and an output head."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Embedding(words, width), nn.Linear(width, width), nn.Tanh())
    return trunk, nn.Linear(width, words, bias=False)


# The rank


def train(args: argparse.Namespace) -> None:
    """One step on one long row."""
    [tokens] = args.tokens
    peak = Peak()
    trunk, head = model(args.words, args.width, seed=2)
    input_ids = torch.randint(args.words, (1, tokens))
    with shmbridge.connect() as bridge:
        bridge.wait_ready(vocab_size=args.words)
        started = time.monotonic()
        pending = bridge.submit(input_ids)
        student = LazyLogits(trunk(input_ids), Head(head.weight))
        loss = forward_kl(student, ((rows, chunk.logits) for rows, chunk in pending.chunks()))
        loss.backward()
        seconds = time.monotonic() - started
        position_bytes = sum(spec.item_bytes for spec in bridge.teacher.outputs)
        stream = bridge.settings.payload.stream
        found = {
            "reply": tokens * position_bytes,
            "pool": stream.chunks * stream.chunk_positions * position_bytes,
            "student": peak.nbytes,
            "seconds": seconds,
            "loss": loss.item(),
        }
        if args.check:
            with torch.no_grad():
                found["whole"] = forward_kl(student, bridge.exchange(input_ids).logits).item()
    args.rank_to.write_text(json.dumps(found))


class Peak:
    """The largest RssAnon of this process, from now on, in bytes."""

    def __init__(self) -> None:
        self.nbytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.nbytes = max(self.nbytes, 1024 * int(status.partition("RssAnon:")[2].split(maxsplit=1)[0]))
            time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(main())
