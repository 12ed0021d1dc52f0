"""A training script that fails in the way its first argument names."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist
from notes import note, wait_for
from teachers import BAD, LETHAL, WORDS

import shmbridge
from shmbridge.errors import ParityError, RequestRefused, TeacherDied, TeacherError
from shmbridge.shm.ring import Ring

RANK = int(os.environ["LOCAL_RANK"])
RANKS = int(os.environ["WORLD_SIZE"])
GENERATION = int(os.environ["SHMBRIDGE_SESSION"].rpartition("@")[2])
UNFINISHED = 120  # a token that is only ever in a request that is not finished


def ids(step: int, rows: int = 2) -> torch.Tensor:
    """Of this rank and step; none of the tokens that mean something."""
    return (torch.arange(rows * 4).view(rows, 4) + 3 * step + RANK) % 11


def learn(bridge, steps: range) -> None:
    """Ask for each step, and check what comes."""
    table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0))
    for step in steps:
        reply = bridge.exchange(ids(step), step=step)
        assert torch.equal(reply.logits, table[ids(step)]), f"step {step}: a wrong reply"


def die() -> None:
    note("fault", f"{RANK} {os.getpid()}")
    os.kill(os.getpid(), signal.SIGKILL)


def barrier(bridge) -> None:
    """Waits for a teacher that fails, or is slow."""
    note(f"barrier-{RANK}")
    try:
        bridge.wait_ready()
    except TeacherDied as error:
        note(f"raised-{RANK}", error)
        raise


def loop(bridge) -> None:
    """For as long as it is let."""
    bridge.wait_ready()
    step = 0
    while not os.path.exists("note-enough"):
        learn(bridge, range(step, step + 1))
        step += 1
        if step == 5:
            note(f"trains-{RANK}", os.getpid())


def deaf(bridge) -> None:
    """Ignores SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bridge.wait_ready()
    learn(bridge, range(5))
    note(f"trains-{RANK}", os.getpid())
    while True:
        time.sleep(600)


def interrupted(bridge) -> None:
    """Saves when Ctrl-C comes, with three more replies of the teacher; rank 0 ends first."""
    try:
        loop(bridge)
    except KeyboardInterrupt:
        save_what_was_learnt(bridge)
        raise


def terminated(bridge) -> None:
    """Its handler of SIGTERM takes note; the loop finishes its step, and saves."""
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    bridge.wait_ready()
    step = 0
    while not told:
        learn(bridge, range(step, step + 1))
        step += 1
        if step == 5:
            note(f"trains-{RANK}", os.getpid())
    save_what_was_learnt(bridge)
    note(f"told-{RANK}", len(told))


def save_what_was_learnt(bridge) -> None:
    if RANK == 1:
        wait_for("saved-0")
    learn(bridge, range(3))
    note(f"saved-{RANK}")


def alone() -> None:
    """Never connects."""
    note(f"alone-{RANK}")


