"""The loss of a micro-batch, from the student's forward and the teacher's reply."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from shmbridge import Bridge, Reply
from shmbridge.integrations.transformers.config import DistillationConfig
from shmbridge.integrations.transformers.look_ahead import Batch, Turn
from shmbridge.integrations.transformers.payload import CandidateLogprobs, Source, Stream, TeacherRows
from shmbridge.integrations.transformers.student import StudentHead
from shmbridge.losses import (
    DistillationLoss,
    LazyLogits,
    candidate_reverse_kl,
    distillation_loss,
    targets_from_labels,
)

_OF_THE_MODELS_LOSS = ("labels", "shift_labels", "skip_logits")  # the last is set where args.use_liger_kernel is


class Computed(NamedTuple):
    """The losses and outputs of a micro-batch."""

    loss: Tensor
    """(): kd_weight x KD + ce_weight x CE, over `num_items`."""
    outputs: Any
    """Of the model. Its logits are the loss, with three axes, unless they were asked for."""
    kd: Tensor
    """(): the divergence, summed over the tokens."""
    ce: Tensor
    """(): the cross entropy, summed over the tokens; 0 without labels, and for the loss on candidates."""
    tokens: int
    """That the sums are over. 0 where the reply is missing."""


class Objective:
    """The loss of a DistillationConfig under the payload of the run."""

    def __init__(self, bridge: Bridge, config: DistillationConfig, head: StudentHead | None) -> None:
        """Waits for the teacher. Raises RequestRefused if its payload does not fit the loss.

        `head`: the student's, if the loss may be computed in its place."""
        self._config = config
        self.head = head
        self._teacher = TeacherRows(bridge, config)
        self.candidates = self._teacher.candidates
        self.teacher_lost = False
        """Whether a reply was missing: the teacher is lost, and on_teacher_lost is `continue`."""

    def compute(
        self, model: nn.Module, inputs: Batch, turn: Turn, num_items: Tensor | float | None, wants_logits: bool
    ) -> Computed:
        """Run the student's forward, wait for the reply, and compute the loss.

        Args:
            model: the student, as Trainer has wrapped it.
            inputs: the student's, on its device.
            num_items: the divisor of the sums over tokens. None: the tokens of this micro-batch.
            wants_logits: whether `outputs` must have the student's logits.

        Raises what Pending.wait raises.
        """
        tokens = len(turn.rows)
        items = max(1, tokens) if num_items is None else num_items
        rows = turn.rows.to(inputs["input_ids"].device, non_blocking=True)
        targets = _targets(inputs)
        labels = None if targets is None else targets.flatten()[rows]
        parts: list[DistillationLoss] = []

        def loss(student: Tensor | LazyLogits) -> Tensor:
            with self._teacher.read(turn.pending) as teacher:
                self.teacher_lost |= teacher is None
                parts[:] = [self._loss(_select(student, rows), teacher, turn, labels, items)]
            return parts[0].loss

        takes_place = self.head is not None and not wants_logits
        with self.head.replaced_by(loss) if self.head and takes_place else nullcontext():
            outputs = model(**{name: value for name, value in inputs.items() if name not in _OF_THE_MODELS_LOSS})
        total = outputs["logits"].sum() if takes_place else loss(outputs["logits"])
        return Computed(total, outputs, parts[0].kd * items, parts[0].ce * items, 0 if self.teacher_lost else tokens)

    def _loss(
        self,
        student: Tensor | LazyLogits,
        teacher: Source | Stream | None,
        turn: Turn,
        labels: Tensor | None,
        items: Tensor | float,
    ) -> DistillationLoss:
        """The loss of the student's rows (n, width), with the teacher's outputs for them and their labels (n,)."""
        config = self._config
        if teacher is None:
            found = distillation_loss(
                student, None, ce_weight=1.0, targets=labels, num_items=items, chunk_rows=config.chunk_rows
            )
            # Nothing is learned from a sample that the teacher has not scored.
            return DistillationLoss(*(part * 0.0 for part in found)) if turn.sampled else found
        if isinstance(teacher, CandidateLogprobs):
            assert turn.candidates is not None
            kd = candidate_reverse_kl(
                student,
                turn.candidates.to(teacher.candidates.device),
                teacher.candidates,
                sampled=labels if turn.sampled else None,
                sampled_logprobs=teacher.labels if turn.sampled else None,
                num_items=items,
                chunk_rows=config.chunk_rows,
            )
            return DistillationLoss(config.kd_weight * kd, kd.detach(), kd.new_zeros(()))
        return distillation_loss(
            student,
            teacher,
            loss=config.loss,
            temperature=config.temperature,
            beta=config.beta,
            kd_weight=config.kd_weight,
            ce_weight=config.ce_weight,
            targets=labels,
            num_items=items,
            chunk_rows=config.chunk_rows,
        )

    def divergence(self, student: Tensor, reply: Reply) -> Tensor:
        """The KD of logits (batch, seq, vocab) from a whole reply, for the check of `Bridge.wait_ready`."""
        config, teacher = self._config, self._teacher.of(reply)
        assert not isinstance(teacher, CandidateLogprobs)
        return distillation_loss(
            student, teacher, loss=config.loss, temperature=config.temperature, beta=config.beta
        ).loss


def _select(student: Tensor | LazyLogits, rows: Tensor) -> Tensor | LazyLogits:
    """The rows (n,) of (batch, seq, width)."""
    if isinstance(student, LazyLogits):
        return LazyLogits(student.hidden.flatten(0, 1)[rows], student.head)
    return student.flatten(0, 1)[rows]


def _targets(inputs: Batch) -> Tensor | None:
    """(batch, seq): the next token of each position, -100 where it does not count. None without labels."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]  # type: ignore[no-any-return]
    return None if inputs.get("labels") is None else targets_from_labels(inputs["labels"])
