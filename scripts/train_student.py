"""Distil a teacher into a student of fewer layers: DDP, one process per rank, the teacher behind the bridge.

    shmbridge-launch --config configs/demo.yaml --cpu 2 --teacher MODEL -- scripts/train_student.py --steps 80
    shmbridge-launch --no-teacher --cpu 2 -- scripts/train_student.py --base DIRECTORY      # cross-entropy only

The student is cut out of its teacher as in DistilBERT (Sanh et al. 2019): every n-th layer, the first and the last among
them, with the teacher's embeddings, which stay frozen. Such a cut knows less than nothing (its perplexity is worse than a
uniform guess over the vocabulary) and learns fast. Any decoder of Llama's shape in transformers can be cut.

The loss is the forward KL(teacher || student) at a temperature (Hinton et al. 2015), a mean over tokens. Every rank has
the same number of tokens, so DDP's mean of the ranks' gradients is the gradient of the mean over all tokens. Neither side's
logits are ever whole: the loss applies the student's head, and with the payload hidden the teacher's, to a few rows at a
time. Payloads: hidden (exact and small), logits, or topk; whole or streamed.

Held-out text is scored before and after, against the teacher, over the same bridge. In --out: metrics.jsonl, one line a
step; losses.png; summary.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import corpus
import torch
import torch.distributed as dist
from plot_losses import plot
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import shmbridge
from shmbridge.head import Head
from shmbridge.losses import LazyLogits, TopK, forward_kl, topk_kl

Student = LazyLogits | torch.Tensor


def main() -> None:
    args = parse()
    with shmbridge.connect() as bridge:
        device = rank_device(bridge)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        run(args, bridge, device)
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distil a teacher into a student of fewer layers.")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=2, help="rows of each rank")
    parser.add_argument("--seq", type=int, default=128, help="tokens of each row")
    parser.add_argument("--layers", type=int, default=8, help="of the student, taken evenly from the teacher's")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=5, help="steps")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the KL divergence")
    parser.add_argument("--ce-weight", type=float, default=0.0, help="cross-entropy on the text, beside the KL's 1")
    parser.add_argument(
        "--bf16", action="store_true", help="autocast; fast on GPUs and on CPUs with AVX512-BF16 or AMX"
    )
    parser.add_argument("--eval-batches", type=int, default=12, help="held-out batches of each rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", help="model to cut the student from (default: the teacher's own files)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    for name in ("steps", "batch", "layers", "eval_batches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.seq < 2:
        parser.error(f"--seq is {args.seq}; it must be at least 2, a token and the next")
    return args


def rank_device(bridge: shmbridge.Bridge) -> torch.device:
    """This rank's GPU where the launcher gave training GPUs, else the CPU."""
    on_gpu = bool(bridge.settings.train.gpus) if bridge.enabled else torch.cuda.is_available()
    if not on_gpu:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def run(args: argparse.Namespace, bridge: shmbridge.Bridge, device: torch.device) -> None:
    """Build, score, train, score again, write."""
    torch.manual_seed(args.seed)
    rank, world = dist.get_rank(), dist.get_world_size()
    base = args.base or base_of(bridge)
    train, held_out = text(args, base)
    held_out_batches = corpus.spread(held_out, args.eval_batches, args.batch, rank, world)
    student = cut(base, args.layers).to(device)
    say(
        f"student: {args.layers} layers, {parameters(student) / 1e6:.1f} M parameters, {trained(student) / 1e6:.1f} M trained"
    )
    bridge.wait_ready(
        vocab_size=student.get_output_embeddings().weight.shape[0],
        tokenizer=AutoTokenizer.from_pretrained(base),
        loss=lambda logits, reply: divergence(bridge)(
            logits, teacher_of(reply, bridge, args.temperature), temperature=args.temperature
        ),
    )

    before = evaluate(student, bridge, held_out_batches, device, args.bf16, args.temperature)
    started = time.monotonic()
    fit(args, student, bridge, corpus.shuffled(train, args.batch, rank, world, args.seed), device)
    seconds = time.monotonic() - started
    after = evaluate(student, bridge, held_out_batches, device, args.bf16, args.temperature)
    if rank == 0:
        report(args, student, before, after, seconds)


def base_of(bridge: shmbridge.Bridge) -> str:
    if not bridge.enabled:
        raise SystemExit("the bridge is off, so no teacher tells where its files are: give --base DIRECTORY")
    return bridge.teacher.path


