"""HuggingFace's Trainer with a teacher beside it.

    get_batch_samples   draws the micro-batches of an optimizer step, and sends requests for those of the next one too
    training_step       one micro-batch
    compute_loss        the student's forward, then the wait for the reply and the loss
    prediction_step     sends its request at once; requests that were sent ahead are withdrawn, and sent again before their turn

Requests that are not read are cancelled at the end of their epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import has_length

import shmbridge
from shmbridge import Bridge
from shmbridge.integrations.transformers.checks import check_settings, shard_iterable_datasets
from shmbridge.integrations.transformers.config import CANDIDATE_LOSS, DistillationConfig
from shmbridge.integrations.transformers.look_ahead import Batch, MicroBatch, Place, Turn, Window
from shmbridge.integrations.transformers.metrics import Metrics
from shmbridge.integrations.transformers.objective import Objective
from shmbridge.integrations.transformers.stopping import CheckpointOnStop
from shmbridge.integrations.transformers.student import find_head, output_embeddings

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class DistillationMixin(_Trainer):
    """Distils from the run's teacher, in any class that derives from transformers.Trainer:

        class MyTrainer(DistillationMixin, SFTTrainer): ...

    Args:
        distillation: the loss and its weights. None: the defaults.
        bridge: a bridge that the script has connected. None: shmbridge.connect().
        All others are Trainer's.

    Training and evaluation begin when the teacher is loaded and its replies are checked (`Bridge.wait_ready`). In a run
    without a teacher (shmbridge-launch --no-teacher) the class trains as it would without the mixin.

    Raises:
        NotLaunched: the script was started without shmbridge-launch.
        ValueError: a setting of Trainer does not work with a teacher. The message names it and what to set.
    """

    def __init__(
        self, *args: Any, distillation: DistillationConfig | None = None, bridge: Bridge | None = None, **kwargs: Any
    ) -> None:
        self.distillation = distillation or DistillationConfig()
        self.bridge = bridge or shmbridge.connect()
        self._window = Window(self.bridge, self._prepare)
        self._objective: Objective | None = None  # until the teacher is ready
        self._metrics_of_kd: Metrics | None = None
        self._turn: Turn | None = None  # the micro-batch that compute_loss is called for
        self._loss_only = False  # an evaluation does not want the student's logits
        self._steps = 0  # optimizer steps since the last report
        super().__init__(*args, **kwargs)
        self._checkpoint: CheckpointOnStop | None = None
        if self.bridge.enabled:
            check_settings(self)
            self._checkpoint = CheckpointOnStop(self)

    # What Trainer calls

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer.train, once the teacher is ready."""
        self._wait_for_teacher()
        try:
            with self._checkpoint.agreed() if self._checkpoint else nullcontext():
                return super().train(*args, **kwargs)
        except BaseException:
            if self._checkpoint:
                self._checkpoint.save_if_stopped()
            raise
        finally:
            self._cancel_turn()
            self._window.close()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer.evaluate, once the teacher is ready."""
        self._wait_for_teacher()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer.predict, once the teacher is ready."""
        self._wait_for_teacher()
        return super().predict(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        if self.bridge.enabled:
            shard_iterable_datasets(self.args)
        super().create_accelerator_and_postprocess()

    def get_train_dataloader(self) -> Any:
        """Trainer's loader, with batches left on the CPU until they are sent. Trainer moves them to the device
        afterwards."""
        self._window.close()  # auto_find_batch_size begins again
        return self._on_cpu(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_cpu(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_cpu(super().get_test_dataloader(*args, **kwargs))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """Trainer's micro-batches of a step, with requests sent for them. Their labels are counted in their own
        step."""
        if self.bridge.enabled:
            self._steps += 1
            if self._checkpoint:
                self._checkpoint.begin_step()
            ahead = self.distillation.look_ahead
            if ahead is None:
                ahead = num_batches if has_length(self.callback_handler.train_dataloader) else 1
            epoch_iterator = iter(self._window.draw(epoch_iterator, num_batches, ahead, self.state.global_step))
        return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self._checkpoint:
            self._checkpoint.look()
        if self.bridge.enabled:
            self._turn = self._window.turn(inputs, self.state.global_step)
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[no-any-return]

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if self._checkpoint:
            self._checkpoint.look()
        if self.bridge.enabled and inputs.get("labels") is not None:
            self._turn = self._window.turn(inputs, self.state.global_step)
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._loss_only = False
            self._cancel_turn()  # no loss was computed: one of args.label_names is missing

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """kd_weight x KD + ce_weight x CE of a micro-batch, normalised as Trainer normalises its own loss."""
        if self._objective is None or self._metrics_of_kd is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        turn, self._turn = self._turn or self._window.turn(inputs, self.state.global_step), None
        items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).clamp(min=1)
        found = self._objective.compute(model, inputs, turn, items, return_outputs and not self._loss_only)
        mode = "train" if model.training else "eval"
        self._metrics_of_kd.add(mode, kd=found.kd, ce=found.ce, tokens=found.tokens)
        if turn.sampled:
            samples = inputs["input_ids"].shape[0]
            self._metrics_of_kd.add(mode, sampled_kd=found.kd, sampled_tokens=found.tokens, samples=samples)
        loss = found.loss
        if items is not None and self.args.average_tokens_across_devices:  # of all ranks; DDP averages over ranks
            loss = loss * (self.accelerator.num_processes // getattr(self, "get_tp_size", lambda: 1)())
        router_loss = getattr(found.outputs, "aux_loss", None)
        if router_loss is not None:  # a mean, which the items do not normalise
            steps = 1 if items is None or not model.training else self.current_gradient_accumulation_steps
            loss = loss + self.accelerator.unwrap_model(model).config.router_aux_loss_coef * router_loss / steps
        return (loss, found.outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer.log with the metrics of the replies. It is called in every rank, because these are means over the
        ranks."""
        if self._metrics_of_kd is not None:
            losses = [name for name in logs if name.endswith("_loss") and name != "train_loss"]
            evaluated = next((name for name in losses if name.removesuffix("loss") + "runtime" in logs), None)
            if "loss" in logs:
                logs.update(self._metrics_of_kd.report("train", self._steps, self.accelerator))
                self._steps = 0
            elif evaluated:
                found = self._metrics_of_kd.report("eval", 1, self.accelerator)
                logs.update({evaluated.removesuffix("loss") + name: value for name, value in found.items()})
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self._checkpoint:
            self._checkpoint.note_saved()

    def store_flos(self) -> None:
        """Skipped in a checkpoint on a stop: Trainer's is a collective, and the other ranks may not take part."""
        if self._checkpoint and self._checkpoint.saving:
            return  # what was computed since the last log is not counted
        super().store_flos()

    # Within

    def _prepare(self, batch: Batch, place: Place | None) -> MicroBatch:
        """A batch of the loader with its request. `place`: its turn in training, None in an evaluation."""
        return MicroBatch(batch)

    def _wait_for_teacher(self) -> None:
        """The startup barrier and the checks of `Bridge.wait_ready`, once."""
        if self._objective is not None or not self.bridge.enabled:
            return
        with self.accelerator.autocast():  # as the student is trained: some kernels take no float32
            head = find_head(self.model)
        objective = Objective(self.bridge, self.distillation, head)
        words = getattr(getattr(output_embeddings(self.model), "weight", None), "shape", (None,))[0]
        tokenizer = self.processing_class if isinstance(self.processing_class, PreTrainedTokenizerBase) else None
        self.bridge.wait_ready(
            vocab_size=words,
            tokenizer=tokenizer,
            loss=None if self.distillation.loss == CANDIDATE_LOSS else objective.divergence,
        )
        self._metrics_of_kd = Metrics(self.bridge, "jsd" if self.distillation.loss == "jsd" else "kl")
        self._objective = objective

    def _cancel_turn(self) -> None:
        if self._turn is not None:
            self._turn.pending.cancel()
            self._turn = None

    def _on_cpu(self, loader: Any) -> Any:
        """accelerate's loader moves batches to the device before it yields them, unless it has none."""
        if self.bridge.enabled and hasattr(loader, "device"):
            loader.device = None
        return loader


class DistillationTrainer(DistillationMixin, Trainer):
    """transformers.Trainer with a teacher beside it: see DistillationMixin."""
