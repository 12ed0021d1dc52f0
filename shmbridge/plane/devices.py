"""What torch sees of this machine's GPUs: `python -m shmbridge.plane.devices` prints it as one line of JSON and ends.

The launcher imports no torch. It runs this module in a short process of its own where nvidia-smi is absent, and for
`shmbridge-launch doctor`.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

MARK = b"shmbridge-devices "


class Device(msgspec.Struct, frozen=True):
    """One GPU, in torch's order."""

    uuid: str  # as CUDA_VISIBLE_DEVICES takes it: GPU- and the UUID
    name: str
    total_bytes: int
    free_bytes: int  # 0 where CUDA refuses to tell, as on a GPU that another process has for itself


class Devices(msgspec.Struct, frozen=True):
    """The answer."""

    torch: str  # its version
    cuda: str = ""  # the CUDA that torch was built with; empty for a build without
    problem: str = ""  # why there are no devices
    devices: tuple[Device, ...] = ()
    no_peer_access: tuple[tuple[int, int], ...] = ()  # pairs of devices, the lower first


def parse(output: bytes) -> Devices | None:
    """The answer in what the process printed; None where it printed none. Other lines are torch's or the user's."""
    lines = [line.removeprefix(MARK) for line in output.split(b"\n") if line.startswith(MARK)]
    return msgspec.json.decode(lines[-1], type=Devices) if lines else None


def look() -> Devices:
    """Import torch and ask it. Makes a CUDA context on each GPU, so never call it in a process that lives on."""
    import torch

    found = Devices(str(torch.__version__), torch.version.cuda or "")
    if not found.cuda:
        return msgspec.structs.replace(found, problem="this build of torch has no CUDA")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return msgspec.structs.replace(found, problem=(str(error).splitlines() or [type(error).__name__])[0])
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    access = torch.cuda.can_device_access_peer
    return msgspec.structs.replace(
        found,
        devices=tuple(_device(torch, index) for index in range(count)),
        no_peer_access=tuple((a, b) for a, b in pairs if not (access(a, b) and access(b, a))),
    )


def _device(torch: Any, index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    try:
        free = torch.cuda.mem_get_info(index)[0]
    except RuntimeError:
        free = 0
    uuid = str(properties.uuid)
    return Device(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}", properties.name, properties.total_memory, free)


if __name__ == "__main__":
    sys.stdout.buffer.write(b"\n" + MARK + msgspec.json.encode(look()) + b"\n")
