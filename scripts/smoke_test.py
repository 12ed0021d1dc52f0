"""Is every reply bit for bit what the model gives in one process? A tiny random teacher, two ranks, no downloads.

    python scripts/smoke_test.py                                    # two CPU ranks
    python scripts/smoke_test.py --teacher-gpu 1 --train-gpus 0     # the same on GPUs

Exits 0 only when every reply equalled the reference. Started by torchrun it is one of the ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import shmbridge

STEPS = 20
VOCAB = 512


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="smoke-") as directory:
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
        LlamaForCausalLM(shape).save_pretrained(directory)
        settings = [
            f"run_dir={directory}/runs",
            "teacher.collect=lockstep",  # so that every rank knows what else was in the forward
            "teacher.cpu_threads=1",  # sums depend on the number of threads, so all processes have the same
            "train.cpu_threads=1",
            "payload.logits.dtype=float32",
            "ring.max_tokens=1024",
        ]
        launch = [sys.executable, "-m", "shmbridge.launch", "--teacher", directory, *(sys.argv[1:] or ["--cpu", "2"])]
        code = subprocess.run([*launch, *settings, "--", __file__, directory], check=False).returncode
        worlds = [int(file.read_text()) for file in Path(directory).glob("rank-*")]
        if code == 0 and (not worlds or len(worlds) != worlds[0]):
            print(f"the run ended well but only {len(worlds)} ranks told their result")
            return 1
        return code


def rank() -> None:
    with shmbridge.connect() as bridge:
        bridge.wait_ready()
        number, world = bridge.rank, int(os.environ["WORLD_SIZE"])
        device = torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model = AutoModelForCausalLM.from_pretrained(bridge.teacher.path).to(device).eval()
        equal = sum(step_is_equal(bridge, model, step, world) for step in range(STEPS))
    print(f"{equal} of {STEPS} replies are bit-equal to the model in one process", flush=True)
    if equal != STEPS:
        raise SystemExit(1)
    Path(sys.argv[1], f"rank-{number}").write_text(str(world))


def step_is_equal(bridge: shmbridge.Bridge, model: torch.nn.Module, step: int, world: int) -> bool:
    """Submit this rank's rows; compare with its rows of the whole batch, computed here."""
    generator = torch.Generator().manual_seed(step)
    rows, seq = 1 + step % 4, 5 + 7 * (step % 9)
    everyone = torch.randint(0, VOCAB, (world * rows, seq), generator=generator)
    mine = slice(bridge.rank * rows, (bridge.rank + 1) * rows)
    pending = bridge.submit(everyone[mine], step=step)
    with torch.inference_mode():
        reference = model(input_ids=everyone.to(model.device)).logits[mine]
        with pending.wait() as reply:
            return reply.logits.device == reference.device and torch.equal(reply.logits, reference)


if __name__ == "__main__":
    if os.environ.get("SHMBRIDGE_SESSION"):
        rank()
    else:
        sys.exit(main())
