"""The CUDA plane on real GPUs: the copy, the calls, and when to read in place. Needs a GPU.

Teacher and rank are processes of their own, on cards --teacher and --rank, which may be one. A reply has 4 KiB for each token,
and the teacher's answers lie ready in its GPU's memory. Copies and passes are timed by the GPU's own events, from when
the reply has arrived; each figure is a median. A plain copy is between the same two cards in one process. Training steps are
measured by scripts/gpu/train.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.table import Table

from benchmarks import tables
from benchmarks.bridge import open_session, teach
from benchmarks.processes import Failed
from benchmarks.tables import Target, size_text
from shmbridge.output_spec import Offer, OutputSpec
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.session import Token

ITEM = 1024  # float32 of each token
MIB = 2**20
COPY_SHARE = 0.97  # of the bandwidth of a plain copy
CPU_US = 30.0
QUICK = {"mib": 32, "turns": 20}


@dataclass
class Copy:
    """One size of reply: seconds of a copy out of the teacher's memory, and of a plain one in one process."""

    nbytes: int
    reply_s: float
    plain_s: float

    @property
    def share(self) -> float:
        return self.plain_s / self.reply_s


@dataclass
class Calls:
    """A small reply; microseconds, medians but for the CPU's, which is the mean."""

    cpu_us: float  # of submit, wait and release, of the rank's thread
    bridge_us: float  # from submit until the reply is there on the GPU
    call_us: float  # the same forward, in one process


@dataclass
class Reading:
    """A kernel that reads a reply `passes` times: seconds from its arrival to the last pass, for each cuda.read."""

    nbytes: int
    passes: int
    copy_s: float
    in_place_s: float


@dataclass
class Results:
    """Everything that a run measured."""

    copies: list[Copy] = field(default_factory=list)
    calls: Calls | None = None
    readings: list[Reading] = field(default_factory=list)

    def targets(self) -> list[Target]:
        """Of the copies the largest is judged, where launching no longer counts."""
        copy = Target("copy of a reply: bandwidth / plain copy in one process", f"{COPY_SHARE:g}", "not measured", None)
        cpu = Target("CPU time of submit + wait + release", f"{CPU_US:g} us", "not measured", None)
        if self.copies:
            largest = max(self.copies, key=lambda copy: copy.nbytes)
            copy.found, copy.reached = f"{largest.share:.3f} ({size_text(largest.nbytes)})", largest.share >= COPY_SHARE
        if self.calls:
            cpu.found, cpu.reached = f"{self.calls.cpu_us:.1f} us", self.calls.cpu_us < CPU_US
        return [copy, cpu]

    def shown(self) -> Iterator[tuple[str, Table]]:
        """Tables with their titles, of what was measured."""
        if self.copies:
            rows = [
                (
                    size_text(each.nbytes),
                    _rate(each.nbytes, each.reply_s),
                    _rate(each.nbytes, each.plain_s),
                    f"{each.share:.3f}",
                )
                for each in self.copies
            ]
            numbers = ("reply", "from the teacher", "plain copy", "share")
            yield "copying a reply out of the teacher's memory", tables.table((), numbers, rows=rows)
        if self.calls:
            calls = self.calls
            times = (calls.bridge_us, calls.call_us, calls.bridge_us - calls.call_us, calls.cpu_us)
            numbers = ("over the bridge", "in one process", "added", "CPU of the rank")
            yield "a small reply", tables.table((), numbers, rows=[[f"{us:.1f} us" for us in times]])
        if self.readings:
            rows = [
                (
                    *(size_text(each.nbytes), str(each.passes)),
                    *(f"{1e6 * seconds:.0f} us" for seconds in (each.copy_s, each.in_place_s)),
                    "copy" if each.copy_s < each.in_place_s else "in_place",
                )
                for each in self.readings
            ]
            numbers = ("reply", "passes", "copy", "in_place", "faster")
            yield "cuda.read: when which is faster", tables.table((), numbers, rows=rows)


def _rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / seconds / 1e9:.0f} GB/s"


def run(options: argparse.Namespace) -> int:
    """Measure, print, write the JSON. 2 where there is no GPU, 1 where a target is missed. Raises Failed."""
    if not torch.cuda.is_available():
        print(f"cuda: needs a GPU; torch.cuda.is_available() is False (torch {torch.__version__})", file=sys.stderr)
        return 2
    facts, gpus, results = tables.Facts.now(), gpus_of(options), Results()
    _measure(options, results)
    show(results, facts, gpus, options)
    return int(not all(target.reached for target in results.targets()))


