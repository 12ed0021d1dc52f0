"""Small trainings with DistillationMixin, and their controls, which share no code with it or with shmbridge.losses.

A Case is trained with the teacher of the bridge, or, by its control, with the same teacher in the same process and the plain
formulas over whole logits in float32. Both give Trainer's log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from shmbridge.integrations.transformers import (
    DistillationConfig,
    DistillationMixin,
    OnPolicyDistillationConfig,
    OnPolicyDistillationMixin,
)

VOCAB, PAD = 96, 0
END = 7  # ends a sample
WORDS = 8  # payload.topk.k
CANDIDATES = 6  # payload.logprobs.candidates
TOLERANCE = 1e-5  # relative
Row = dict[str, list[int]]


@dataclass
class Case:
    """A training: JSON gives its fields to the script that the launcher runs."""

    trainer: str = "trainer"  # or sft
    args: dict[str, Any] = field(default_factory=dict)  # of TrainingArguments or SFTConfig
    distillation: dict[str, Any] = field(
        default_factory=dict
    )  # of DistillationConfig, or of OnPolicyDistillationConfig
    rows: int = 29
    longest: int = 16  # tokens of a row
    unlabelled: int = 0  # every so many rows have no label
    tied: bool = False
    lora: bool = False
    fsdp: bool = False
    dropout: float = 0.0  # of the student's attention
    metrics: bool = False  # compute_metrics, which wants the student's logits
    iterable: bool = False  # a training set without a length
    evaluate: int = 0  # every so many steps
    prompts: bool = True  # the first tokens of a row have no label

    @property
    def samples(self) -> bool:
        """Whether the student samples completions."""
        return "on_policy" in self.distillation

    @property
    def loss(self) -> DistillationConfig:
        return (OnPolicyDistillationConfig if self.samples else DistillationConfig)(**self.distillation)


ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 1,
    "optim": "sgd",  # AdamW makes much of the last digit where a gradient is next to nothing
    "learning_rate": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def distilled(
    case: Case,
    out: Path,
    **arguments: Any,
) -> Any:
    """The trainer of a case; the teacher is the bridge's. `arguments` are more of the trainer's own."""
    mixin = OnPolicyDistillationMixin if case.samples else DistillationMixin
    kind = type("Distilled", (mixin, _base(case)), {})
    return kind(**{**_arguments(case, out), "distillation": case.loss, **arguments})


def control(case: Case, out: Path, teacher: Path | None) -> Trainer:
    """The control of a case. `teacher`: the directory of its model; None: the host's own loss."""
    base = _base(case)
    if case.iterable:  # accelerate dispatches the batches of such a data set by default, and distillation shards them
        case = replace(case, args={**case.args, "accelerator_config": {"dispatch_batches": False}})
    if teacher is None:
        return base(**_arguments(case, out))
    from tests.sampling import SamplingControl

    kind = type("Plain", (SamplingControl if case.samples else Control, base), {"saved": teacher, "loss": case.loss})
    return kind(**_arguments(case, out))


def compare(found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]], case: str) -> None:
    """The logs of the two: the same entries, and each number of the control's within TOLERANCE."""
    assert len(found) == len(wanted), f"{case}: {len(found)} entries in the log, {len(wanted)} in the control's"
    for of_ours, of_control in zip(found, wanted, strict=True):
        for name, number in of_control.items():
            if name.startswith("train_") or name.endswith(("_runtime", "_per_second")) or name == "total_flos":
                continue  # times, and the mean over the steps since the training was resumed
            told = f"{case}, step {of_control['step']}: {name} is {of_ours.get(name)}, the control's {number}"
            assert name in of_ours, told
            assert abs(of_ours[name] - number) <= TOLERANCE * abs(number), told


def save_teacher(directory: Path) -> Path:
    """A small model with a distribution far from the student's."""
    torch.manual_seed(2)
    _llama(48).save_pretrained(directory / "teacher")
    return directory / "teacher"


