"""The device on which a rank reads its replies."""

from __future__ import annotations

import torch

from shmbridge import log
from shmbridge.shm.session import TrainerSession


def choose(session: TrainerSession, given: torch.device | None) -> torch.device:
    """The given device; None: the current CUDA device where the launcher gave training GPUs, else the CPU.

    Logs a warning where the current device is not the rank's own, unless the rank has opened its replies before.
    """
    if given is None:
        if not (session.settings.train.gpus and torch.cuda.is_available()):
            return torch.device("cpu")
        if session.plane is None:
            _warn_of_another(session)
    if given is None or (given.type == "cuda" and given.index is None):
        return torch.device("cuda", torch.cuda.current_device())
    return given


def _warn_of_another(session: TrainerSession) -> None:
    """The launcher gives each rank one GPU, in turn where ranks share them. A rank that never called set_device is on cuda:0."""
    lane, current = session.lane.index, torch.cuda.current_device()
    own = lane % _count(session.settings.train.gpus)
    if current == own or own >= torch.cuda.device_count():  # the script itself hides the others from each rank
        return
    log.logger.warning(
        "rank %d reads its replies on cuda:%d, the current device, and its own GPU is cuda:%d: replies, and a CUDA context, go to "
        "a GPU that belongs to another process. Call torch.cuda.set_device(%d) before the first use of the bridge (LOCAL_RANK "
        "tells the number), or give connect(device=...).",
        *(lane, current, own, own),
    )


def _count(gpus: str) -> int:
    """How many GPUs a list such as `0-6` or `0,2,2` names."""
    found: set[int] = set()
    for part in gpus.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return len(found)
