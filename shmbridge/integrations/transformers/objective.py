"""The loss of a micro-batch, from the student's forward and the teacher's reply."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from shmbridge import Bridge, Reply
from shmbridge.integrations.transformers.config import DistillationConfig
from shmbridge.integrations.transformers.payload import TeacherRows
from shmbridge.integrations.transformers.student import StudentHead
from shmbridge.integrations.transformers.window import Batch, Turn
from shmbridge.losses import DistillationLoss, LazyLogits, distillation_loss, targets_from_labels

_LABELS = ("labels", "shift_labels")


class Computed(NamedTuple):
    """What a micro-batch gave."""

    loss: Tensor
    """(): kd_weight x KD + ce_weight x CE, over `num_items`."""
    outputs: Any
    """Of the model. Its logits are the loss, with three axes, unless they were asked for."""
    kd: Tensor
    """(): the divergence, summed over the tokens."""
    ce: Tensor
    """(): the cross entropy, summed over the tokens; 0 where ce_weight is 0."""
    tokens: int


class Objective:
    """The loss of a DistillationConfig under the payload of the run."""

    def __init__(self, bridge: Bridge, config: DistillationConfig, head: StudentHead | None) -> None:
        """Waits for the teacher. Raises RequestRefused where its payload does not fit the loss.

        `head`: the student's, where the loss may be computed in its place."""
        self._config = config
        self._head = head
        self._teacher = TeacherRows(bridge, config)

    def compute(
        self, model: nn.Module, inputs: Batch, turn: Turn, num_items: Tensor | float | None, wants_logits: bool
    ) -> Computed:
        """Run the student's forward, wait for the reply, and compute the loss.

        Args:
            model: the student, as Trainer has wrapped it.
            inputs: of the student, on its device.
            num_items: what the sums over the tokens are divided by. None: the tokens of this micro-batch.
            wants_logits: whether `outputs` must have the student's logits.

        Raises what Pending.wait raises.
        """
        config, tokens = self._config, len(turn.rows)
        items = max(1, tokens) if num_items is None else num_items
        rows = turn.rows.to(inputs["input_ids"].device, non_blocking=True)
        targets = _targets(inputs)
        parts: list[DistillationLoss] = []

        def loss(student: Tensor | LazyLogits) -> Tensor:
            with self._teacher.read(turn.pending) as teacher:
                parts[:] = [
                    distillation_loss(
                        _select(student, rows),
                        teacher,
                        loss=config.loss,
                        temperature=config.temperature,
                        beta=config.beta,
                        kd_weight=config.kd_weight,
                        ce_weight=config.ce_weight if teacher is not None else 1.0,
                        targets=None if targets is None else targets.flatten()[rows],
                        num_items=items,
                        chunk_rows=config.chunk_rows,
                    )
                ]
            return parts[0].loss

        takes_place = self._head is not None and not wants_logits
        with self._head.replaced_by(loss) if self._head and takes_place else nullcontext():
            outputs = model(**{name: value for name, value in inputs.items() if name not in _LABELS})
        total = outputs["logits"].sum() if takes_place else loss(outputs["logits"])
        return Computed(total, outputs, parts[0].kd * items, parts[0].ce * items, tokens)

    def divergence(self, student: Tensor, reply: Reply) -> Tensor:
        """The KD of logits (batch, seq, vocab) from a whole reply, for the check of `Bridge.wait_ready`."""
        config = self._config
        return distillation_loss(
            student, self._teacher.of(reply), loss=config.loss, temperature=config.temperature, beta=config.beta
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
