"""A checkpoint of Trainer's own when the run is stopped."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from shmbridge import trace

_LOOK_S = 0.05


class CheckpointOnStop:
    """Saves what Trainer saves, at the last optimizer step that was done. A resumed run does the interrupted step again.

    The bridge notices the stop inside the student's forward. The checkpoint is saved when the exception has left it.
    """

    def __init__(self, trainer: Any) -> None:
        """`trainer`: a DistillationMixin. It saves where its save_strategy is not `no` and it has no JIT checkpoints of its own."""
        self._trainer = trainer
        self.saving = False
        """Whether Trainer's checkpoint is being saved because of a stop."""
        self._told = False
        self._random: list[Any] | None = None
        args = trainer.args
        self._saves = (
            trainer.distillation.save_on_stop
            and args.save_strategy != "no"
            and not getattr(args, "enable_jit_checkpoint", False)
        )
        if self._saves:
            trainer.bridge.on_stop(self._note)

    def begin_step(self) -> None:
        """Note the states of the random generators, which an interrupted step has moved on."""
        if self._saves:
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
            self._random = [random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda]

    def save_if_stopped(self) -> None:
        """Save where the run is to stop, or the bridge has lost the teacher or a rank."""
        if not self._saves or not (self._told or self._trainer.bridge.stop_requested):
            return
        self._saves = False
        self.saving = True
        trainer = self._trainer
        step = trainer.state.global_step
        folder = os.path.join(trainer._get_output_dir(trial=None), f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if step == 0 or os.path.exists(os.path.join(folder, "trainer_state.json")):
            return
        trace.logger.info("rank %d saves %s before it stops", trainer.bridge.rank, folder)
        for module in trainer.model_wrapped.modules():
            if hasattr(module, "reshard"):  # FSDP2, whose forward was interrupted
                module.reshard()
        self._restore_random()
        if not trainer.is_fsdp_enabled and not trainer.args.should_save:
            self._wait_for(os.path.join(folder, "trainer_state.json"))
        trainer._save_checkpoint(trainer.model_wrapped, trial=None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    def _note(self) -> None:
        self._told = True

    def _wait_for(self, file: str) -> None:
        """Until rank 0 has saved: a folder with this rank's random state alone would be taken for a checkpoint."""
        until = time.monotonic() + self._trainer.bridge.settings.timeouts.save_s
        while not os.path.exists(file) and time.monotonic() < until:
            time.sleep(_LOOK_S)

    def _restore_random(self) -> None:
        if self._random is None:
            return
        python, numpy, cpu, cuda = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
