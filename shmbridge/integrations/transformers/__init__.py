"""Distillation in HuggingFace's Trainer, and in trainers that derive from it, such as TRL's SFTTrainer.

    from shmbridge.integrations.transformers import DistillationConfig, DistillationTrainer

    trainer = DistillationTrainer(model=model, args=args, train_dataset=dataset, distillation=DistillationConfig())
    trainer.train()

    class Trainer(DistillationMixin, SFTTrainer): ...

    config       DistillationConfig, OnPolicyDistillationConfig
    trainer      DistillationMixin: where Trainer's loop asks, waits, saves and logs
    on_policy    OnPolicyDistillationMixin: training on the student's own samples
    generation   the samples
    window       the micro-batches that the teacher was asked about
    objective    the loss of a micro-batch
    student      the student's logits, or its hidden states and head inside the wrapped forward
    payload      a reply as what the losses take
    metrics      what is logged
    stopping     a checkpoint when the run is stopped
    checks       the settings of a Trainer that have no place beside a teacher

docs/hosts/trainer.md tells what is supported.
"""

from shmbridge.integrations.transformers.config import DistillationConfig, OnPolicyDistillationConfig
from shmbridge.integrations.transformers.on_policy import OnPolicyDistillationMixin, OnPolicyDistillationTrainer
from shmbridge.integrations.transformers.trainer import DistillationMixin, DistillationTrainer

__all__ = [
    "DistillationConfig",
    "DistillationMixin",
    "DistillationTrainer",
    "OnPolicyDistillationConfig",
    "OnPolicyDistillationMixin",
    "OnPolicyDistillationTrainer",
]
