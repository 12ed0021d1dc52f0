"""Where a Python stack stands: in which call that waits for others, and in which function of the user's. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import msgspec

from launcher.hang.stacks import Frame, Stacks
from shmbridge.shm import process

COLLECTIVE, BACKWARD, DATA, GPU, BRIDGE, CODE = "collective", "backward", "data", "gpu", "bridge", "code"

_COLLECTIVES = {
    *("barrier", "monitored_barrier", "_store_based_barrier", "wait", "new_group", "init_process_group"),
    *("all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "broadcast_object_list", "send", "recv"),
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_coalesced", "gather", "gather_object"),
    *("reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "all_to_all", "all_to_all_single"),
    *("batch_isend_irecv", "send_object_list", "recv_object_list", "destroy_process_group", "wait_tensor"),
}
# Calls into native code that leave no frame of their own: the source line tells.
_NATIVE_WAIT = re.compile(r"\.(wait)\(")
_NATIVE_GPU = re.compile(r"\.(item|tolist|cpu|numpy|synchronize)\(\)")
_OURS = str(Path(process.__file__).parents[1])
_LIBRARIES = re.compile(
    r"^<|/(?:site|dist)-packages/|/lib/python3[.\d]*/|/torch/(?:distributed|utils|cuda|nn|autograd)/"
)


class Place(msgspec.Struct, frozen=True):
    """`at barrier() in save (checkpoint.py:41)`."""

    kind: str
    call: str  # what the user's function has called: barrier(), a GPU's synchronize(); empty for code of its own
    function: str  # the innermost that is the user's own; where there is none, the innermost of all
    file: str
    line: int

    def __str__(self) -> str:
        at = f"{Path(self.file).name}:{self.line}"
        where = f"({at})" if self.function == "<module>" else f"in {self.function} ({at})"
        told = {
            COLLECTIVE: f"at {self.call}",
            BACKWARD: f"at {self.call}",
            DATA: "waiting for its DataLoader",
            GPU: f"at {self.call}, which waits for the GPU,",
            BRIDGE: "waiting on the bridge",
        }.get(self.kind, "")
        return f"{told} {where}".strip()


def of(stacks: Stacks) -> Place | None:
    """Where the main thread is; None without stacks."""
    if not stacks.threads or not stacks.threads[0].frames:
        return None
    frames = stacks.threads[0].frames
    inner = list(takewhile(is_library, frames))
    user = frames[len(inner)] if len(inner) < len(frames) else frames[0]
    kind, call = _call(inner, frames[0])
    return Place(kind, call, user.function, user.file, user.line)


def is_library(frame: Frame) -> bool:
    """Not the user's own code."""
    return bool(_LIBRARIES.search(frame.file)) or is_ours(frame)


def is_ours(frame: Frame) -> bool:
    return frame.file.startswith(_OURS + "/") or "/site-packages/shmbridge/" in frame.file


def _call(inner: Sequence[Frame], innermost: Frame) -> tuple[str, str]:
    """What the library frames between the user's code and the kernel say that it waits for."""
    distributed = [frame for frame in inner if "/torch/distributed/" in frame.file]
    if is_ours(innermost):
        return BRIDGE, ""
    if distributed:
        return COLLECTIVE, _collective(distributed)
    if any("/torch/utils/data/" in frame.file for frame in inner):
        return DATA, ""
    if any("/torch/cuda/" in frame.file and _name(frame) == "synchronize" for frame in inner):
        return GPU, "torch.cuda.synchronize()"
    if any("/torch/autograd/" in frame.file for frame in inner):
        return BACKWARD, "backward()"
    wait, gpu = _NATIVE_WAIT.search(innermost.code), _NATIVE_GPU.search(innermost.code)
    if not inner and wait:
        return COLLECTIVE, "wait()"
    return (GPU, f".{gpu[1]}()") if not inner and gpu else (CODE, "")


def _collective(frames: Sequence[Frame]) -> str:
    """As the user, or FSDP, has called it: the outermost that is one."""
    named = [name for name in map(_name, frames) if name in _COLLECTIVES]
    call = named[-1] if named else _name(next((f for f in reversed(frames) if _name(f) != "wrapper"), frames[-1]))
    return f"{call}()" + (" of FSDP" if any("/fsdp/" in frame.file for frame in frames) else "")


def _name(frame: Frame) -> str:
    """Without the class that py-spy tells."""
    return frame.function.rpartition(".")[2]
