"""Is every reply bit for bit what the model gives in one process? A tiny random teacher, two ranks, no downloads.

    python scripts/smoke_test.py                                    # two CPU ranks
    python scripts/smoke_test.py --teacher-gpu 1 --train-gpus 0     # the same on GPUs

Exits 0 only when every reply equalled the reference. Started by torchrun it is one of the ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 20
VOCAB = 512


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="smoke-") as directory:
        save_teacher(directory)
        devices = sys.argv[1:] or ["--cpu", "2"]
        settings = [
            f"run_dir={directory}/runs",
            "teacher.collect=lockstep",  # so that every rank knows what else was in the forward
            "teacher.cpu_threads=1",  # sums depend on the number of threads, so all processes have the same
            "train.cpu_threads=1",
            "payload.logits.dtype=float32",
            "ring.max_tokens=1024",
        ]
        command = [
            sys.executable,
            "-m",
            "shmbridge.launch",
            "--teacher",
            directory,
            *devices,
            *settings,
            "--",
            __file__,
            directory,
        ]
        code = subprocess.run(command, check=False).returncode
        told = [json.loads(file.read_text()) for file in Path(directory).glob("rank-*.json")]
        if code == 0 and not (told and len(told) == told[0]["world"]):
            print(f"the run ended well but only {len(told)} ranks told their result")
            return 1
        return code


def save_teacher(directory: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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


def rank() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import shmbridge

    with shmbridge.connect() as bridge:
        bridge.wait_ready()
        world, rank_number = int(os.environ["WORLD_SIZE"]), bridge.rank
        device = torch.device("cuda", bridge.rank) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model = AutoModelForCausalLM.from_pretrained(bridge.teacher.path).to(device).eval()
        equal = sum(step_is_equal(bridge, model, step, world) for step in range(STEPS))
    print(f"{equal} of {STEPS} replies are bit-equal to the model in one process", flush=True)
    if equal != STEPS:
        raise SystemExit(1)
    result = {"world": world, "equal": equal}
    (Path(sys.argv[1]) / f"rank-{rank_number}.json").write_text(json.dumps(result))


def step_is_equal(bridge, model, step: int, world: int) -> bool:
    """Submit this rank's rows; compare with its rows of the whole batch, computed here."""
    import torch

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
