"""A distillation with the teacher behind the bridge, beside its controls: tokens per second, and memory.

    python scripts/gpu/train.py                       on the GPUs that there are
    python scripts/gpu/train.py --device cpu          without one, with a tiny model; shows that the program works, no more

Teacher and student are made from configurations: random weights and random tokens take as long as real ones. --models names
their proportions: Llama 3.1 8B and Llama 3.2 1B, SmolLM2-135M and a third of its layers (for smaller cards), or tiny.

The arms run the same loop, forward KL on the teacher's hidden states, from the same student on the same batches: over the
bridge with the teacher one batch ahead, and not ahead; with the teacher in the rank's own process; and the student alone,
which is given one and the same answer in every step. The teacher is in bfloat16, and so is the student under autocast with
float32 weights. A layout says which cards the teacher and the ranks have; several ranks on one card need gloo.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
STEP_LIMIT = 1.03  # of the slower of teacher and student, where they do not share a card
LOSS_LIMIT = 0.02  # how far the mean losses of arms may be apart, relative: sums of bfloat16 in another order
AHEAD, IN_PROCESS, ALONE = "bridge, teacher ahead", "teacher in the rank's process", "student alone"

_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MADE = {  # words, then the shapes of teacher and student
    "8b-to-1b": (128_256, (4096, 14336, 32, 32, 8), (2048, 8192, 16, 32, 8)),
    "smollm2": (49_152, (576, 1536, 30, 9, 3), (576, 1536, 10, 9, 3)),
    "tiny": (512, (64, 128, 2, 4, 2), (32, 64, 2, 4, 2)),
}


@dataclass
class Layout:
    """Where the teacher and the ranks are."""

    name: str
    teacher: str  # of --teacher-gpu; empty: the CPU
    train: str  # of --train-gpus; empty: the CPU
    backend: str = "nccl"

    @property
    def ranks(self) -> list[str]:
        return self.train.split(",")

    @property
    def shared(self) -> bool:
        """Whether the teacher takes time from a rank."""
        return self.teacher in self.ranks


@dataclass
class Found:
    """Of one layout: for each arm what distil.py wrote."""

    layout: Layout
    arms: dict[str, dict[str, Any]]


class Models(NamedTuple):
    teacher: Path
    student: Path
    tokens: Path  # (rows, seq) int64


def main() -> int:
    """Prepare the models, run every layout, print; 1 where a run failed or a target is missed, 2 where there is no GPU."""
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"train: needs a GPU; torch.cuda.is_available() is False (torch {torch.__version__})", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    models, told = prepare(options)
    found = [Found(layout, measure(layout, models, options)) for layout in layouts(options)]
    aims = targets(found)
    title = f"Distillation ({told}; {options.steps - options.warmup} steps of {options.batch} x {options.seq} tokens a rank)"
    shown = markdown(title, found)
    print(shown)
    for aim in aims:
        print(f"{'reached' if aim['reached'] else 'missed'}: {aim['text']}: {aim['found']}, limit {aim['limit']}")
    (options.out / "train.md").write_text(shown)
    figures = {"models": told, "layouts": [asdict(each) for each in found], "targets": aims}
    (options.out / "train.json").write_text(json.dumps(figures, indent=1))
    return int(not all(aim["reached"] for aim in aims))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", choices=MADE, help="(default: 8b-to-1b on GPUs, tiny on the CPU)")
    parser.add_argument("--steps", type=int, default=40, help="of each arm, warm-up included (default: 40)")
    parser.add_argument("--warmup", type=int, default=8, help="steps that are not timed (default: 8)")
    parser.add_argument("--batch", type=int, help="rows of each rank (default: 4; tiny: 2)")
    parser.add_argument("--seq", type=int, help="tokens of each row (default: 1024; tiny: 32)")
    parser.add_argument("--teacher-gpu", metavar="GPU", help="with --train-gpus: this layout alone")
    parser.add_argument("--train-gpus", metavar="GPUS", help="such as 0,1, or 0,0 for two ranks on one card")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu_check", help="models, logs, train.json, train.md"
    )
    options = parser.parse_args(arguments)
    if (options.teacher_gpu is None) != (options.train_gpus is None):
        parser.error("--teacher-gpu and --train-gpus go together")
    if not 0 < options.warmup < options.steps:
        parser.error(f"--warmup is {options.warmup} and --steps {options.steps}; expected 0 < warmup < steps")
    options.models = options.models or ("8b-to-1b" if options.device == "cuda" else "tiny")
    options.batch = options.batch or (2 if options.models == "tiny" else 4)
    options.seq = options.seq or (32 if options.models == "tiny" else 1024)
    options.out = options.out.absolute()
    return options


def layouts(options: argparse.Namespace) -> list[Layout]:
    """The one that is asked for, or those of the machine's cards."""
    if options.device == "cpu":
        return [Layout("CPU: the teacher and a rank", "", "", "gloo")]
    if options.train_gpus:
        cards = options.train_gpus.split(",")
        name = f"teacher on {options.teacher_gpu}, ranks on {options.train_gpus}"
        backend = "nccl" if len(set(cards)) == len(cards) else "gloo"
        return [Layout(name, options.teacher_gpu, options.train_gpus, backend)]
    return layouts_of(torch.cuda.device_count())


