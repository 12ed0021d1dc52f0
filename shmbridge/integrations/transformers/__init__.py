"""Distillation in HuggingFace's Trainer, and in trainers that derive from it, such as TRL's SFTTrainer.

    from shmbridge.integrations.transformers import DistillationConfig, DistillationTrainer

    trainer = DistillationTrainer(model=model, args=args, train_dataset=dataset, distillation=DistillationConfig())
    trainer.train()

    class Trainer(DistillationMixin, SFTTrainer): ...

    config      DistillationConfig, OnPolicyDistillationConfig
    trainer     DistillationMixin: where Trainer's loop sends requests, waits, saves and logs
    on_policy   OnPolicyDistillationMixin: training on the student's own samples
    sampling    samples of the student
    look_ahead  the micro-batches whose requests were sent ahead
    objective   the loss of a micro-batch
    student     the student's logits, or its hidden states and head inside the wrapped forward
    payload     a reply in the form that the losses take
    metrics     what is logged
    stopping    a checkpoint when the run is stopped
    checks      the settings of a Trainer that do not work with a teacher

docs/hosts/trainer.md lists what is supported.
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
