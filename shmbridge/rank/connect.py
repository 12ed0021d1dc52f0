"""From SHMBRIDGE_SESSION to this rank's bridge, and what happens when the rank ends without closing it."""

from __future__ import annotations

import atexit
import functools
import os
import sys
from pathlib import Path
from types import TracebackType

import torch

from shmbridge import log
from shmbridge.errors import NotLaunched
from shmbridge.rank.bridge import Bridge
from shmbridge.shm import process
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.session import OFF, SESSION_VARIABLE, Token


def connect(*, lane: int | None = None, device: torch.device | str | None = None) -> Bridge:
    """This rank's bridge to the teacher, from SHMBRIDGE_SESSION. Initialises no CUDA and may come before set_device.

    A process may connect again. Its earlier bridge on the lane is closed, where it was not; what that had in flight is
    cancelled, its leases end, and its calls raise Closed. Where every rank has closed meanwhile, the teacher may have ended:
    see teacher.serve_until. Another process is refused, also after the first has ended.

    Args:
        lane: the ring of this rank. None: LOCAL_RANK.
        device: where replies are wanted. None: the current CUDA device at the first reply where the launcher gave
            training GPUs, else the CPU.

    Returns:
        A Bridge, usable as a context manager: an exception in the `with` block is told to the other side, a plain end
        closes. Where the bridge is switched off its `enabled` is False and its replies have no tensors.

    Raises:
        NotLaunched: the script was started without shmbridge-launch.
        AttachError: the session has ended, or has no such lane, or the lane is another process's; or the teacher has ended,
            because every rank had closed.
        TornReply: the earlier bridge's last reply was not whole.
    """
    text = os.environ.get(SESSION_VARIABLE)
    if lane is None:
        lane = int(os.environ.get("LOCAL_RANK", "0"))
    if text == OFF:
        return Bridge(None, rank=lane)
    if not text:
        raise NotLaunched(
            f"{SESSION_VARIABLE} is not set: this script runs without a teacher. Start it with\n"
            "    shmbridge-launch --teacher MODEL --teacher-gpu 7 --train-gpus 0-6 -- train.py ...\n"
            f"or, to train without the bridge, set {SESSION_VARIABLE}={OFF} (shmbridge-launch --no-teacher does)."
        )
    token = Token.parse(text)
    earlier = _bridges.get((token, lane))
    session = (earlier.give_way() if earlier else None) or RankSession(token, lane)
    log.configure(session.settings.log.level)
    process.write_stacks_on_signal(Path(session.settings.run_dir))
    bridge = Bridge(session, None if device is None else torch.device(device))
    bridge.start_heartbeat()
    _bridges[token, lane] = bridge
    _report_exits()
    return bridge


# The latest bridge of each lane of this process, and of the one that it was forked from.
_bridges: dict[tuple[Token, int], Bridge] = {}


@functools.cache  # once in a process, however often it connects
def _report_exits() -> None:
    """An exception that ends the rank reaches the launcher's report; a rank that ends without close has closed."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failed = [bridge._fail(error) for bridge in _bridges.values()]
        if failed and not any(failed):
            return  # the launcher tells of the stop once; tracebacks of all ranks would hide it
        previous(kind, error, trace)

    def at_exit() -> None:
        for bridge in _bridges.values():
            bridge.close()

    sys.excepthook = hook
    atexit.register(at_exit)