def text(args: argparse.Namespace, base: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out windows; rank 0 tokenises, the others wait for it in the default group."""
    cache = args.out / f"tokens-{Path(base).name}.pt"
    if dist.get_rank() == 0:
        corpus.build(AutoTokenizer.from_pretrained(base), cache)
    dist.barrier()
    return corpus.load(cache, args.seq)


def cut(base: str, layers: int) -> torch.nn.Module:
    """A model with `layers` of the layers of `base`, in float32, its embeddings and output head frozen."""
    whole = AutoModelForCausalLM.from_pretrained(base).float()
    depth = whole.config.num_hidden_layers
    if layers > depth:
        raise SystemExit(f"--layers is {layers}; {base} has {depth}")
    kept = torch.linspace(0, depth - 1, layers).round().long().tolist()
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    student = AutoModelForCausalLM.from_config(config).float()
    for new, old in enumerate(kept):
        student.model.layers[new].load_state_dict(whole.model.layers[old].state_dict())
    student.model.norm.load_state_dict(whole.model.norm.state_dict())
    for part in ("get_input_embeddings", "get_output_embeddings"):
        frozen = getattr(student, part)()
        frozen.load_state_dict(getattr(whole, part)().state_dict())
        frozen.requires_grad_(False)
    return student


def fit(
    args: argparse.Namespace,
    student: torch.nn.Module,
    bridge: shmbridge.Bridge,
    batches: Iterator[torch.Tensor],
    device: torch.device,
) -> None:
    """The training loop."""
    trunk = DistributedDataParallel(student.model, device_ids=[device] if device.type == "cuda" else None).train()
    head = head_of(student)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.warmup, args.steps))
    with Metrics(args, device, bridge.stats().waited_s) as metrics:
        ahead = bridge.prefetch(islice(batches, args.steps))  # the teacher computes the next batch beside this one
        for step, (input_ids, pending) in enumerate(ahead):
            input_ids = input_ids.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                guess = LazyLogits(trunk(input_ids=input_ids, use_cache=False).last_hidden_state, head)
                kl = distillation_loss(guess, pending, bridge, args.temperature) if bridge.enabled else None
                ce = cross_entropy(guess, input_ids) if kl is None or args.ce_weight else None
            loss = total(kl, ce, args.ce_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            metrics.write(step, loss, kl, ce, schedule.get_last_lr()[0], bridge.stats().waited_s)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    if bridge.enabled:
        say(f"the whole training: {bridge.stats()}")


def head_of(model: torch.nn.Module) -> Head:
    module = model.get_output_embeddings()
    return Head(module.weight, module.bias)


def total(kl: torch.Tensor | None, ce: torch.Tensor | None, ce_weight: float) -> torch.Tensor:
    """What is minimised: the KL and, where it has a weight, the cross-entropy; this alone without a teacher."""
    if kl is None:
        assert ce is not None
        return ce
    return kl if ce is None else kl + ce_weight * ce


def learning_rate(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth; a factor of --lr."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def distillation_loss(
    student: Student, pending: shmbridge.Pending, bridge: shmbridge.Bridge, temperature: float
) -> torch.Tensor:
    """Forward KL(teacher || student) in nats per token, times temperature squared, of a reply as it comes."""
    pieces = ((rows, teacher_of(chunk, bridge, temperature)) for rows, chunk in pending.chunks())
    return divergence(bridge)(student, pieces, temperature=temperature)


def divergence(bridge: shmbridge.Bridge) -> Callable[..., torch.Tensor]:
    """Over all words where the replies tell them, else over the teacher's top k and the rest."""
    names = {spec.name for spec in bridge.teacher.outputs}
    return forward_kl if names & {"hidden", "logits"} else topk_kl


def teacher_of(reply: shmbridge.Reply, bridge: shmbridge.Bridge, temperature: float) -> Student | TopK:
    """The teacher's side of the loss, from whatever a reply or a chunk carries."""
    if "hidden" in reply:
        return LazyLogits(reply.hidden, bridge.head)
    if "logits" in reply:
        return reply.logits
    tails = bridge.teacher.temperatures
    if temperature not in tails:
        raise SystemExit(f"--temperature is {temperature}; payload.topk.temperatures has {list(tails)}")
    return TopK(reply["topk_logprobs"], reply["topk_ids"], reply["tail_logmass"][..., tails.index(temperature)])


def cross_entropy(student: Student, input_ids: torch.Tensor) -> torch.Tensor:
    """Of each row's next tokens, in nats per token: row i tells token i + 1.

    It is the KL from a teacher that is certain of the next token."""
    certain = torch.zeros(*input_ids.shape, 1, device=input_ids.device)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[:, -1] = False
    next_ids = input_ids.roll(-1, dims=1).unsqueeze(-1)
    return topk_kl(student, TopK(certain, next_ids, torch.full_like(certain[..., 0], -torch.inf)), mask=mask)


@torch.no_grad()
def evaluate(
    student: torch.nn.Module,
    bridge: shmbridge.Bridge,
    batches: Sequence[torch.Tensor],
    device: torch.device,
    bf16: bool,
    temperature: float,
) -> dict[str, float | None]:
    """The distillation loss in nats per token, and both perplexities, over the batches of all ranks."""
    student.eval()
    head = head_of(student)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # all batches have one shape: a mean of means is the mean
    for input_ids, pending in bridge.prefetch(batches):
        labels = input_ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            guess = LazyLogits(student.model(input_ids=labels, use_cache=False).last_hidden_state, head)
            sums[0] += 1
            sums[1] += cross_entropy(guess, labels)
            reply = pending.copy()
            if not reply.missing:
                sums[2] += divergence(bridge)(guess, teacher_of(reply, bridge, temperature), temperature=temperature)
                sums[3] += teacher_cross_entropy(reply, bridge, labels)
    dist.all_reduce(sums)
    count, ce, kl, teacher_ce = sums.tolist()
    return {
        "kl": kl / count if bridge.enabled else None,
        "perplexity": math.exp(ce / count),
        "teacher_perplexity": math.exp(teacher_ce / count) if bridge.enabled else None,
    }


def teacher_cross_entropy(reply: shmbridge.Reply, bridge: shmbridge.Bridge, labels: torch.Tensor) -> torch.Tensor:
    """Of the next tokens, under the teacher; NaN where the reply does not tell their probability."""
    if "hidden" in reply:
        return cross_entropy(LazyLogits(reply.hidden, bridge.head), labels)
    if "logits" in reply:
        return cross_entropy(reply.logits, labels)
    return -reply["logprobs"][:, :-1].mean() if "logprobs" in reply else torch.tensor(torch.nan)


class Metrics:
    """One JSON line a step, the mean of all ranks, written by rank 0."""

    def __init__(self, args: argparse.Namespace, device: torch.device, waited: float) -> None:
        self._steps = args.steps
        self._tokens = args.batch * args.seq * dist.get_world_size()
        self._device = device
        args.out.mkdir(parents=True, exist_ok=True)
        self._file = (args.out / "metrics.jsonl").open("w") if dist.get_rank() == 0 else None
        self._last = time.monotonic()
        self._waited = waited

    def write(
        self,
        step: int,
        loss: torch.Tensor,
        kl: torch.Tensor | None,
        ce: torch.Tensor | None,
        lr: float,
        waited: float,
    ) -> None:
        """`waited`: seconds that this rank has slept for the teacher since the barrier."""
        seconds, self._last = time.monotonic() - self._last, time.monotonic()
        waited, self._waited = waited - self._waited, waited
        losses = [float(each.detach()) for each in (loss, loss if kl is None else kl, loss if ce is None else ce)]
        values = torch.tensor([*losses, waited / seconds], device=self._device)
        dist.all_reduce(values)
        if self._file is None:
            return
        mean_loss, mean_kl, mean_ce, share = (values / dist.get_world_size()).tolist()
        line = {
            "step": step,
            "loss": mean_loss,
            "kl": None if kl is None else mean_kl,
            "ce": None if ce is None else mean_ce,
            "lr": lr,
            "tokens_per_s": self._tokens / seconds,
            "teacher_wait_share": share,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if (step + 1) % 10 == 0 or step in (0, self._steps - 1):
            print(
                f"step {step + 1:4d}/{self._steps}  loss {mean_loss:6.3f}  "
                f"{line['tokens_per_s']:7.0f} tokens/s  {share:4.0%} of the step waiting for the teacher"
            )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


def report(
    args: argparse.Namespace,
    student: torch.nn.Module,
    before: dict[str, float | None],
    after: dict[str, float | None],
    seconds: float,
) -> None:
    """summary.json, losses.png and the last words."""
    summary = {
        "kl_before": before["kl"],
        "kl_after": after["kl"],
        "perplexity_before": before["perplexity"],
        "perplexity_after": after["perplexity"],
        "teacher_perplexity": after["teacher_perplexity"],
        "steps": args.steps,
        "seconds": seconds,
        "ranks": dist.get_world_size(),
        "tokens": args.steps * args.batch * args.seq * dist.get_world_size(),
        "student_layers": args.layers,
        "student_parameters": parameters(student),
        "trained_parameters": trained(student),
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(args.out)
    say(f"\nheld-out text{'before':>23}{'after':>11}{'teacher':>11}")
    if before["kl"] is not None and after["kl"] is not None:
        say(f"KL to the teacher, nats{before['kl']:>13.3f}{after['kl']:>11.3f}{0:>11}")
    teacher = "" if after["teacher_perplexity"] is None else f"{after['teacher_perplexity']:>11.1f}"
    say(f"perplexity{before['perplexity']:>26.1f}{after['perplexity']:>11.1f}{teacher}")
    say(f"\n{args.steps} steps in {seconds:.0f} s; see {args.out / 'losses.png'} and {args.out / 'summary.json'}")


def parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def trained(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line)


if __name__ == "__main__":
    main()