def layouts_of(cards: int) -> list[Layout]:
    """On one card, on two, and on eight one teacher beside seven ranks. A single rank is in a group of gloo: it exchanges no
    gradients."""
    found = [Layout("one card: the teacher and a rank share it, gloo", "0", "0", "gloo")]
    if cards == 2:
        found.append(Layout("two cards: the teacher has one, a rank the other, gloo", "1", "0", "gloo"))
        found.append(Layout("two cards: a rank on each, NCCL; the teacher shares the second", "1", "0,1"))
    if cards > 2:
        found.append(Layout("three cards: two ranks, NCCL; the teacher has the third", "2", "0,1"))
    if cards > 3:
        ranks = ",".join(map(str, range(cards - 1)))
        found.append(Layout(f"{cards} cards: {cards - 1} ranks, NCCL; the teacher has the last", str(cards - 1), ranks))
    return found


# Models


def prepare(options: argparse.Namespace) -> tuple[Models, str]:
    """The directories of both models and the tokens, made where they are not there yet; and what they are."""
    folder = options.out / "models" / f"{options.models}-{options.seq}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # In a process of its own: no CUDA context of this one may take memory on a card while runs are measured.
        process = multiprocessing.get_context("spawn").Process(target=make, args=(partial, options))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"train: the models could not be made (exit code {process.exitcode}; the error is above)")
        partial.rename(folder)
    words, *shapes = MADE[options.models]
    teacher, student = (f"{shape[2]} layers of width {shape[0]}" for shape in shapes)
    told = f"random weights and tokens: teacher {teacher}, student {student}, {words} words"
    return Models(folder / "teacher", folder / "student", folder / "tokens.pt"), told


def make(folder: Path, options: argparse.Namespace) -> None:
    """Random weights; on the GPU, where billions of them take seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words, *shapes = MADE[options.models]
    torch.set_default_dtype(torch.bfloat16)
    for seed, (name, shape) in enumerate(zip(("teacher", "student"), shapes, strict=True)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=words,
            tie_word_embeddings=name == "student",
            max_position_embeddings=max(2048, options.seq),
            dtype="bfloat16",
            **dict(zip(_SHAPE, shape, strict=True)),
        )
        with torch.device(options.device):
            LlamaForCausalLM(config).save_pretrained(folder / name)
    torch.set_default_dtype(torch.float32)
    torch.save(torch.randint(words, (256, options.seq)), folder / "tokens.pt")


# Runs


def measure(layout: Layout, models: Models, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both launches of a layout: over the bridge, then the controls. Raises SystemExit where one fails."""
    print(layout.name, flush=True)
    found: dict[str, dict[str, Any]] = {}
    for bridge in (True, False):
        out = options.out / f"train.rank0-{'bridge' if bridge else 'controls'}.json"
        out.unlink(missing_ok=True)
        code = subprocess.run(command(layout, models, options, out, bridge=bridge), cwd=ROOT, check=False).returncode
        if code or not out.exists():
            raise SystemExit(f"train: the run ended with exit code {code} (its output is above): {layout.name}")
        found |= json.loads(out.read_text())
    return found


