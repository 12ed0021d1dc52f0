"""Distil the cases of tests/distilling.py under the launcher, and then train their controls.

`distil.py DIRECTORY`: DIRECTORY/cases.json holds the cases by name; DIRECTORY/teacher is the teacher of the controls. Each
rank writes the logs of both to DIRECTORY/rank-N.json, after each case. A case may have two fields more:

    resume    train from the last checkpoint, where there is one
    at        [step, act, event]: one of ACTS, in a step of the distillation; see tests.distilling.At
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from tests.distilling import At, Case, control, distilled
from tests.harness import until

directory = Path(sys.argv[1])
rank = int(os.environ["RANK"])
torch.set_num_threads(1)


def die(_: Any) -> None:
    """Rank 1 of the first generation is killed."""
    if rank == 1 and os.environ["SHMBRIDGE_SESSION"].endswith("@1"):
        os.kill(os.getpid(), signal.SIGKILL)


def wait_to_be_stopped(trainer: Any) -> None:
    """Tell the test that training runs, and go on when it has stopped the launcher."""
    (directory / f"training-{rank}").touch()
    until(lambda: trainer.bridge.stop_requested, "a stop of the run")


def stop_one_rank(trainer: Any) -> None:
    """Rank 1 waits for the stop within its forward, which rank 0 has left: it is in the all-reduce of its backward."""
    if rank == 1:
        trainer.model.model.norm.register_forward_pre_hook(lambda *_: wait_to_be_stopped(trainer))


ACTS = {"die": die, "wait": wait_to_be_stopped, "stop one": stop_one_rank}


def train(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The logs of the case and of its control."""
    out = directory / name
    out.mkdir(exist_ok=True)
    resume, at = given.pop("resume", False), given.pop("at", None)
    case = Case(**given)
    ours = distilled(case, out)
    if at:
        step, act, event = at
        ours.add_callback(At(step, lambda: ACTS[act](ours), event))
    ours.train(resume_from_checkpoint=get_last_checkpoint(out) if resume else None)
    plain = control(case, directory / f"{name}-control", directory / "teacher")
    plain.args.save_strategy = "no"
    plain.train()
    return {"distilled": ours.state.log_history, "control": plain.state.log_history}


found: dict[str, Any] = {}
for name, given in json.loads((directory / "cases.json").read_text()).items():
    found[name] = train(name, given)
    (directory / f"rank-{rank}.json").write_text(json.dumps(found))
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
