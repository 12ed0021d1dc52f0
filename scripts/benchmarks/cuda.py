"""The CUDA plane on real GPUs: the copy, the calls, the step, and when to read in place. Needs a GPU.

Teacher and rank are processes of their own, on cards --teacher and --rank, which may be one. A reply has 4 KiB for each token,
and the teacher's answers lie ready in its GPU's memory. Copies and passes are timed by the GPU's own events, from when
the reply has arrived; each figure is a median. A plain copy is between the same two cards in one process.

The training step is of a student of linear layers; the teacher has as many, and its logits come back in bfloat16. Over the
bridge the teacher is one batch ahead. Where both share one card they take time from each other; --rank on another card shows
what is hidden.
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
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import tables
from benchmarks.bridge import open_session, teach
from benchmarks.cuda_results import Calls, Copy, Reading, Results, Step
from benchmarks.processes import Failed
from shmbridge.output_spec import Offer, OutputSpec
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.session import Token, TrainerSession
from shmbridge.teacher.batch import Forward

ITEM = 1024  # float32 of each token
MIB = 2**20
WIDTH, WORDS, LAYERS = 2048, 8192, 8
ROWS, SEQ = 4, 512  # of a training batch
QUICK = {"mib": 32, "turns": 20}


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
    with _session(options, _answers, "cuda.read=in_place") as ask:
        results.copies = [Copy(*values) for values in ask(_time_copies, options.teacher, sizes, options.turns)]
        in_place = ask(_time_passes, sizes, options.turns)
    with _session(options, _answers, "cuda.read=copy") as ask:
        copied = ask(_time_passes, sizes, options.turns)
    results.readings = [Reading(*a, b) for a, (*_, b) in zip(copied, in_place, strict=True)]
    with _session(options, _answers, "cuda.read=copy", "ring.spin_us=0") as ask:  # a spin is no work of the bridge's
        results.calls = Calls(*ask(_time_calls, max(100, 10 * options.turns)))
    with _session(options, _logits, "cuda.read=copy") as ask:
        results.step = Step(*ask(_time_steps, max(10, options.turns // 4)))


# Processes


@contextmanager
def _session(
    options: argparse.Namespace, make: Callable[[torch.device, int], Forward], *settings: str
) -> Iterator[Callable[..., Any]]:
    """A teacher and a rank, alive; yields what calls a function in the rank, with its bridge and device. Raises Failed."""
    tables.progress(f"{make.__name__[1:]} {' '.join(settings)}")
    if make is _logits:
        tokens, output = ROWS * SEQ, OutputSpec("out", "bfloat16", ("seq", WORDS))
    else:
        tokens, output = options.mib * MIB // (4 * ITEM), OutputSpec("out", "float32", ("seq", ITEM))
    limits = (f"ring.max_tokens={tokens}", "teacher.max_batch_tokens=1000000")
    owner, token, offer = open_session(1, output, "plane=cuda_ipc", *limits, *settings)
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    here, there = spawn.Pipe()
    processes = [
        spawn.Process(target=_teach, args=(token, offer, options.teacher, make, tokens), daemon=True),
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
    with Bridge(TrainerSession(token, 0), device) as bridge:
        bridge.wait_ready()
        while (order := pipe.recv()) is not None:
            work, *arguments = order
            pipe.send(work(bridge, device, *arguments))


def _teach(token: Token, offer: Offer, card: int, make: Callable[[torch.device, int], Forward], tokens: int) -> None:
    device = torch.device("cuda", card)
    teach(token, offer, make(device, tokens), device)


def _answers(device: torch.device, tokens: int) -> Forward:
    answers = torch.zeros(1, tokens, ITEM, device=device)
    return lambda batch: {"out": answers[:, : batch.input_ids.shape[1]]}


def _logits(device: torch.device, tokens: int) -> Forward:
    model = _model(device, seed=1)
    return lambda batch: {"out": model(batch.input_ids)}


def _model(device: torch.device, seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    inner = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU())]
    model = torch.nn.Sequential(torch.nn.Embedding(WORDS, WIDTH), *inner, torch.nn.Linear(WIDTH, WORDS))
    return model.to(device, torch.bfloat16)


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


def _time_steps(bridge: Bridge, device: torch.device, turns: int) -> tuple[float, float, float]:
    student, teacher = _model(device, seed=0), _model(device, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    batches = [torch.randint(0, WORDS, (ROWS, SEQ)) for _ in range(turns + 3)]
    fixed = torch.zeros(ROWS, SEQ, WORDS, device=device, dtype=torch.bfloat16)

    def step(batch: torch.Tensor, answer: torch.Tensor) -> None:
        logits = student(batch.pin_memory().to(device, non_blocking=True))
        F.kl_div(logits.log_softmax(-1), answer.softmax(-1), reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()

    def alone() -> Iterator[None]:
        for batch in batches:
            yield step(batch, fixed)

    def bridged() -> Iterator[None]:
        for batch, pending in bridge.prefetch(batches):
            with pending.wait() as reply:
                yield step(batch, reply["out"])

    def together() -> Iterator[None]:
        for batch in batches:
            with torch.inference_mode():
                answer = teacher(batch.pin_memory().to(device, non_blocking=True))
            yield step(batch, answer)

    return _step_seconds(alone, device), _step_seconds(bridged, device), _step_seconds(together, device)


def _step_seconds(loop: Callable[[], Iterator[None]], device: torch.device) -> float:
    """The mean of all but the first three: hosts run ahead, so a single step has no time of its own."""
    steps = loop()
    for _ in range(3):
        next(steps)
    torch.cuda.synchronize(device)
    began, count = time.perf_counter(), 0
    for _ in steps:
        count += 1
    torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / count