def command(layout: Layout, models: Models, options: argparse.Namespace, out: Path, *, bridge: bool) -> list[str]:
    """Of one launch of distil.py, whose rank 0 writes to `out`."""
    tokens = options.batch * options.seq
    cards = len(set(layout.ranks)) if layout.train else 0
    return [
        *(sys.executable, "-m", "shmbridge.launch"),
        *([] if bridge else ["--no-teacher"]),
        *("--teacher", str(models.teacher), *(["--teacher-gpu", layout.teacher] if layout.teacher else [])),
        *(["--train-gpus", layout.train] if layout.train else ["--cpu", "1", "train.cpu_threads=1"]),
        "payload.hidden={}",
        f"teacher.dtype={'bfloat16' if layout.teacher else 'float32'}",
        "teacher.collect=lockstep",  # one forward answers all ranks, so its time is the teacher's time of a step
        f"teacher.max_batch_tokens={tokens * len(layout.ranks)}",
        f"ring.max_tokens={tokens}",
        "ring.depth=2",
        f"run_dir={options.out / 'train-runs'}",
        "--",
        str(ROOT / "scripts" / "gpu" / "distil.py"),
        *("--teacher", str(models.teacher), "--student", str(models.student), "--tokens", str(models.tokens)),
        *("--out", str(out), "--backend", layout.backend, "--cards", str(cards)),
        *("--steps", str(options.steps), "--warmup", str(options.warmup), "--batch", str(options.batch)),
    ]


# What is shown


def targets(found: list[Found]) -> list[dict[str, Any]]:
    """As of benchmarks.tables.Target. The step is judged where the teacher takes no time from a rank."""
    aims = []
    for each in found:
        losses = {name: statistics.fmean(arm["losses"]) for name, arm in each.arms.items() if name != ALONE}
        apart = max(abs(loss / losses[IN_PROCESS] - 1) for loss in losses.values())
        apart = apart if all(map(math.isfinite, losses.values())) else math.inf
        aims.append((f"losses as with the teacher in the process, {each.layout.name}", LOSS_LIMIT, apart))
        if each.layout.train and not each.layout.shared:
            ahead, slower_s = each.arms[AHEAD], max(each.arms[AHEAD]["teacher_s"], each.arms[ALONE]["step_s"])
            text = f"step / the longer of teacher and student, {each.layout.name}"
            aims.append((text, STEP_LIMIT, ahead["step_s"] / slower_s))
    return [
        {"text": text, "limit": f"{limit:g}", "found": f"{value:.4f}", "reached": value <= limit}
        for text, limit, value in aims
    ]


def markdown(title: str, found: list[Found]) -> str:
    """A table for each layout."""
    return "\n".join([f"#### {title}", *(line for each in found for line in _lines(each))]) + "\n"


def _lines(found: Found) -> Iterator[str]:
    ahead, alone_s = found.arms[AHEAD], found.arms[ALONE]["step_s"]
    yield ""
    yield (
        f"{found.layout.name}. A step: teacher {1000 * ahead['teacher_s']:.1f} ms, student {1000 * alone_s:.1f} ms; with the "
        f"teacher ahead a rank waits {ahead['waited_share']:.0%} of it."
    )
    yield ""
    yield "| arm | step | tokens/s | x student alone | peak of a rank | in use on the cards | loss, first and last |"
    yield "|---|---|---|---|---|---|---|"
    for name, arm in found.arms.items():
        cards = ", ".join(f"{gib:.1f}" for gib in arm["cards_gib"])
        yield (
            f"| {name} | {1000 * arm['step_s']:.1f} ms | {arm['tokens_per_s']:,.0f} | {arm['step_s'] / alone_s:.2f} "
            f"| {arm['rank_gib']:.2f} GiB | {f'{cards} GiB' if cards else '-'} "
            f"| {arm['losses'][0]:.4f}, {arm['losses'][-1]:.4f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
