"""The training script of `make demo`: a student that the teacher distils, beside one that learns from the text alone.

    shmbridge-launch --config configs/demo.yaml --cpu 2 --teacher MODEL -- scripts/demo/train.py --minutes 1.25

Both students are the same cut of the teacher (student.py). For --minutes the first minimises the KL divergence to the
teacher's distribution (Hinton et al. 2015). The second, the control, then minimises the cross-entropy of the text, for the
same steps, on the same batches, at the same learning rates; the teacher is idle meanwhile. Held-out text is scored before,
after, and three times in between. --out gets both students' losses, summary.json and losses.png.

This script is made to be watched. The one to copy is scripts/example.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path

import corpus
import torch
import torch.distributed as dist
from budget import Budget, Line
from held_out import HeldOut, Score, cross_entropy
from student import cut, parameters
from trainee import Trainee
from transformers import AutoTokenizer

import shmbridge
from shmbridge.losses import LazyLogits, forward_kl

LEGS = 4  # held-out text is scored after each of so many parts of the training
SCORED = 128  # tokens of a held-out row
NEXT = """\
On a node with eight GPUs, with a model, text and student of your own:
  shmbridge-launch --config configs/eight-gpus.yaml --teacher meta-llama/Llama-3.1-8B -- scripts/example.py STUDENT TEXT OUT"""


def main() -> None:
    args = parse()
    with shmbridge.connect() as bridge:
        if not bridge.enabled:
            raise SystemExit("the demo needs its teacher; scripts/example.py runs with --no-teacher too")
        device = torch.device("cpu")
        if bridge.settings.train.gpus:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        run(args, bridge, device)
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distil a teacher into a student of fewer layers, beside a control.")
    parser.add_argument("--minutes", type=float, default=1.25, help="training time of the distilled student")
    parser.add_argument("--batch", type=int, default=1, help="rows of each rank")
    parser.add_argument("--seq", type=int, default=64, help="tokens of each row")
    parser.add_argument("--layers", type=int, default=4, help="of the students, taken evenly from the teacher's")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="autocast; fast on GPUs and CPUs with AVX512-BF16 or AMX")
    parser.add_argument("--held-out", type=int, default=4, help=f"held-out rows of each rank, {SCORED} tokens each")
    parser.add_argument("--characters", type=int, default=1_000_000, help="of text, of which a tenth is held out")
    parser.add_argument("--terminal", action="store_true", help="draw the progress line over itself")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    for name, least in (("minutes", 0.01), ("batch", 1), ("seq", 2), ("layers", 1), ("held_out", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    return args


def run(args: argparse.Namespace, bridge: shmbridge.Bridge, device: torch.device) -> None:
    """Train both students and report."""
    torch.manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    base = bridge.teacher.path
    tokenizer = AutoTokenizer.from_pretrained(base)
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = args.out / f"tokens-{Path(base).name}-{args.characters}.pt"
    if rank == 0:
        corpus.build(tokenizer, args.characters, tokens)
    dist.barrier()
    bridge.wait_ready(
        tokenizer=tokenizer, loss=lambda logits, reply: forward_kl(logits, LazyLogits(reply.hidden, bridge.head))
    )
    text = HeldOut(corpus.spread(corpus.held_out(tokens, SCORED), args.held_out, rank, world), bridge, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    student = cut(base, args.layers).to(device)
    distilled, control = (
        Trainee(name, each, args.lr, autocast, args.out, Line(terminal=args.terminal))
        for name, each in (("distilled", student), ("text alone", copy.deepcopy(student)))
    )
    before = text.score(student, autocast)
    batches = lambda: corpus.shuffled(corpus.train(tokens, args.seq), args.batch, rank, world)  # noqa: E731

    shares = distil(distilled, bridge.prefetch(batches()), text, Budget(60 * args.minutes, device), bridge)
    with bridge.phase("control", timeout=600 + 180 * args.minutes):  # it makes no request: the teacher is idle
        train_on_text(control, batches(), text, shares)
    teacher = text.teacher()
    if rank == 0:
        report(args.out, before, distilled, control, teacher)


def distil(
    student: Trainee, batches: shmbridge.Prefetch, text: HeldOut, budget: Budget, bridge: shmbridge.Bridge
) -> list[list[float]]:
    """Train on the teacher's distributions. Returns, for each leg, the share of the time that was used before each step."""
    legs: list[list[float]] = []
    begin = bridge.stats()
    with batches:
        for leg in range(LEGS):
            legs.append([])
            for share, (input_ids, pending) in zip(budget.steps((leg + 1) / LEGS), batches, strict=False):
                legs[-1].append(share)
                hidden = student.forward(input_ids)
                with pending.wait() as reply:
                    loss = forward_kl(LazyLogits(hidden, student.head), LazyLogits(reply.hidden, bridge.head))
                    student.learn(
                        loss, share, f"  {hidden_share(begin, bridge.stats()):4.0%} of the teacher's time hidden"
                    )
            student.score(text)
    return legs


def train_on_text(student: Trainee, batches: Iterator[torch.Tensor], text: HeldOut, legs: list[list[float]]) -> None:
    """Train on the next tokens of the text, in the same legs."""
    for leg in legs:
        for share, input_ids in zip(leg, batches, strict=False):
            hidden = student.forward(input_ids)
            student.learn(cross_entropy(student.head(hidden), input_ids), share)
        student.score(text)


def hidden_share(begin: shmbridge.Stats, now: shmbridge.Stats) -> float:
    """The share of the teacher's forwards since `begin` during which this rank did not wait."""
    teacher_s = now.teacher_s - begin.teacher_s
    return max(0.0, 1 - (now.waited_s - begin.waited_s) / teacher_s) if teacher_s else 1.0


def report(out: Path, before: Score, distilled: Trainee, control: Trainee, teacher: Score) -> None:
    """summary.json, losses.png and the last words, by rank 0."""
    from plot import plot  # matplotlib takes seconds to import, which the ranks need not wait for

    after = [student.scores[-1][1] for student in (distilled, control)]
    summary = {
        "ranks": dist.get_world_size(),
        "steps": distilled.steps,
        "tokens": distilled.tokens,
        "student_layers": len(distilled.student.model.layers),
        "student_parameters": parameters(distilled.student),
        "trained_parameters": parameters(distilled.student, trained=True),
        "teacher_perplexity": teacher.perplexity,
        "students": {
            student.name: {
                "seconds": student.seconds,
                "held_out": [
                    {"step": step, "kl": score.kl, "perplexity": score.perplexity}
                    for step, score in [(0, before), *student.scores]
                ],
            }
            for student in (distilled, control)
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(out)
    print(f"""
held-out text             {"before":>10} {distilled.name:>11} {control.name:>11} {"teacher":>9}
KL to the teacher, nats   {before.kl:10.3f} {after[0].kl:11.3f} {after[1].kl:11.3f} {0:9}
perplexity                {before.perplexity:10,.0f} {after[0].perplexity:11.1f} {after[1].perplexity:11.1f} {teacher.perplexity:9.1f}
training time             {distilled.seconds:20.0f} s {control.seconds:9.0f} s

{distilled.steps} steps of each student on the same {distilled.tokens:,} tokens; see {out / "losses.png"} and {out / "summary.json"}

{NEXT}""")


if __name__ == "__main__":
    main()
