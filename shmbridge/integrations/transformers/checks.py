"""Settings of a Trainer that do not work with a teacher, refused before training begins."""

from __future__ import annotations

from typing import Any


def check_settings(trainer: Any) -> None:
    """Raise ValueError for a setting that would be ignored or would give wrong numbers; it names the setting and what
    to set."""
    args, model = trainer.args, trainer.model
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func is set; DistillationMixin computes the loss itself. Leave it out, and set the loss with "
            "DistillationConfig."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}; DistillationMixin computes the cross entropy without it. "
            "Set label_smoothing_factor=0."
        )
    loss_type = getattr(args, "loss_type", "nll")  # TRL's SFTConfig
    if loss_type not in ("nll", None):
        raise ValueError(
            f"loss_type is {loss_type!r}, which changes the student's forward or its cross entropy; DistillationMixin computes both. "
            "Set loss_type='nll'."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Trainer uses DataParallel over {args.n_gpu} GPUs; each rank of a run has one. Start the script with shmbridge-launch "
            "--train-gpus, which starts a rank for each."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("cp", "sp"):
        if parallelism is not None and getattr(parallelism, f"{name}_enabled", False):
            raise ValueError(
                f"parallelism_config has {name}_size above 1; its ranks hold parts of a sequence, which DistillationMixin does not "
                f"divide the replies for. Set {name}_size=1."
            )
    if trainer.is_deepspeed_enabled:
        raise ValueError("deepspeed is set; DistillationMixin was not tried with it. Use DDP or FSDP2 (fsdp_config).")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; the teacher is a causal language model.")
    peft = getattr(model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        raise ValueError(
            f"{type(peft).__name__} adds virtual tokens, so the student's rows are not the teacher's. Use LoRA or another adapter."
        )


def check_generation(trainer: Any) -> None:
    """Raise ValueError for a setting under which the student cannot sample in its training process."""
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "fsdp is set; the student samples outside of its wrapper, where its weights are not gathered. Use DDP, and LoRA for a "
            "student that does not fit."
        )
    if not hasattr(trainer.model, "generate"):
        raise ValueError(
            f"{type(trainer.model).__name__} has no generate(), which the student samples with; expected a causal language model of "
            "transformers."
        )
    for setting in ("packing", "padding_free"):  # TRL's SFTConfig
        if getattr(trainer.args, setting, False):
            raise ValueError(f"{setting} is True; completions are sampled for padded rows. Set {setting}=False.")


def shard_iterable_datasets(args: Any) -> None:
    """Make each rank read its own batches. With dispatch_batches rank 0 reads them for all ranks and sends them to the
    GPUs, from where token IDs would have to be copied back. Raises ValueError if the user has set it."""
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config.dispatch_batches is True: rank 0 sends every batch to the other ranks' GPUs, before the teacher is "
            "asked. Set it to False: each rank then reads the data set and keeps its own rows, in an order that must be the same "
            "in all ranks."
        )
    args.accelerator_config.dispatch_batches = False
