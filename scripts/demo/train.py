"""The training script of `make demo`: a student that the teacher distils, beside one that learns from the text alone.

    shmbridge-launch --config configs/demo.yaml --cpu 2 --teacher MODEL -- scripts/demo/train.py --minutes 1.25

Both students are the same cut of the teacher (student.py). For --minutes the first minimises the KL divergence to the
teacher's distribution (Hinton et al. 2015). The second, the control, then minimises the cross-entropy of the text, for the
same steps, on the same batches, at the same learning rates; the teacher is idle meanwhile. Held-out text is scored before,
after, and three times in between. --out gets both students' losses, summary.json, losses.png, and the distilled student with
its tokenizer.

This script is made to be watched. The one to copy is scripts/example.py.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from stage import Stage, connected, parser
from student import Budget, HeldOut, Score, Trainee, cross_entropy, cut

import shmbridge
from shmbridge.losses import LazyLogits, forward_kl

LEGS = 4  # held-out text is scored after each of so many parts of the training
SCORED = 128  # tokens of a held-out row
NEXT = """\
On a node with eight GPUs, with your own teacher, student and text:
  shmbridge-launch --config eight-gpus --teacher TEACHER -- \\
    scripts/example.py STUDENT TEXT OUT"""


def main() -> None:
    args = parse()
    with connected() as (bridge, device):
        run(args, bridge, device)


def parse() -> argparse.Namespace:
    about = "Distil a teacher into a student of fewer layers, beside a control."
    made = parser(about, minutes=1.25, batch=1, held_out=4)
    args = made.parse_args()
    for name, least in (("minutes", 0.01), ("batch", 1), ("seq", 2), ("layers", 1), ("held_out", 1)):
        if getattr(args, name) < least:
            made.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    return args


def run(args: argparse.Namespace, bridge: shmbridge.Bridge, device: torch.device) -> None:
    """Train both students and report."""
    torch.manual_seed(0)
    stage = Stage(args, bridge, device)
    bridge.wait_ready(
        tokenizer=stage.tokenizer, loss=lambda logits, reply: forward_kl(logits, LazyLogits(reply.hidden, bridge.head))
    )
    text = stage.held_out(SCORED)
    student = cut(stage.model, args.layers).to(device)
    distilled, control = (
        stage.trainee(name, each, args.lr)
        for name, each in (("distilled", student), ("text alone", copy.deepcopy(student)))
    )
    before = text.score(student)
    if stage.rank == 0:
        print("hidden: the share of the teacher's time without a wait in this rank")
    shares = distil(distilled, bridge.prefetch(stage.batches()), text, Budget(args.minutes, device), bridge)
    with bridge.phase("control", timeout=600 + 180 * args.minutes):  # it makes no request: the teacher is idle
        train_on_text(control, stage.batches(), text, shares)
    teacher = text.teacher()
    if stage.rank == 0:
        stage.tokenizer.save_pretrained(args.out / "student")
        distilled.student.save_pretrained(args.out / "student")
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
                    hid = hidden_share(begin, bridge.stats())
                    student.learn(loss, share, f"  {hid:4.0%} hidden")
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
    weights = list(distilled.student.parameters())
    summary = {
        "ranks": dist.get_world_size(),
        "steps": distilled.steps,
        "tokens": distilled.tokens,
        "student_layers": len(distilled.student.model.layers),
        "student_parameters": sum(weight.numel() for weight in weights),
        "trained_parameters": sum(weight.numel() for weight in weights if weight.requires_grad),
        "teacher_perplexity": teacher.perplexity,
        "students": {
            student.name: {
                "seconds": student.seconds,
                "held_out": [{"step": step, **score._asdict()} for step, score in [(0, before), *student.scores]],
            }
            for student in (distilled, control)
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(out)
    print(f"""
held-out text           {"before":>10} {distilled.name:>11} {control.name:>11} {"teacher":>9}
KL to the teacher, nats {before.kl:10.3f} {after[0].kl:11.3f} {after[1].kl:11.3f} {0:9}
perplexity              {before.perplexity:10,.0f} {after[0].perplexity:11.1f} {after[1].perplexity:11.1f} {teacher.perplexity:9.1f}
training time           {distilled.seconds:20.0f} s {control.seconds:9.0f} s

{distilled.steps} steps of each student on the same {distilled.tokens:,} tokens
losses    {out / "losses.png"}, {out / "summary.json"}
student   {out / "student"}, a model with its tokenizer

{NEXT}""")


if __name__ == "__main__":
    main()
