"""The scripts that people run: the smoke test, the demo, the examples."""

from __future__ import annotations

import json
import os
import re
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
def test_the_demo_distils_a_student_and_trains_another_on_the_text_alone(tmp_path):
    """For the time that it was given; then the control takes the same steps. One line of progress, one picture."""
    teacher = tmp_path / "tiny.gguf"
    gguf_file.write(teacher)
    out = tmp_path / "out"
    launch = [
        "-m",
        "shmbridge.launch",
        "--config",
        "configs/demo.yaml",
        "--cpu",
        "2",
        "--run-dir",
        str(tmp_path / "runs"),
    ]
    script = "scripts/demo/train.py --minutes 0.05 --batch 2 --seq 32 --layers 1 --lr 1e-2 --characters 500000 --out"
    output = run(*launch, "--teacher", str(teacher), "--", *script.split(), str(out), XDG_CACHE_HOME=str(tmp_path))
    assert re.search(
        r"distilled +[█░]+ step \d+ +\d+ tokens/s  loss +[\d.]+ +\d+% of the teacher's time hidden", output
    )
    assert "KL to the teacher, nats" in output
    summary = json.loads((out / "summary.json").read_text())
    distilled, control = summary["students"]["distilled"], summary["students"]["text alone"]
    assert 1 < distilled["seconds"] < 10, "3 s were given"
    assert [score["step"] for score in control["held_out"]] == [score["step"] for score in distilled["held_out"]]
    assert 0 < distilled["held_out"][-1]["kl"] < 0.7 * distilled["held_out"][0]["kl"]
    assert 0 < control["held_out"][-1]["perplexity"] < 0.7 * control["held_out"][0]["perplexity"]
    for name in ("distilled", "text alone"):
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, summary["steps"] + 1))
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
