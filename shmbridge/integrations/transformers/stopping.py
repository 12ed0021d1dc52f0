"""Saves a Trainer checkpoint when the run is stopped."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from shmbridge import RunStopped, log

_LOOK_S = 0.05


class CheckpointOnStop:
    """Saves what Trainer saves, as of the last complete optimizer step. A resumed run repeats the interrupted step.

    Before each micro-batch the ranks agree whether one of them was asked to stop, and save together: a rank that leaves
    alone could leave another one in an all-reduce. The loss of the teacher or of a rank is noticed inside the student's
    forward. Each rank then saves alone, after the exception has left the forward.
    """

    def __init__(self, trainer: Any) -> None:
        """`trainer`: a DistillationMixin. It saves unless its save_strategy is `no` or Trainer makes JIT checkpoints
        itself."""
        self._trainer = trainer
        self.saving = False
        """Whether Trainer's checkpoint is being saved because of a stop."""
        self._told = False
        self._agrees = False
        self._random: list[Any] = []
        self._random_of = -1  # the steps that were done when `_random` was noted
        self._saved: int | None = (
            None  # the steps that the last checkpoint holds; at first, those that training begins with
        )
        args = trainer.args
        self._saves = (
            trainer.distillation.save_on_stop
            and args.save_strategy != "no"
            and not getattr(args, "enable_jit_checkpoint", False)
        )
        if self._saves:
            trainer.bridge.on_stop(self._note)

    def begin_step(self) -> None:
        """Note the states of the random generators, which an interrupted step advances."""
        if self._saved is None:
            self.note_saved()
        if self._saves:
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
            self._random = [random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda]
            self._random_of = self._trainer.state.global_step

    def note_saved(self) -> None:
        """Trainer has saved a checkpoint of the steps that are done."""
        self._saved = self._trainer.state.global_step

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """In the block a stop ends the ranks only where they call `look`."""
        with self._trainer.bridge.defer_stop() if self._saves else nullcontext():
            self._agrees, self._saved = self._saves, None
            try:
                yield
            finally:
                self._agrees = False

    def look(self) -> None:
        """If any rank was asked to stop, save in all of them and raise RunStopped. A collective."""
        if not self._agrees:
            return
        trainer = self._trainer
        asked = torch.tensor(float(trainer.bridge.stop_requested), device=trainer.accelerator.device)
        if trainer.accelerator.num_processes > 1:
            asked = trainer.accelerator.reduce(asked, "sum")
        if asked:
            self._save()
            step = trainer.state.global_step
            saved = f"{PREFIX_CHECKPOINT_DIR}-{step} is saved" if step else "no step was done, so none is saved"
            raise RunStopped(f"the run is to stop: {saved} (DistillationConfig.save_on_stop).")

    def save_if_stopped(self) -> None:
        """Save if the run is to stop, or the bridge has lost the teacher or a rank; at most once."""
        if self._saves and (self._told or self._trainer.bridge.stop_requested):
            self._save()

    def _save(self) -> None:
        self._saves = self._agrees = False
        self.saving = True
        trainer = self._trainer
        step = trainer.state.global_step
        folder = os.path.join(trainer._get_output_dir(trial=None), f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self._saved in (None, step):
            return
        log.logger.info("rank %d saves %s before it stops", trainer.bridge.rank, folder)
        for module in trainer.model_wrapped.modules():
            if hasattr(module, "reshard"):  # FSDP2, whose forward was interrupted
                module.reshard()
        self._restore_random()
        follows = not trainer.is_fsdp_enabled and not trainer.args.should_save
        if follows and not self._appears(os.path.join(folder, "trainer_state.json")):
            return  # a folder with this rank's random state alone would be taken for a checkpoint
        trainer._save_checkpoint(trainer.model_wrapped, trial=None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    def _note(self) -> None:
        self._told = True

    def _appears(self, file: str) -> bool:
        """Wait until rank 0 has saved. False if it has not within timeouts.save_s, because it may be the rank that was
        lost."""
        until = time.monotonic() + self._trainer.bridge.settings.timeouts.save_s
        while not os.path.exists(file):
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK_S)
        return True

    def _restore_random(self) -> None:
        if self._random_of != self._trainer.state.global_step:
            return  # the step is complete: an evaluation, or a checkpoint, was interrupted
        python, numpy, cpu, cuda = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
