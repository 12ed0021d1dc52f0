"""Distillation in HuggingFace's Trainer, and in trainers that derive from it, such as TRL's SFTTrainer.

    from shmbridge.integrations.transformers import DistillationConfig, DistillationTrainer

    trainer = DistillationTrainer(model=model, args=args, train_dataset=dataset, distillation=DistillationConfig())
    trainer.train()

    class Trainer(DistillationMixin, SFTTrainer): ...

    config    DistillationConfig
    trainer   DistillationMixin: where Trainer's loop asks, waits, saves and logs
    student   the student's logits, or its hidden states and head inside the wrapped forward
    payload   a reply as what the losses take
    metrics   what is logged

docs/hosts/trainer.md tells what is supported.
"""

from shmbridge.integrations.transformers.config import DistillationConfig
from shmbridge.integrations.transformers.trainer import DistillationMixin, DistillationTrainer

__all__ = ["DistillationConfig", "DistillationMixin", "DistillationTrainer"]
