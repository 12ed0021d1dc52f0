"""The scripts that people run: the smoke test, the demo, the examples."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shmbridge import config
from shmbridge.output_spec import OutputSpec
from shmbridge.teacher import output_discovery
from shmbridge.teacher.main import build
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
    assert re.search(r"distilled +[█░]+ step \d+ +\d+ tok/s  loss +[\d.]+ +\d+% hidden", output)
    assert "KL to the teacher, nats" in output
    summary = json.loads((out / "summary.json").read_text())
    distilled, control = summary["students"]["distilled"], summary["students"]["text alone"]
    assert 1 < distilled["seconds"] < 10, "3 s were given"
    assert [score["step"] for score in control["held_out"]] == [score["step"] for score in distilled["held_out"]]
    assert 0 < distilled["held_out"][-1]["kl"] < 0.7 * distilled["held_out"][0]["kl"]
    assert 0 < control["held_out"][-1]["perplexity"] < 0.7 * control["held_out"][0]["perplexity"]
    for name in ("distilled", "text-alone"):
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, summary["steps"] + 1))
    assert len(AutoModelForCausalLM.from_pretrained(out / "student").model.layers) == 1
    assert AutoTokenizer.from_pretrained(out / "student")("1 2").input_ids
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """A directory with a teacher, a student of the same vocabulary, and lines of unlike lengths as text."""
    directory = tmp_path_factory.mktemp("example")
    gguf_file.write(directory / "tiny.gguf")
    source = {"pretrained_model_name_or_path": str(directory), "gguf_file": "tiny.gguf"}
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory / "teacher")
    shutil.copytree(directory / "teacher", directory / "student")
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        shape = LlamaConfig(
            vocab_size=gguf_file.VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
        )
        LlamaForCausalLM(shape).save_pretrained(directory / name)
    lines = (" ".join(f"{i * j % 97}" for j in range(1, 3 + i * 7 % 11)) for i in range(120))
    (directory / "text").write_text("\n".join(lines))
    return directory


def example_command(example: Path, out: Path) -> list[str]:
    launch = ["-m", "shmbridge.launch", "--cpu", "2", "--run-dir", str(out / "runs")]
    settings = ["--teacher", str(example / "teacher"), "payload.hidden={}", "ring.max_tokens=512"]
    script = ["scripts/example.py", str(example / "student"), str(example / "text"), str(out / "student")]
    return [*launch, *settings, "--", *script]


def trained_without_a_bridge(example: Path) -> tuple[list[float], torch.nn.Module]:
    """What scripts/example.py does, in one process: the losses of the steps, and the student."""
    tokenizer = AutoTokenizer.from_pretrained(example / "student")
    teacher = AutoModelForCausalLM.from_pretrained(example / "teacher").eval()
    student = AutoModelForCausalLM.from_pretrained(example / "student")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    texts = (example / "text").read_text().splitlines()
    losses = []
    for epoch in range(2):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(epoch)).tolist()
        for at in range(0, len(texts), 8):
            rows = [tokenizer(texts[i], return_tensors="pt").input_ids for i in order[at : at + 8]]
            loss = sum(loss_of_a_row(student, teacher, row) for row in rows) / sum(row.shape[1] - 1 for row in rows)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses, student


def loss_of_a_row(student: torch.nn.Module, teacher: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy and KL, summed over the tokens of a row that is not padded."""
    log_q = student(input_ids=ids).logits[0, :-1].log_softmax(-1)
    with torch.no_grad():
        log_p = teacher(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return F.nll_loss(log_q, ids[0, 1:], reduction="sum") + F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def told_losses(output: str) -> dict[int, float]:
    """Step to loss, the mean of both ranks."""
    told: dict[int, list[float]] = defaultdict(list)
    for step, loss in re.findall(r"step (\d+)  loss ([\d.]+)", output):
        told[int(step)].append(float(loss))
    assert all(len(losses) == 2 for losses in told.values())
    return {step: sum(losses) / 2 for step, losses in told.items()}


def assert_trained_as(student: torch.nn.Module, directory: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for name, weight in student.state_dict().items():
        torch.testing.assert_close(
            found[name], weight, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_example_trains_as_one_process_that_has_both_models(example, tmp_path):
    """Padded batches, unlike numbers of tokens in the ranks, two epochs."""
    told = told_losses(run(*example_command(example, tmp_path)))
    losses, student = trained_without_a_bridge(example)
    assert told == pytest.approx(dict(enumerate(losses, 1)), rel=1e-5)
    assert_trained_as(student, tmp_path / "student")


@pytest.mark.slow
def test_the_trainers_example_trains_and_goes_on_from_its_checkpoint(example, tmp_path):
    def trained_epochs(epochs: int) -> list[dict]:
        out = tmp_path / "out"
        launch = ["-m", "shmbridge.launch", "--cpu", "1", "--run-dir", str(tmp_path / f"run-{epochs}")]
        settings = ["--teacher", str(example / "teacher"), "payload.hidden={}", "ring.max_tokens=512", "--"]
        script = ["scripts/example_trainer.py", str(example / "student"), str(example / "text")]
        given = (
            f"--output_dir {out} --use_cpu --ce_weight 1 --num_train_epochs {epochs} --per_device_train_batch_size 8"
        )
        more = "--save_strategy epoch --logging_steps 1 --learning_rate 1e-3 --report_to none --disable_tqdm True"
        run(*launch, *settings, *script, *given.split(), *more.split())
        return json.loads((out / f"checkpoint-{15 * epochs}" / "trainer_state.json").read_text())["log_history"]

    told = trained_epochs(1)
    assert [line["step"] for line in told] == list(range(1, 16))
    assert all(line["loss"] == pytest.approx(line["kd/kl"] + line["kd/ce"], rel=1e-5) for line in told)
    assert trained_epochs(2)[:15] == told, "the second run did not begin at the first's checkpoint"


@pytest.mark.slow
def test_the_example_goes_on_from_where_it_was_stopped(example, tmp_path):
    command = [sys.executable, *example_command(example, tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout
        while "step 3 " not in (line := job.stdout.readline()):
            assert line, "it ended before step 3"
        job.send_signal(signal.SIGTERM)
        output = job.stdout.read()
    assert job.returncode == 128 + signal.SIGTERM, output
    step = torch.load(tmp_path / "student" / "checkpoint.pt", weights_only=True)[0]
    assert 3 <= step < 30
    assert min(told_losses(run(*example_command(example, tmp_path)))) == step + 1
    assert_trained_as(trained_without_a_bridge(example)[1], tmp_path / "student")


@pytest.mark.parametrize(
    ("learner", "payload"),
    [
        pytest.param("teacher", ["payload.hidden={}"], id="reverse_kl"),
        pytest.param(
            "student",
            ["payload.logits=null", "payload.logprobs={candidates: 8}"],
            id="candidate_reverse_kl",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_on_policy(example, tmp_path, learner, payload):
    """Prompts of unlike lengths, samples that end at unlike lengths, text in half of the steps. A student that is the teacher has
    the loss 0 on its own samples too; another one comes nearer."""
    words = ["hello", "world", "the cat", "sat on", "a mat and slept"]
    rows = [{"prompt": " ".join(words[: 1 + i % 5]), "completion": words[i % 3]} for i in range(128)]
    (tmp_path / "data").write_text("\n".join(json.dumps(row) for row in rows))
    launch = ["-m", "shmbridge.launch", "--cpu", "2", "--run-dir", str(tmp_path / "runs"), "ring.max_tokens=8192"]
    script = ["scripts/on_policy.py", str(example / learner), str(tmp_path / "data"), str(tmp_path / "out")]
    settings = ["--on-policy", "0.5", "--length", "24", "--lr", "1e-2" if learner == "student" else "0"]
    output = run(*launch, "--teacher", str(example / "teacher"), *payload, "--", *script, *settings)
    losses = [abs(float(loss)) for loss in re.findall(r"step \d+  loss (-?[\d.]+)", output)]
    assert len(losses) == 2 * 16
    if learner == "teacher":
        assert max(losses) < 1e-5
    else:
        before, after = (reverse_kl_to_teacher(example, at) for at in (example / "student", tmp_path / "out"))
        assert after < 0.8 * before


@torch.no_grad()
def reverse_kl_to_teacher(example: Path, student: Path) -> float:
    """Nats per token, on samples of the student."""
    teacher, model = (AutoModelForCausalLM.from_pretrained(path) for path in (example / "teacher", student))
    torch.manual_seed(0)
    prompts = torch.randint(0, gguf_file.VOCAB, (32, 4))
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=16)
    log_q, log_p = (each(ids).logits[:, 3:].log_softmax(-1) for each in (model, teacher))
    return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())


def test_the_template_of_a_teacher_of_ones_own(tmp_path, monkeypatch):
    from transformers import LlamaModel

    shape = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaModel(shape).save_pretrained(tmp_path)
    monkeypatch.chdir(ROOT)
    settings = config.load(
        overrides=["teacher.model=scripts.custom_teacher:build", f"teacher.args={{path: {tmp_path}}}"]
    )
    device = torch.device("cpu")
    agreed, _ = output_discovery.make(build(None, settings, device, 0), settings, device)
    assert agreed.vocab_size == 50
    assert agreed.outputs == (OutputSpec("hidden", "float32", ("seq", 16)), OutputSpec("value", "float32", ("seq",)))


def test_scripts_that_print_tables_say_that_they_need_rich():
    code = (
        "import runpy, sys\nsys.modules['rich'] = None\nfor name in ('bench', 'faults', 'soak'):\n"
        "    try: runpy.run_path(f'scripts/{name}.py', run_name='__main__')\n"
        "    except SystemExit as end: print(name, end.code)"
    )
    variables = {**os.environ, "PYTHONPATH": "scripts"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert ended.stdout.splitlines() == ["bench 2", "faults 2", "soak 2"], ended.stderr
    assert ended.stderr.splitlines() == ["needs rich: pip install '.[test]'"] * 3
