"""What a person runs: the smoke test, the training script, the template of a teacher of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shmbridge import config, offering
from shmbridge.offer import OutputSpec
from shmbridge.teacher_job import build
from tests import gguf_file

ROOT = Path(__file__).parents[2]


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_smoke_test_finds_every_reply_bit_equal():
    assert run("scripts/smoke_test.py").count("20 of 20 replies are bit-equal") == 2


@pytest.mark.slow
def test_the_training_script_distils_a_gguf_teacher(tmp_path):
    teacher = tmp_path / "tiny.gguf"
    gguf_file.write(teacher)
    out = tmp_path / "out"
    launch = ["-m", "shmbridge.launch", "--cpu", "2", "--run-dir", str(tmp_path / "runs"), "--teacher", str(teacher)]
    script = "scripts/train_student.py --steps 30 --batch 2 --seq 32 --layers 1 --lr 1e-2 --eval-batches 2 --out"
    run(*launch, "ring.max_tokens=128", "--", *script.split(), str(out), XDG_CACHE_HOME=str(tmp_path / "cache"))
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["kl_after"] < 0.7 * summary["kl_before"]
    assert {"perplexity_before", "perplexity_after", "steps", "seconds"} <= set(summary)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(30))
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_template_of_a_teacher_of_ones_own(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaModel

    shape = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaModel(shape).save_pretrained(tmp_path)
    monkeypatch.chdir(ROOT)
    settings = config.load(
        overrides=["teacher.model=scripts.custom_teacher:build", f"teacher.args={{path: {tmp_path}}}"]
    )
    device = torch.device("cpu")
    agreed, _ = offering.make(build(None, settings, device, 0), settings, device)
    assert agreed.vocab_size == 50
    assert agreed.outputs == (OutputSpec("hidden", "float32", ("seq", 16)), OutputSpec("value", "float32", ("seq",)))
