"""The settings of distillation in a Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

LOSSES = ("forward_kl", "reverse_kl", "jsd", "topk")
CANDIDATE_LOSS = "candidate_reverse_kl"


@dataclass
class DistillationConfig:
    """Settings of `DistillationMixin`, beside Trainer's own TrainingArguments. HfArgumentParser takes both:

        args, distillation = HfArgumentParser((TrainingArguments, DistillationConfig)).parse_args_into_dataclasses()

    The loss of a step is kd_weight x KD + ce_weight x CE. Both are summed over the tokens whose label is not -100, and
    normalised as Trainer normalises its own loss: over the tokens of all micro-batches and ranks.

    Raises:
        ValueError: a value is out of its range.
    """

    losses: ClassVar[tuple[str, ...]] = LOSSES

    loss: str = field(
        default="forward_kl",
        metadata={"help": "The divergence from the teacher.", "choices": list(LOSSES)},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Divides the logits of both sides in the divergence, which is multiplied by its square."},
    )
    beta: float = field(default=0.5, metadata={"help": "Of the loss jsd: 0 is forward KL, 1 is reverse KL."})
    kd_weight: float = field(default=1.0, metadata={"help": "The weight of the divergence."})
    ce_weight: float = field(default=0.0, metadata={"help": "The weight of the cross entropy with the labels."})
    look_ahead: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches that are taken from the loader before their optimizer step. None: those of one step, and one "
            "where the loader has no length. 0: none, for a collator that draws from the global random generators and a run "
            "that must resume exactly."
        },
    )
    chunk_rows: int | None = field(
        default=None, metadata={"help": "Tokens whose logits exist at a time. None: as many as 128 MiB allow."}
    )
    save_on_stop: bool = field(
        default=True,
        metadata={
            "help": "Save a checkpoint when the run is stopped by Ctrl-C or SIGTERM, or loses its teacher or a rank."
        },
    )

    def __post_init__(self) -> None:
        if self.loss not in self.losses:
            raise ValueError(f"{type(self).__name__}.loss is {self.loss!r}; expected one of {', '.join(self.losses)}.")
        if not self.temperature > 0:
            raise ValueError(f"{type(self).__name__}.temperature is {self.temperature}; expected a number above 0.")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"{type(self).__name__}.beta is {self.beta}; expected 0 (forward KL) to 1 (reverse KL).")
        if self.kd_weight < 0 or self.ce_weight < 0 or self.kd_weight + self.ce_weight == 0:
            raise ValueError(
                f"{type(self).__name__}.kd_weight is {self.kd_weight} and ce_weight {self.ce_weight}; expected numbers that are not "
                "negative, and not both 0."
            )
        if self.look_ahead is not None and self.look_ahead < 0:
            raise ValueError(f"{type(self).__name__}.look_ahead is {self.look_ahead}; expected 0 or more, or None.")


@dataclass
class OnPolicyDistillationConfig(DistillationConfig):
    """Settings of `OnPolicyDistillationMixin`: those of DistillationConfig, and how the student samples.

    Samples are drawn from the student's whole softmax at `sampling_temperature`, without top-k and top-p, whatever the
    checkpoint's generation_config says.

    Raises:
        ValueError: a value is out of its range, or does not fit the loss.
    """

    losses: ClassVar[tuple[str, ...]] = (*LOSSES, CANDIDATE_LOSS)

    loss: str = field(
        default="reverse_kl",
        metadata={
            "help": "The divergence from the teacher. candidate_reverse_kl: reverse KL on the student's most likely words and the "
            "sampled token, with payload.logprobs.candidates.",
            "choices": list(losses),
        },
    )
    on_policy: float = field(
        default=1.0,
        metadata={"help": "The share of the optimizer steps whose completions are the student's own samples."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "The most tokens of a sample."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Divides the student's logits when it samples."})

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"{name}.on_policy is {self.on_policy}; expected a share of the steps, 0 to 1.")
        if self.max_new_tokens < 1:
            raise ValueError(f"{name}.max_new_tokens is {self.max_new_tokens}; expected 1 or more.")
        if not self.sampling_temperature > 0:
            raise ValueError(f"{name}.sampling_temperature is {self.sampling_temperature}; expected a number above 0.")
        if self.loss == CANDIDATE_LOSS:
            for setting, expected in (("temperature", 1.0), ("sampling_temperature", 1.0), ("ce_weight", 0.0)):
                if getattr(self, setting) != expected:
                    raise ValueError(
                        f"{name}.{setting} is {getattr(self, setting)} and loss {CANDIDATE_LOSS}, which needs {expected}. Set "
                        f"{setting}={expected}, or another loss."
                    )
