"""The training script of `scripts/demo.sh --on-policy`: the student's own samples beside the text, for the same time.

    shmbridge-launch --config configs/demo.yaml --cpu 2 --teacher MODEL -- scripts/demo/on_policy.py --minutes 0.75

A student that is cut out of the teacher (student.py) first learns from the teacher's distributions over text, for --warm-up
minutes. Then two copies of it go on for --minutes each, both with the reverse KL divergence on what follows a prompt:
`off-policy` on the text's own continuations, `on-policy` on continuations that the student has just generated. Generating is
part of the time. Both are scored on prompts of held-out text: KL(student || teacher) on samples that the scored student
generates, and KL(teacher || student) on the text.

This script is made to be watched. The one to copy is scripts/on_policy.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from stage import Stage, connected, parser
from student import Budget, cut, head_of, hidden_states

import shmbridge
from shmbridge.losses import LazyLogits, forward_kl, mask_from_labels, reverse_kl

SCORED = 8  # prompts that are scored at a time

Request = dict[str, torch.Tensor]


def main() -> None:
    about = "Distil on the student's own samples, beside the same time on text. The first half of a row is the prompt."
    made = parser(about, minutes=0.75, batch=8, held_out=32)
    made.add_argument(
        "--warm-up", type=float, default=0.75, help="minutes on text before the two ways part; then a quarter of --lr"
    )
    args = made.parse_args()
    with connected() as (bridge, device):
        run(args, bridge, device)


class Score(NamedTuple):
    own: float  # KL(student || teacher) on the student's own samples, nats per token
    text: float  # KL(teacher || student) on held-out text, nats per token


class Way(NamedTuple):
    name: str
    seconds: float
    generating_s: float
    steps: int
    score: Score  # afterwards


class Sampler:
    """Continues prompts by samples from a student's own distribution."""

    def __init__(self, student: Any, seq: int, end: int) -> None:
        """`seq`: tokens of the prompt and its continuation. `end`: the end-of-text token."""
        self._student = student
        self._seq = seq
        self._end = end
        self.seconds = 0.0

    @torch.no_grad()
    def __call__(self, prompts: torch.Tensor) -> Request:
        """A request for the continuations of `prompts` (batch, seq / 2), up to the first end-of-text token of each."""
        started = time.monotonic()
        self._student.eval()
        ids = self._student.generate(
            input_ids=prompts.to(self._student.device),
            attention_mask=torch.ones_like(prompts).to(self._student.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self._seq - prompts.shape[1],
            eos_token_id=self._end,
            pad_token_id=self._end,
        ).cpu()
        self._student.train()
        ends = (ids == self._end).long()
        ends[:, : prompts.shape[1]] = 0
        self.seconds += time.monotonic() - started
        return request(ids, prompts.shape[1], attention_mask=(ends.cumsum(1) - ends == 0).long())


def request(ids: torch.Tensor, prompt: int, attention_mask: torch.Tensor | None = None) -> Request:
    """What is sent for windows (batch, seq) whose first `prompt` tokens are given: outputs for the others alone."""
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "positions": mask_from_labels(labels, shifted=False)}


@torch.no_grad()
def own_score(student: Any, prompts: torch.Tensor, stage: Stage) -> float:
    """KL(student || teacher) on the student's own samples. A collective: the mean over the tokens of all ranks. The random
    numbers are the same for every student."""
    sampler = Sampler(student, stage.args.seq, stage.tokenizer.eos_token_id)
    sums = torch.zeros(2, dtype=torch.float64, device=stage.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.rank)
        for some in prompts.split(SCORED):
            batch = sampler(some)
            reply = stage.bridge.exchange(**batch)
            with stage.autocast:
                hidden = hidden_states(student.model, batch["input_ids"].to(stage.device))[batch["positions"]]
            teacher = LazyLogits(reply.hidden, stage.bridge.head)
            sums[0] += reverse_kl(LazyLogits(hidden, head_of(student)), teacher, num_items=1)
            sums[1] += len(hidden)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def run(args: argparse.Namespace, bridge: shmbridge.Bridge, device: torch.device) -> None:
    torch.manual_seed(dist.get_rank())
    stage, prompt = Stage(args, bridge, device), args.seq // 2
    bridge.wait_ready(tokenizer=stage.tokenizer)
    text = stage.held_out(args.seq)

    def train(
        name: str,
        student: Any,
        lr: float,
        minutes: float,
        loss: Callable[..., torch.Tensor],
        *,
        generates: bool = False,
    ) -> Way:
        """Train on the same windows as every other way, or on the student's own continuations of their first halves."""
        trainee = stage.trainee(name, student, lr)
        sampler = Sampler(student, args.seq, stage.tokenizer.eos_token_id)
        requests = (sampler(ids[:, :prompt]) if generates else request(ids, prompt) for ids in stage.batches())
        started = time.monotonic()
        with bridge.prefetch(requests, dict) as following:  # generates the next batch before this one's reply is read
            for share, (batch, pending) in zip(Budget(minutes, device).steps(1.0), following, strict=False):
                hidden = trainee.forward(batch["input_ids"])[batch["positions"]]
                with pending.wait() as reply:
                    teacher = LazyLogits(reply.hidden, bridge.head)
                    trainee.learn(loss(LazyLogits(hidden, trainee.head), teacher), share)
        seconds = time.monotonic() - started
        score = Score(own_score(student, text.rows[:, :prompt], stage), text.score(student).kl)
        return Way(name, seconds, sampler.seconds, trainee.steps, score)

    student = cut(stage.model, args.layers).to(device)
    before = train("warm-up", student, args.lr, args.warm_up, forward_kl)
    ways = [
        train("off-policy", copy.deepcopy(student), args.lr / 4, args.minutes, reverse_kl),
        train("on-policy", copy.deepcopy(student), args.lr / 4, args.minutes, reverse_kl, generates=True),
    ]
    if stage.rank == 0:
        report(args.out, before, ways)


def report(out: Path, before: Way, ways: list[Way]) -> None:
    """summary.json and the last words, by rank 0."""
    summary = {way.name: {**way._asdict(), "score": way.score._asdict()} for way in (before, *ways)}
    (out / "on-policy.json").write_text(json.dumps(summary, indent=2) + "\n")

    def line(text: str, values: Iterable[Any], form: str) -> str:
        return f"{text:<36}" + "".join(f"{value:>11{form}}" for value in values)

    both = (before, *ways)
    print()
    print(line("", ("before", *(way.name for way in ways)), ""))
    print(line("own samples  KL(student || teacher)", (way.score.own for way in both), ".3f"))
    print(line("text         KL(teacher || student)", (way.score.text for way in both), ".3f"))
    print(line("steps", (way.steps for way in both), ""))
    print(line("seconds", (way.seconds for way in both), ".0f"))
    print(line("  of which generating", (way.generating_s for way in both), ".0f"))


if __name__ == "__main__":
    main()