def half_written(bridge) -> None:
    """Rank 1 is killed with half of its IDs in the slot."""
    bridge.wait_ready()
    learn(bridge, range(5))
    if RANK == 1:
        write = Ring.write_request

        def write_half(ring, sequence, step, extent, given, arrays=None, **more):
            half = bytes(given)[: len(given) // 2]
            at = ring._slots[sequence % ring.depth] + 64
            ring.memory[at : at + len(half)] = half
            die()
            write(ring, sequence, step, extent, given, arrays or {}, **more)

        Ring.write_request = write_half
        bridge.submit(torch.full((2, 4), UNFINISHED), step=5)
    learn(bridge, range(5, 10**9))


def dies_in_flight(bridge) -> None:
    """Rank 1: after a submit in generation 1, holding a lease in generation 2. The third finishes."""
    bridge.wait_ready()
    note(f"generation-{GENERATION}")
    begin = 4 * (GENERATION - 1)
    learn(bridge, range(begin, begin + 4))
    if GENERATION == 3:
        return
    if RANK == 1:
        pending = bridge.submit(ids(begin + 4), step=begin + 4)
        held = pending.wait() if GENERATION == 2 else None
        note(f"death-{GENERATION}")
        os.kill(os.getpid(), signal.SIGKILL)
        del held
    learn(bridge, range(begin + 4, begin + 6))  # no further, as in a group that steps together
    time.sleep(600)


def crashes_once(bridge) -> None:
    """Rank 1 of the first training crashes; the second goes on where it was."""
    bridge.wait_ready()
    second = os.path.exists("note-fault")
    note(f"ready-{2 if second else 1}")
    learn(bridge, range(6, 12) if second else range(6))
    if not second and RANK == 1:
        die()
    if not second:
        learn(bridge, range(6, 10**9))


def asks_the_mortal(bridge) -> None:
    """Every rank sends what kills the teacher."""
    bridge.wait_ready()
    learn(bridge, range(6))
    note(f"asks-{RANK}")
    wait_for(*(f"asks-{rank}" for rank in range(RANKS)))
    try:
        reply = bridge.exchange(torch.full((2, 4), LETHAL), step=6)
        note(f"answered-{RANK}", tuple(reply.logits.shape))
    except TeacherDied as error:
        note(f"raised-{RANK}", error)
        raise


def late(bridge) -> None:
    """Rank 1 never comes here: see `main`."""
    bridge.wait_ready()
    note("waits")
    dist.barrier()


def load_the_data() -> None:
    note("not-attached", os.getpid())
    time.sleep(600)


def holds_the_gil(bridge) -> None:
    """Rank 1 waits in C, with the GIL, until somebody writes into the pipe."""
    bridge.wait_ready()
    learn(bridge, range(5))
    if RANK == 1:
        native_call()
    dist.barrier()
    learn(bridge, range(5, 10))


def native_call() -> None:
    pipe = os.open("pipe", os.O_RDWR)
    note("fault", f"{RANK} {os.getpid()}")
    ctypes.PyDLL(None).read(pipe, ctypes.create_string_buffer(1), 1)


def skips_an_exchange(bridge) -> None:
    """Rank 1 saves at step 5, and the others do not."""
    bridge.wait_ready()
    learn(bridge, range(5))
    if RANK == 1:
        save()
    learn(bridge, range(5, 10))
    dist.barrier()


def save() -> None:
    note("fault", f"{RANK} {os.getpid()}")
    dist.barrier()


def bad_batches(bridge) -> None:
    """Too many rows for the teacher's memory; then one batch that makes its forward raise."""
    bridge.wait_ready()
    learn(bridge, range(5))
    table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0))
    began = time.monotonic()
    assert torch.equal(bridge.exchange(ids(5, rows=8), step=5).logits, table[ids(5, rows=8)])
    halved_s = time.monotonic() - began
    if RANK == 1:
        began = time.monotonic()
        try:
            bridge.exchange(torch.full((2, 4), BAD), step=6)
        except TeacherError as error:
            traced = (
                "in look" in error.remote_traceback and "ArithmeticError: this batch is bad" in error.remote_traceback
            )
            note("raised", f"{halved_s} {time.monotonic() - began} {traced}")
    learn(bridge, range(7, 12))
    note(f"went-on-{RANK}")


def bad_input(bridge) -> None:
    """What no teacher may see."""
    bridge.wait_ready()
    fine = torch.full((2, 4), 5)
    wrong = {
        "an ID out of the vocabulary": fine.index_fill(1, torch.tensor([2]), WORDS),
        "a negative ID": fine.index_fill(1, torch.tensor([2]), -100),
        "wrong dtype": fine.float(),
        "wrong rank": fine[0],
        "too long": torch.full((2, 1000), 5),
        "empty": fine[:, :0],
        "wrong device": fine.to("meta"),
    }
    for name, given in wrong.items():
        began = time.monotonic()
        try:
            bridge.submit(given)
        except RequestRefused as error:
            assert isinstance(error, ValueError)
            note(f"refused-{name}", f"{time.monotonic() - began}\n{error}")
    learn(bridge, range(5))
    note(f"went-on-{RANK}")


def other_vocabulary(bridge) -> None:
    note("fault")
    try:
        bridge.wait_ready(vocab_size=WORDS - 8)
    except ParityError as error:
        note(f"raised-{RANK}", error)
        raise


def unlike_lengths(bridge) -> None:
    """Rank 1 has ten times as many batches."""
    bridge.wait_ready()
    learn(bridge, range(5 + 45 * RANK))
    bridge.close()
    note(f"closed-{RANK}")


def idle(bridge) -> None:
    """Rank 0 waits for a reply that does not come; rank 1 sleeps."""
    bridge.wait_ready()
    learn(bridge, range(3))
    note(f"idle-{RANK}", os.getpid())
    if RANK == 0:
        bridge.exchange(ids(3), step=3)
    time.sleep(600)


def main() -> None:
    part = globals()[sys.argv[1]]
    torch.set_num_threads(1)
    if part is alone:
        alone()
        return
    if part in (late, holds_the_gil, skips_an_exchange):
        dist.init_process_group("gloo")
    if part is late and RANK == 1:
        wait_for("waits")
        load_the_data()
    with shmbridge.connect() as bridge:
        part(bridge)
    if dist.is_initialized():
        note(f"done-{RANK}")
        wait_for(*(f"done-{rank}" for rank in range(RANKS)))  # gloo resets the connections of whoever is still in there


try:
    main()
except BaseException as error:
    if not isinstance(error, KeyboardInterrupt):
        traceback.print_exc()
    raise
