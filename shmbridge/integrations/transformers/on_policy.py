"""HuggingFace's Trainer on the student's own samples: the student generates, the teacher scores.

A batch of the loader has the prompts. Its completions are sampled when it is taken from the loader, one window ahead of
its turn. While the student samples the next micro-batch, the teacher scores this one.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import Trainer

from shmbridge.integrations.transformers.checks import check_generation
from shmbridge.integrations.transformers.config import OnPolicyDistillationConfig
from shmbridge.integrations.transformers.look_ahead import Batch, MicroBatch, Place
from shmbridge.integrations.transformers.sampling import (
    choose_candidates,
    is_sampled,
    sample,
    sampling_config,
    sampling_seed,
)
from shmbridge.integrations.transformers.trainer import DistillationMixin
from shmbridge.log import logger


class OnPolicyDistillationMixin(DistillationMixin):
    """DistillationMixin in which a share of the optimizer steps trains on completions that the student samples.

        class MyTrainer(OnPolicyDistillationMixin, SFTTrainer): ...

    The prompt of each row is the part before its first label that counts, or the whole row if there is none. In the
    other steps, and in evaluations, the batches are those of the data set. The optimizer steps that sample, and what
    they sample, depend on args.seed, the rank, the step and the student's weights alone.

    Args:
        distillation: the loss, its weights and the sampling. None: the defaults.
        All others are those of DistillationMixin.

    Raises:
        TypeError: `distillation` is a DistillationConfig without sampling.
        ValueError: a setting of Trainer does not work with a teacher or with sampling. The message names it and what to set.
    """

    distillation: OnPolicyDistillationConfig

    def __init__(self, *args: Any, distillation: OnPolicyDistillationConfig | None = None, **kwargs: Any) -> None:
        distillation = distillation or OnPolicyDistillationConfig()
        if not isinstance(distillation, OnPolicyDistillationConfig):
            raise TypeError(f"distillation is a {type(distillation).__name__}; expected an OnPolicyDistillationConfig.")
        super().__init__(*args, distillation=distillation, **kwargs)
        if self.bridge.enabled:
            check_generation(self)
        elif distillation.on_policy > 0:
            logger.warning(
                "The run has no teacher, so nothing is sampled: all steps train on the completions of the data set."
            )

    def _prepare(self, batch: Batch, place: Place | None) -> MicroBatch:
        config, objective = self.distillation, self._objective
        assert objective is not None  # the teacher is ready
        sampled = (
            place is not None
            and not objective.teacher_lost
            and is_sampled(self.args.seed, place.step, config.on_policy)
        )
        with self.accelerator.autocast():
            if place is not None and sampled:
                batch = self._sampled(batch, place)
            candidates = None
            if objective.candidates:
                candidates = choose_candidates(
                    self.model, batch, objective.candidates, objective.head, config.chunk_rows
                )
        return MicroBatch(batch, candidates, sampled)

    def _sampled(self, batch: Batch, place: Place) -> Batch:
        """The batch with the student's completions in place of its own."""
        assert self._metrics_of_kd is not None
        begun, config = time.perf_counter(), self.distillation
        model = getattr(self.model, "get_base_model", lambda: self.model)()  # PEFT's adapters lie within
        settings = sampling_config(model, self.processing_class, config.max_new_tokens, config.sampling_temperature)
        found = sample(model, batch, settings, sampling_seed(self.args.seed, self.args.process_index, place))
        self._metrics_of_kd.add("train", generate_s=time.perf_counter() - begun)
        return found


class OnPolicyDistillationTrainer(OnPolicyDistillationMixin, Trainer):
    """transformers.Trainer on the student's own samples: see OnPolicyDistillationMixin."""
