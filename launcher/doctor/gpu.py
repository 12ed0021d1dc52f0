"""Checks of the GPUs. They start processes: nvidia-smi, a process that imports torch, and the trial of CUDA IPC."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from launcher.console.text import size
from launcher.doctor import host
from launcher.doctor.checks import Fact, Finding, fault, ok, run, warning
from launcher.planning import gpus, jobs, placement, plane_choice
from launcher.planning.gpus import Gpu, NvidiaSmiError
from launcher.planning.machine import Machine
from launcher.process import cuda_ipc_trial
from launcher.process.signals import Signals
from shmbridge import config
from shmbridge.errors import ConfigError
from shmbridge.plane.devices import Devices

_NO_GPU = "not tried: no GPU"


def facts(note: Callable[[str], None], environment: Mapping[str, str] = os.environ) -> list[Fact]:
    """The facts driver, cuda, gpus, peer_access and cuda_ipc. `note` is called with a text before each slow check.

    Raises:
        Stopped: a signal that ends the launcher arrived during the trial.
    """
    look = _Look(note, environment)
    return [run(check) for check in (look.driver, look.cuda, look.gpus, look.peer_access, look.cuda_ipc)]


class _Look:
    """What nvidia-smi and torch said of the GPUs, which several checks use."""

    def __init__(self, note: Callable[[str], None], environment: Mapping[str, str]) -> None:
        self._note, self._environment = note, environment
        self._smi: list[Gpu] = []
        self._smi_error: NvidiaSmiError | None = None
        self._torch = Devices("")
        self._torch_error: Finding | None = None
        self._has_smi = True
        note("asking nvidia-smi")
        try:
            self._smi = gpus.of_nvidia_smi(environment)
        except NvidiaSmiError as error:
            self._smi_error = error
        except OSError:
            self._has_smi = False
        note("asking torch")
        if self._smi_error and self._smi_error.cause == "hangs":
            told = "torch was not asked, because nvidia-smi gave no answer"
            self._torch_error = warning(told, self._smi_error.remedy)
        else:
            try:
                self._torch = gpus.ask_torch(environment)
            except ConfigError as error:
                self._torch_error = fault(str(error), f"See the whole error: {sys.executable} -c 'import torch'")
        self._gpus = self._smi or gpus.of_torch(self._torch)
        self._seen_by_torch = len(self._torch.devices)

    def driver(self) -> Finding:
        return ok(self._smi[0].driver) if self._smi else host.driver()

    def cuda(self) -> Finding:
        """What torch's CUDA finds."""
        if self._torch_error:
            return self._torch_error
        cuda = self._torch.cuda
        built = f"torch is built for CUDA {cuda}" if cuda else "torch is built without CUDA"
        found = f"{built}, and finds {_counted(self._seen_by_torch)}"
        expected = self._smi or (host.driver_is_loaded() and "CUDA_VISIBLE_DEVICES" not in self._environment)
        if expected and not cuda:
            remedy = "Install a build of torch with CUDA: https://pytorch.org."
            return fault(f"{built}, and this machine has NVIDIA GPUs", remedy)
        if expected and not self._seen_by_torch:
            remedy = f"Install a driver that is new enough for CUDA {cuda}, or a torch for an older CUDA."
            return fault(f"{found}: {self._torch.problem or 'it gives no reason'}", remedy)
        if self._smi and self._seen_by_torch != len(self._smi):
            remedy = "Look for the GPU that fails: nvidia-smi -q, and Xid in `dmesg`."
            return warning(f"{found} where nvidia-smi finds {len(self._smi)}", remedy)
        return ok(found)

    def gpus(self) -> Finding:
        """Which GPUs there are, and which a run cannot use."""
        if self._smi_error:
            return fault(self._smi_error.problem, self._smi_error.remedy)
        if not self._gpus:
            hidden = self._environment.get("CUDA_VISIBLE_DEVICES")
            hidden_by = f" that CUDA_VISIBLE_DEVICES={hidden!r} allows" if hidden is not None else ""
            return ok(f"none{hidden_by}; teacher and training run on the CPU (--cpu N)")
        names = dict.fromkeys(f"{gpu.name or 'GPU'} with {size(gpu.total_bytes)}" for gpu in self._gpus)
        modes = dict.fromkeys(gpu.compute_mode for gpu in self._gpus if gpu.compute_mode)
        divided = [gpu.number for gpu in self._gpus if gpu.mig]
        found = f"{_counted(len(self._gpus))}: {', '.join(names)}"
        found += f"; compute mode {', '.join(modes)}" if modes else ""
        found += f"; MIG on {placement.gpu_names(divided)}" if divided else ""
        found += "" if self._has_smi else "; told by torch: there is no nvidia-smi"
        never = [problem for gpu in self._gpus if (problem := placement.unusable(gpu, processes=1))]
        if never:
            return warning(found, never[0] + (f" ({len(never) - 1} more)" if never[1:] else ""))
        exclusive = next((gpu for gpu in self._gpus if gpu.compute_mode.startswith("Exclusive")), None)
        return warning(found, f"{exclusive.mode}; several: sudo nvidia-smi -c 0") if exclusive else ok(found)

    def peer_access(self) -> Finding:
        """Whether every GPU can read every other's memory."""
        if self._seen_by_torch < 2:
            return ok("not tried: there is one GPU" if self._seen_by_torch else _NO_GPU)
        without = self._torch.no_peer_access
        if not without:
            return ok(f"between all {self._seen_by_torch} GPUs")
        pairs = ", ".join(f"{a}-{b}" for a, b in without[:6]) + (", ..." if without[6:] else "")
        found = f"none between {len(without)} pair{'s' if without[1:] else ''} of GPUs: {pairs}"
        remedy = "Their replies go through host memory; `nvidia-smi topo -p2p r` tells which GPUs have it."
        return warning(found, remedy)

    def cuda_ipc(self) -> Finding:
        """The trial that a run makes, with the last GPU as the teacher's and all others for training."""
        if not self._seen_by_torch:
            return ok(_NO_GPU)
        *train, teacher = [gpu.number for gpu in self._gpus]
        lists = {"teacher.gpus": str(teacher), "train.gpus": ",".join(map(str, train or [teacher]))}
        settings = config.load(values={"plane": "cuda_ipc", "teacher.model": "doctor:build", **lists})
        try:
            planned = jobs.plan(settings, ["-m", "doctor"], Machine(1, 0, 0, tuple(self._gpus)))
        except ConfigError as error:  # a GPU that a run may not use
            return warning("not tried", str(error))
        pairs = plane_choice.gpu_pairs(planned.teachers, planned.train_gpus)
        self._note(f"trying CUDA IPC between {plane_choice.between(pairs)}")
        with Signals() as signals:
            reason = cuda_ipc_trial.run(pairs, *cuda_ipc_trial.commands(planned, pairs, self._environment), signals)
        if reason is None:
            return ok(f"opened, read and checked between {plane_choice.between(pairs)}")
        return warning(reason, "Until it is mended replies go through host memory (plane host): docs/gpu.md.")


def _counted(count: int) -> str:
    return f"{count or 'no'} GPU{'' if count == 1 else 's'}"