def gpus_of(options: argparse.Namespace) -> dict[str, str]:
    """The teacher's and the rank's card, driver, CUDA."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:  # as in some containers
        found = []
    cards = {"teacher on": options.teacher, "rank on": options.rank}
    names = {who: f"{torch.cuda.get_device_name(card)} ({card})" for who, card in cards.items()}
    return {**names, "driver": found[0] if found else "unknown", "CUDA": str(torch.version.cuda)}


def show(results: Results, facts: tables.Facts, gpus: dict[str, str], options: argparse.Namespace) -> None:
    tables.report(
        "cuda",
        __doc__,
        facts,
        settings=[", ".join(f"{name} {value}" for name, value in gpus.items())],
        shown=results.shown(),
        targets=results.targets(),
        figures={"gpus": gpus, **asdict(results)},
        path=options.json,
    )


def _measure(options: argparse.Namespace, results: Results) -> None:
    sizes = [nbytes for nbytes in (MIB, 16 * MIB, options.mib * MIB) if nbytes <= options.mib * MIB]
    with _session(options, "cuda.read=in_place") as ask:
        results.copies = [Copy(*values) for values in ask(_time_copies, options.teacher, sizes, options.turns)]
        in_place = ask(_time_passes, sizes, options.turns)
    with _session(options, "cuda.read=copy") as ask:
        copied = ask(_time_passes, sizes, options.turns)
    results.readings = [Reading(*a, b) for a, (*_, b) in zip(copied, in_place, strict=True)]
    with _session(options, "cuda.read=copy", "ring.spin_us=0") as ask:  # a spin is no work of the bridge's
        results.calls = Calls(*ask(_time_calls, max(100, 10 * options.turns)))


# Processes


@contextmanager
def _session(options: argparse.Namespace, *settings: str) -> Iterator[Callable[..., Any]]:
    """A teacher and a rank, alive; yields what calls a function in the rank, with its bridge and device. Raises Failed."""
    tables.progress(" ".join(settings))
    tokens, output = options.mib * MIB // (4 * ITEM), OutputSpec("out", "float32", ("seq", ITEM))
    limits = (f"ring.max_tokens={tokens}", "teacher.max_batch_tokens=1000000")
    owner, token, offer = open_session(1, output, "plane=cuda_ipc", *limits, *settings)
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    here, there = spawn.Pipe()
    processes = [
        spawn.Process(target=_teach, args=(token, offer, options.teacher, tokens), daemon=True),
        spawn.Process(target=_rank, args=(token, options.rank, there), daemon=True),
    ]

    def ask(*work: Any) -> Any:
        here.send(work)
        try:
            if not here.poll(10 * options.patience):
                raise Failed("the rank does not answer: hung")
            return here.recv()
        except EOFError:
            raise Failed("the rank has ended; its error is above") from None

    try:
        for process in processes:
            process.start()
        there.close()
        yield ask
        here.send(None)
        for process in processes:
            process.join(options.patience)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        owner.close()


def _rank(token: Token, card: int, pipe: Connection) -> None:
    device = torch.device("cuda", card)
    torch.cuda.set_device(device)
    with Bridge(RankSession(token, 0), device) as bridge:
        bridge.wait_ready()
        while (order := pipe.recv()) is not None:
            work, *arguments = order
            pipe.send(work(bridge, device, *arguments))


def _teach(token: Token, offer: Offer, card: int, tokens: int) -> None:
    device = torch.device("cuda", card)
    answers = torch.zeros(1, tokens, ITEM, device=device)
    teach(token, offer, lambda batch: {"out": answers[:, : batch.input_ids.shape[1]]}, device)


# Measurements, in the rank


def _ids(nbytes: int) -> torch.Tensor:
    return torch.zeros(1, nbytes // (4 * ITEM), dtype=torch.int64)


def _gpu_seconds(work: Callable[[], object], turns: int) -> float:
    """Median by the GPU's clock."""
    found = []
    for _ in range(turns + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended) / 1000)
    return statistics.median(found[3:])


def _time_copies(
    bridge: Bridge, device: torch.device, teacher: int, sizes: list[int], turns: int
) -> list[tuple[int, float, float]]:
    """Under a lease in place: the same copy that cuda.read=copy makes."""
    found = []
    for nbytes in sizes:
        plain = torch.zeros(1, nbytes // (4 * ITEM), ITEM, device=torch.device("cuda", teacher))
        target = torch.empty_like(plain, device=device)
        with bridge.submit(_ids(nbytes)).wait() as reply:
            source = reply["out"]
            torch.cuda.synchronize(device)
            ours = _gpu_seconds(lambda: target.copy_(source, non_blocking=True), turns)  # noqa: B023
            source = None
        theirs = _gpu_seconds(lambda: target.copy_(plain, non_blocking=True), turns)  # noqa: B023
        found.append((nbytes, ours, theirs))
    return found


def _time_passes(bridge: Bridge, device: torch.device, sizes: list[int], turns: int) -> list[tuple[int, int, float]]:
    return [
        (nbytes, passes, _time_pass(bridge, device, nbytes, passes, turns)) for nbytes in sizes for passes in (1, 3)
    ]


def _time_pass(bridge: Bridge, device: torch.device, nbytes: int, passes: int, turns: int) -> float:
    """From when the reply has arrived, to the release."""
    ids, found = _ids(nbytes), []
    for _ in range(max(10, turns // 4) + 3):
        pending = bridge.submit(ids)
        while not pending.done:
            time.sleep(1e-4)
        time.sleep(0.002)  # its event has come as well
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        began.record()
        with pending.wait() as reply:
            for _ in range(passes):
                reply["out"].sum()
            ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended) / 1000)
    return statistics.median(found[3:])


def _time_calls(bridge: Bridge, device: torch.device, turns: int) -> tuple[float, float, float]:
    ids = _ids(4 * ITEM)
    cpu_us, bridge_us, call_us = [], [], []
    answers = torch.zeros(1, 1, ITEM, device=device)
    for _ in range(turns + 20):
        began, cpu = time.perf_counter_ns(), time.thread_time_ns()
        lease = bridge.submit(ids).wait()
        used = time.thread_time_ns() - cpu
        torch.cuda.current_stream(device).synchronize()
        bridge_us.append((time.perf_counter_ns() - began) / 1000)
        cpu = time.thread_time_ns()
        lease.release()
        cpu_us.append((used + time.thread_time_ns() - cpu) / 1000)
    for _ in range(turns + 20):
        began = time.perf_counter_ns()
        ids.pin_memory().to(device, non_blocking=True)
        answers.clone()
        torch.cuda.current_stream(device).synchronize()
        call_us.append((time.perf_counter_ns() - began) / 1000)
    return statistics.mean(cpu_us[20:]), statistics.median(bridge_us[20:]), statistics.median(call_us[20:])