class At(TrainerCallback):
    """Calls `act` once: at the first `event` of Trainer when `step` optimizer steps are done."""

    def __init__(self, step: int, act: Callable[[], Any], event: str = "on_step_begin") -> None:
        self.step, self.act = step, act
        setattr(self, event, self._look)

    def _look(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = -1
            self.act()


class Control:
    """The loss of distillation, with the teacher in this process. Mixed into a Trainer."""

    saved: Path  # the teacher's model
    loss: DistillationConfig

    @cached_property
    def teacher(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.saved, dtype=torch.float32).eval()

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed over the rows (n, VOCAB) and their labels (n,)."""
        return divergence(student, teacher, self.loss)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs, use_cache=False)
        with torch.no_grad():
            teacher = self.teacher(**inputs, use_cache=False).logits
        counts = labels != -100
        found, wanted = outputs.logits[:, :-1][counts], teacher[:, :-1][counts]
        loss = self.loss.kd_weight * self.divergence(found, wanted, labels[counts])
        if self.loss.ce_weight:
            loss = loss + self.loss.ce_weight * cross_entropy(found, labels[counts], reduction="sum")
        loss = loss / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:  # the tokens of all ranks
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def divergence(student: torch.Tensor, teacher: torch.Tensor, of: DistillationConfig) -> torch.Tensor:
    """Summed over the rows (n, VOCAB)."""
    student, teacher = ((side / of.temperature).log_softmax(-1) for side in (student, teacher))
    if of.loss == "topk":
        chosen = teacher.topk(WORDS, dim=-1).indices
        student, teacher = (_buckets(side, chosen) for side in (student, teacher))
    if of.loss == "reverse_kl":
        rows = student.exp() * (student - teacher)
    elif of.loss == "jsd":
        middle = (of.beta * teacher.exp() + (1 - of.beta) * student.exp()).log()
        rows = of.beta * teacher.exp() * (teacher - middle) + (1 - of.beta) * student.exp() * (student - middle)
    else:
        rows = teacher.exp() * (teacher - student)
    return rows.sum() * of.temperature**2


def _buckets(logs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (n, WORDS + 1) of the chosen words, and of all others together."""
    others = logs.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((logs.gather(-1, chosen), others), -1)


def _base(case: Case) -> type[Trainer]:
    AcceleratorState._reset_state()  # one case may want FSDP, another not
    if case.trainer == "trainer":
        return Trainer
    import trl

    return trl.SFTTrainer


def _arguments(case: Case, out: Path) -> dict[str, Any]:
    """What both trainers of a case are given."""
    settings = {**ARGUMENTS, "output_dir": str(out), **(FSDP if case.fsdp else {}), **case.args}
    if case.evaluate:
        settings |= {"eval_strategy": "steps", "eval_steps": case.evaluate}
    train, held_out = list(documents(case.rows, case.longest, 5)), list(documents(7, case.longest, 6))
    for row in [] if case.prompts else train:
        row["labels"] = row["input_ids"]
    for row in train[:: case.unlabelled] if case.unlabelled else []:
        row["labels"] = [-100] * len(row["labels"])
    found: dict[str, Any] = {"model": student(case)}
    if case.metrics:
        found["compute_metrics"] = _mean_logit
    if case.trainer == "sft":
        import datasets
        import trl

        found |= {"args": trl.SFTConfig(**{"bf16": False, **settings}), "processing_class": _tokenizer()}
        found |= {"train_dataset": datasets.Dataset.from_list(train)}
        found |= {"eval_dataset": datasets.Dataset.from_list(held_out)}
    else:
        found |= {"args": TrainingArguments(**settings), "data_collator": pad, "eval_dataset": held_out}
        found |= {"train_dataset": Unsized(train) if case.iterable else train}
    if case.fsdp:  # accelerate takes FSDP for GPUs alone, and torch shards on CPUs as well
        assert found["args"].device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return found


def documents(count: int, longest: int, seed: int) -> Iterator[Row]:
    """Rows of different lengths whose first tokens, the prompt, have no label."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    for _ in range(count):
        ids = draw(1, VOCAB, draw(longest // 3, longest + 1)[0])
        prompt = draw(1, 4)[0]
        yield {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def pad(rows: list[Row]) -> dict[str, torch.Tensor]:
    """A batch whose rows are padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    ids = padded("input_ids", PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": padded("labels", -100)}


class Unsized(torch.utils.data.IterableDataset):
    """A stream of rows: no length, no index."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def student(case: Case) -> Any:
    torch.manual_seed(1)
    model = _llama(32, tie_word_embeddings=case.tied, attention_dropout=case.dropout)
    model.generation_config.eos_token_id = END
    if not case.lora:
        return model
    import peft

    of_attention = ["q_proj", "v_proj"]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=of_attention, init_lora_weights=False, task_type="CAUSAL_LM")
    )


def _llama(width: int, **settings: Any) -> LlamaForCausalLM:
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    return LlamaForCausalLM(shape)


def _tokenizer() -> Any:
    """For TRL, which wants one: each word is its own number."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="1"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token=str(END), unk_token="1"
    )


def _mean_logit(prediction: Any) -> dict[str, float]:
    counts = prediction.label_ids != -100
    return {"mean_logit": float(prediction.predictions[counts].astype("float64").mean())}
