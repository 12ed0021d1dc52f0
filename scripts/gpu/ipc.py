"""Bare CUDA IPC between two processes on one card, through shmbridge.plane.cuda_ipc and without a session.

    python scripts/gpu/ipc.py

An exporter sleeps in a kernel, fills its memory with a number and records an event, all in one stream; an importer opens
both, lets a stream of its own wait for the event, and copies. Four cases, each with two new processes:

    pending    the importer waits while the kernel sleeps. Its copy must have the number.
    finished   the exporter's stream has finished before. The copy must have the number.
    killed     SIGKILL ends the exporter while the kernel sleeps. What the importer's stream then does is found out: its wait
               ends (with the number, or with what was there before), it never ends, or CUDA reports an error.
    gone       the exporter was killed before its memory is opened. Found out too: an error, or memory.

Exits 0 where the first two are right; the others are facts about this driver, and any outcome of them is recorded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from shmbridge.plane import cuda_ipc

START = "spawn"  # CUDA does not survive a fork
CASES = ("pending", "finished", "killed", "gone")
NBYTES = 32 * 2**20
BEFORE, NUMBER = 7, 42  # what the memory holds at first, and what is written behind the kernel
CYCLES = 4_000_000_000  # of the kernel that sleeps: two seconds and more
NEVER_S = 15.0  # a stream that waits for so long counts as one that waits for ever
PATIENCE_S = 90.0  # for the start of a process, torch's import and a CUDA context included


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and print a line for each; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument("--exporter", type=int, default=0, metavar="GPU", help="its card (default: 0)")
    parser.add_argument("--importer", type=int, default=0, metavar="GPU", help="its card (default: 0)")
    options = parser.parse_args(arguments)
    found = {case: run(case, options.exporter, options.importer) for case in CASES}
    for case, told in found.items():
        print(f"{case:10}{told}")
    right = [found[case].startswith("came, right") for case in ("pending", "finished")]
    if options.json:
        options.json.write_text(json.dumps({"found": [f"{case}: {told}" for case, told in found.items()]}, indent=1))
    return int(not all(right))


def run(case: str, exporter_card: int, importer_card: int) -> str:
    """What the importer saw. This process itself makes no CUDA call: an error there would spoil the next case."""
    context = multiprocessing.get_context(START)
    processes, pipes = [], []
    for role, card in ((exporter, exporter_card), (importer, importer_card)):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=role, args=(case, card, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        return _conduct(case, processes[0], *pipes)
    except (EOFError, TimeoutError) as error:
        return f"failed: {error or 'a process ended early; its error is above'}"
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            process.kill()  # one that waits for ever does not end by itself
            process.join()
            pipe.close()


def _conduct(case: str, exporting: multiprocessing.process.BaseProcess, out: Connection, into: Connection) -> str:
    """Hand the handles over, start the kernel, kill the exporter where the case says so, and hear what came."""
    handles = _receive(out)
    _receive(into)  # the importer is up
    if case == "gone":
        exporting.kill()
        exporting.join()
    into.send(handles)
    told = _receive(into)  # all is open, or what became of a memory that is gone
    if case == "gone":
        return str(told)
    out.send("launch")
    _receive(out)  # recorded, and for `finished` at its end
    into.send("wait")
    _receive(into)  # its stream waits
    if case == "killed":
        exporting.kill()
        exporting.join()
    into.send("look")
    return str(_receive(into))


def _receive(pipe: Connection) -> object:
    if not pipe.poll(PATIENCE_S):
        raise TimeoutError(f"a process said nothing for {PATIENCE_S:g} s")
    return pipe.recv()


def exporter(case: str, card: int, pipe: Connection) -> None:
    """Exports memory and an event; launches the kernel when it is told to."""
    device = torch.device("cuda", card)
    torch.cuda.set_device(device)
    memory, event = cuda_ipc.allocate(NBYTES, device), cuda_ipc.shared_event(device)
    stream = cuda_ipc.side_stream(device)
    memory.fill_(BEFORE)
    torch.cuda.synchronize(device)
    pipe.send((cuda_ipc.export_memory(memory), cuda_ipc.export_event(event)))
    pipe.recv()
    with cuda_ipc.on(stream):
        torch.cuda._sleep(CYCLES)
        memory.fill_(NUMBER)
        event.record(stream)
    if case == "finished":
        torch.cuda.synchronize(device)
    pipe.send("recorded")
    pipe.recv()  # until it is killed


def importer(case: str, card: int, pipe: Connection) -> None:
    """Opens both, waits for the event in a stream, copies, and tells what came."""
    device = torch.device("cuda", card)
    torch.cuda.set_device(device)
    stream = cuda_ipc.side_stream(device)
    torch.cuda.synchronize(device)
    pipe.send("up")
    memory_handle, event_handle = pipe.recv()
    try:
        memory, event = cuda_ipc.open_memory(memory_handle, device), cuda_ipc.open_event(event_handle, device)
        if case == "gone":
            pipe.send(f"opened; its memory holds {_numbers(memory)}")
            return
        copied = torch.empty_like(memory)  # now: to allocate beside a stream that is stuck may wait for it
        pipe.send("open")
        pipe.recv()
        seen = event.query()
        stream.wait_event(event)
        with cuda_ipc.on(stream):
            copied.copy_(memory, non_blocking=True)
        done = cuda_ipc.timed_event()
        done.record(stream)
        pipe.send("waits")
        pipe.recv()
        told = _outcome(done, copied)
    except RuntimeError as error:
        pipe.send(f"CUDA error: {str(error).splitlines()[0]}")
        return
    pipe.send(f"{told}; the imported event's query() before the wait said {seen}")


def _outcome(done: cuda_ipc.Event, copied: torch.Tensor) -> str:
    """`done` is recorded behind the copy."""
    deadline = time.monotonic() + NEVER_S
    while not done.query():
        if time.monotonic() > deadline:
            return f"never: the stream still waits after {NEVER_S:g} s"
        time.sleep(0.01)
    found = _numbers(copied)
    return "came, right" if found == str(NUMBER) else f"came, wrong: the copy holds {found}"


def _numbers(tensor: torch.Tensor) -> str:
    return ", ".join(str(number) for number in tensor.unique().tolist()[:4])


if __name__ == "__main__":
    sys.exit(main())
