"""Peak memory and time of a distillation loss, forward and backward: the plain formula, and shmbridge.losses.

    logits         the student's logits exist; their gradient is asked for
    in place       the same, and the gradient may overwrite them
    hidden + head  the student's hidden states and head's weight; the gradients of both

The plain formula is F.log_softmax of the logits in float32, then F.kl_div (TRL's formula for JSD). Every contestant
runs in a fresh process with one thread, once on a small shape to have everything loaded, then on the stated one. Peak:
the highest resident memory of forward and backward above what lies there when they begin, the inputs of both sides; x
logits: against one copy of the student's logits. CPU: time of one forward and backward, the faster of two.
glibc is told to give freed blocks of 1 MiB or more back at once, so that the peak is what was in use, not what it kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import tables
from shmbridge.head import Head
from shmbridge.losses import LazyLogits, forward_kl, generalized_jsd

TEMPERATURE = 2.0
_RUNS = 2
LOSSES = ("forward KL", "JSD")
FORMS = {"logits": ("plain", "shmbridge"), "in place": ("shmbridge",), "hidden + head": ("plain", "shmbridge")}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    loss: str
    dtype: str
    form: str
    contestant: str
    rows: int
    vocab: int
    dim: int

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Measured:
    peak_bytes: int
    seconds: float


def run(options: argparse.Namespace) -> int:
    """Measure every contestant and print the table."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # read by the fresh processes
    facts = tables.Facts.now()
    numbers = ("peak", "x logits", "x plain", "CPU", "x plain")
    rows = [row for dtype in options.dtypes for loss in LOSSES for row in _rows(options, loss, dtype)]
    measured = tables.table(("loss", "dtype", "student", "formula"), numbers, rows=rows, grouped=2)
    setting = (
        f"{options.rows} rows x {options.vocab} words, hidden states of {options.dim}, temperature {TEMPERATURE:g}"
    )
    tables.report("losses", None, facts, settings=[setting], shown=[measured])
    return 0


def _rows(options: argparse.Namespace, loss: str, dtype: str) -> Iterator[tuple[str, ...]]:
    plain: dict[str, Measured] = {}
    for form, contestants in FORMS.items():
        for contestant in contestants:
            case = Case(loss, dtype, form, contestant, options.rows, options.vocab, options.dim)
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                found = fresh.apply(measure, (case,))
            if contestant == "plain":
                plain[form] = found
            base = plain.get(form, plain["logits"])
            yield (
                *(loss, dtype, form, contestant),
                f"{found.peak_bytes / 2**20:.0f} MiB",
                f"{found.peak_bytes / case.logits_bytes:.2f}",
                f"{found.peak_bytes / max(1, base.peak_bytes):.2f}",
                f"{found.seconds:.2f} s",
                f"{found.seconds / base.seconds:.2f}",
            )


def measure(case: Case) -> Measured:
    """In this process, which should be a fresh one."""
    torch.set_num_threads(1)
    small = replace(case, rows=8, vocab=64, dim=8)
    _step(small, *_inputs(small))
    inputs = _inputs(case)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = _status_bytes("VmRSS")
    seconds = [_step(case, *inputs)]
    peak = _status_bytes("VmHWM") - before
    seconds += [_step(case, *inputs) for _ in range(_RUNS - 1)]
    return Measured(peak, min(seconds))


def _inputs(case: Case) -> tuple[Tensor, ...]:
    """The teacher's logits, then the student's logits or its hidden states and head."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    teacher = torch.randn(case.rows, case.vocab, dtype=dtype)
    if case.form == "hidden + head":
        shapes = (case.rows, case.dim), (case.vocab, case.dim)
        return teacher, *(torch.randn(shape, dtype=dtype).mul_(case.dim**-0.25).requires_grad_() for shape in shapes)
    return teacher, torch.randn(case.rows, case.vocab, dtype=dtype, requires_grad=True)


def _step(case: Case, teacher: Tensor, *student: Tensor) -> float:
    """CPU seconds of forward and backward."""
    started = time.process_time()
    loss = _plain(case, teacher, *student) if case.contestant == "plain" else _ours(case, teacher, *student)
    loss.backward()
    seconds = time.process_time() - started
    for tensor in student:
        tensor.grad = None
    return seconds


def _ours(case: Case, teacher: Tensor, source: Tensor, weight: Tensor | None = None) -> Tensor:
    student = source if weight is None else LazyLogits(source, Head(weight))
    loss = forward_kl if case.loss == "forward KL" else generalized_jsd
    return loss(student, teacher, temperature=TEMPERATURE, inplace=case.form == "in place")


def _plain(case: Case, teacher: Tensor, source: Tensor, weight: Tensor | None = None) -> Tensor:
    logits = source if weight is None else F.linear(source, weight)
    student = F.log_softmax(logits.float() / TEMPERATURE, -1)
    with torch.no_grad():
        target = F.log_softmax(teacher.float() / TEMPERATURE, -1)
    formula: Callable[[Tensor, Tensor], Tensor] = _plain_forward if case.loss == "forward KL" else _plain_jsd
    return formula(student, target).sum(-1).mean() * TEMPERATURE**2


def _plain_forward(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student, teacher, reduction="none", log_target=True)


def _plain_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    half = torch.tensor(0.5).log()
    mixture = torch.logsumexp(torch.stack((student + half, teacher + half)), 0)
    return 0.5 * (_plain_forward(mixture, teacher) + _plain_forward(mixture, student))


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
