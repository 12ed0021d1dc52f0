"""Checks of the GPUs. They start processes: nvidia-smi, a process that imports torch, and the trial of CUDA IPC."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from launcher.console.text import size
from launcher.doctor import host
from launcher.doctor.checks import Fact, Finding, run
from launcher.plan import gpus, jobs, placement, plane_choice
from launcher.plan.gpus import Gpu
from launcher.plan.plane_choice import GpuPair
from launcher.process import trial
from launcher.process.signals import Signals
from launcher.process.trial import Command
from shmbridge.errors import ConfigError
from shmbridge.plane import probe
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
        self._hung = False
        note("asking nvidia-smi")
        self._smi, self._smi_problem = self._ask_nvidia_smi()
        note("asking torch")
        self._torch: Devices | None = None
        self._torch_problem = ""
        if not self._hung:
            try:
                self._torch = gpus.ask_torch(environment)
            except ConfigError as error:
                self._torch_problem = str(error)
        seen_by_torch = gpus.of_torch(self._torch) if self._torch else []
        self._gpus: Sequence[Gpu] = self._smi or seen_by_torch
        self._seen_by_torch = len(seen_by_torch)

    def driver(self) -> Finding:
        found = host.driver()
        return Finding("ok", self._smi[0].driver) if self._smi and self._smi[0].driver else found

    def cuda(self) -> Finding:
        """What torch's CUDA finds."""
        if self._hung:
            return Finding("warning", "torch was not asked, because nvidia-smi gave no answer", gpus.SLOW_DRIVER)
        if not self._torch:
            return Finding("fault", self._torch_problem, f"See the whole error: {sys.executable} -c 'import torch'")
        built = f"torch is built for CUDA {self._torch.cuda}" if self._torch.cuda else "torch is built without CUDA"
        expected = self._smi or (host.driver_is_loaded() and "CUDA_VISIBLE_DEVICES" not in self._environment)
        if expected and not self._torch.cuda:
            return Finding(
                "fault",
                f"{built}, and this machine has NVIDIA GPUs",
                "Install a build of torch with CUDA: https://pytorch.org.",
            )
        if expected and not self._seen_by_torch:
            return Finding(
                "fault",
                f"{built}, and finds no GPU: {self._torch.problem or 'it gives no reason'}",
                f"Install a driver that is new enough for CUDA {self._torch.cuda}, or a torch for an older CUDA.",
            )
        if self._smi and self._seen_by_torch != len(self._smi):
            return Finding(
                "warning",
                f"{built}, and finds {_counted(self._seen_by_torch)} where nvidia-smi finds {len(self._smi)}",
                "Look for the GPU that fails: nvidia-smi -q, and Xid in `dmesg`.",
            )
        return Finding("ok", f"{built}, and finds {_counted(self._seen_by_torch)}")

    def gpus(self) -> Finding:
        """Which GPUs there are, and which a run cannot use."""
        if isinstance(self._smi_problem, Finding):
            return self._smi_problem
        if not self._gpus:
            hidden = self._environment.get("CUDA_VISIBLE_DEVICES")
            hidden_by = f" that CUDA_VISIBLE_DEVICES={hidden!r} allows" if hidden is not None else ""
            return Finding("ok", f"none{hidden_by}; teacher and training run on the CPU (--cpu N)")
        names = dict.fromkeys(f"{gpu.name or 'GPU'} with {size(gpu.total_bytes)}" for gpu in self._gpus)
        modes = dict.fromkeys(gpu.compute_mode for gpu in self._gpus if gpu.compute_mode)
        found = f"{_counted(len(self._gpus))}: {', '.join(names)}"
        found += f"; compute mode {', '.join(modes)}" if modes else ""
        divided = [gpu.number for gpu in self._gpus if gpu.mig]
        found += f"; MIG on {placement.gpu_names(divided)}" if divided else ""
        found += f"; {self._smi_problem}" if self._smi_problem else ""
        never = [problem for gpu in self._gpus if (problem := placement.unusable(gpu, processes=1))]
        if never:
            more = f" ({len(never) - 1} more)" if never[1:] else ""
            return Finding("warning", found, never[0] + more)
        exclusive = next((gpu for gpu in self._gpus if gpu.compute_mode.startswith("Exclusive")), None)
        if exclusive:
            return Finding("warning", found, f"{placement.mode(exclusive)}; several: sudo nvidia-smi -c 0")
        return Finding("ok", found)

    def peer_access(self) -> Finding:
        """Whether every GPU can read every other's memory."""
        if not self._torch or self._seen_by_torch < 2:
            return Finding("ok", _NO_GPU if not self._seen_by_torch else "not tried: there is one GPU")
        without = self._torch.no_peer_access
        if not without:
            return Finding("ok", f"between all {self._seen_by_torch} GPUs")
        pairs = ", ".join(f"{a}-{b}" for a, b in without[:6]) + (", ..." if without[6:] else "")
        return Finding(
            "warning",
            f"none between {len(without)} pair{'s' if without[1:] else ''} of GPUs: {pairs}",
            "Their replies go through host memory; `nvidia-smi topo -p2p r` tells which GPUs have it.",
        )

    def cuda_ipc(self) -> Finding:
        """The trial that a run makes, with the last GPU as the teacher's and all others for training."""
        if not self._seen_by_torch or not self._gpus:
            return Finding("ok", _NO_GPU)
        *train, teacher = self._gpus
        pairs = [GpuPair(0, teacher, gpu, device) for device, gpu in enumerate(train or [teacher])]
        self._note(f"trying CUDA IPC between {plane_choice.between(pairs)}")
        with Signals() as signals:
            reason = trial.run(pairs, *_commands(pairs, self._gpus, self._environment), signals)
        if reason is None:
            return Finding("ok", f"opened, read and checked between {plane_choice.between(pairs)}")
        return Finding(
            "warning", reason, "Until it is mended replies go through host memory (plane host): docs/gpu.md."
        )

    def _ask_nvidia_smi(self) -> tuple[list[Gpu], Finding | str]:
        """The visible GPUs, and a fault or a remark about nvidia-smi."""
        try:
            answer = gpus.ask_nvidia_smi(self._environment)
            if answer.code == 0:
                visible = self._environment.get("CUDA_VISIBLE_DEVICES")
                return gpus.select_visible(answer.out.decode(errors="replace"), visible), ""
        except TimeoutError as error:
            self._hung = True
            return [], Finding("fault", str(error), gpus.SLOW_DRIVER)
        except OSError:
            return [], "told by torch: there is no nvidia-smi"
        except ConfigError as error:
            return [], Finding("fault", str(error), "Set CUDA_VISIBLE_DEVICES to whole GPUs.")
        return [], Finding("fault", f"nvidia-smi failed (exit code {answer.code}): {answer.last_words}", gpus.NO_DRIVER)


def _commands(
    pairs: Sequence[GpuPair], cards: Sequence[Gpu], environment: Mapping[str, str]
) -> tuple[list[Command], Command]:
    """The commands of exporter and importer, as jobs of a run on these GPUs."""
    teacher, train = [pairs[0].teacher.number], [pair.train.number for pair in pairs]

    def command(job: str, base: Mapping[str, str], own: list[int], others: list[int], task: str) -> Command:
        variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": placement.visible(own, others, cards)}
        return Command(f"the {job}", (sys.executable, "-m", probe.__name__, task), {**base, **variables})

    exporter = command("exporter", jobs.shareable(environment), teacher, train, "export")
    return [exporter], command("importer", environment, train, teacher, "import")


def _counted(count: int) -> str:
    return f"{count or 'no'} GPU{'' if count == 1 else 's'}"
