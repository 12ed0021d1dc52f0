"""Which signals ranks receive, and that what they save is saved: whole runs of the command, with torchrun and the teacher's process."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness import until
from tests.launcher.running import PATIENCE_S, Launched, launch

TEACHER = """
import time, torch
from pathlib import Path
class Forward:
    vocab_size = 16
    def __call__(self, batch):
        return {"logits": torch.eye(16)[batch.input_ids]}
def build(settings):
    return Forward()
def slow(settings):
    Path("loading").touch()
    time.sleep(600)
"""

# Trains until it is told to stop, then asks for three more replies and saves how often it was told. With `notes` a worker of
# a DataLoader makes the batches: it, too, goes on.
TRAIN = """
import os, signal, sys, time, torch, shmbridge
from pathlib import Path
from torch.utils.data import DataLoader
mode, rank = sys.argv[1], int(os.environ["LOCAL_RANK"])
told = []
if mode != "interrupt":
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))

def save():
    Path(f"saving{rank}").touch()
    while rank == 1 and mode == "to all" and not Path("gate").exists():
        time.sleep(0.02)
    for _ in range(3):
        assert not bridge.exchange(next(loader)).missing
    Path(f"saved{rank}").write_text(repr(told))

def batches():
    data = torch.ones(10**6, 4, dtype=torch.int64)
    return iter(DataLoader(data, batch_size=2, num_workers=1) if mode == "notes" else data.split(2))

with shmbridge.connect() as bridge:
    bridge.wait_ready()
    loader, step = batches(), 0
    try:
        while not told:
            bridge.exchange(next(loader), step=step)
            step += 1
            if step == 5:
                print("at step 5", flush=True)
    except KeyboardInterrupt:
        told.append(2)
        save()
        raise
    save()
"""

WAITS = """
import shmbridge
bridge = shmbridge.connect()
try:
    bridge.wait_ready()
finally:
    print("the wait is over", flush=True)
"""

FLAGS = ("--teacher", "toy:build", "--cpu", "2", "ring.max_tokens=64")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(TEACHER)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "waits.py").write_text(WAITS)
    return tmp_path


def says_nothing_of_failures(run: Launched) -> None:
    for text in ("Traceback", "The run failed", "Died", "SIGKILL"):
        assert text not in run.text, run.text


@pytest.mark.parametrize(
    ("mode", "number", "code"),
    [("interrupt", signal.SIGINT, 130), pytest.param("notes", signal.SIGTERM, 143, marks=pytest.mark.matrix)],
)
@pytest.mark.promise(23)
def test_a_rank_gets_the_signal_that_was_sent_once_and_saves(directory, promise, mode, number, code):
    """The teacher, and the DataLoader's worker, serve it until it has."""
    with launch(directory, *FLAGS, "--", "train.py", mode) as run:
        run.says("at step 5", times=2)
        asked = run.signal(number)
        assert run.wait() == code
        took_s = time.monotonic() - asked
        for rank in (0, 1):
            assert (directory / f"saved{rank}").exists(), run.text
            assert (directory / f"saved{rank}").read_text() == f"[{int(number)}]"
        says_nothing_of_failures(run)
    promise.kept(f"{number.name}: both ranks got it once, were served, and saved", took_s, code)


@pytest.mark.promise(23)
def test_a_signal_to_every_process_at_once_reaches_each_rank_once(directory, promise):
    """As Slurm does it. Rank 1 saves while rank 0 has ended."""
    with launch(directory, *FLAGS, "--", "train.py", "to all") as run:
        run.says("at step 5", times=2)
        for pid in [*run.processes(), run.process.pid]:
            os.kill(pid, signal.SIGTERM)
        until((directory / "saved0").exists, "what rank 0 saves")
        until((directory / "saving1").exists, "the handler of rank 1")
        assert run.processes("shmbridge.teacher.main")
        (directory / "gate").touch()
        assert run.wait() == 143
        for rank in (0, 1):
            assert (directory / f"saved{rank}").read_text() == "[15]"
        says_nothing_of_failures(run)
    promise.kept("SIGTERM to every process: both ranks got it once, were served, and saved", exit_code=143)


def test_ctrl_c_while_the_teacher_loads_ends_the_wait_at_once(directory):
    """Outside of a `with` block, too, a rank that was told to stop ends without a traceback."""
    flags = ("--teacher", "toy:slow", "--cpu", "1", "ring.max_tokens=64", "timeouts.shutdown_s=60")
    with launch(directory, *flags, "--", "waits.py") as run:
        until((directory / "loading").exists, "the teacher")
        until(lambda: "barrier" in status(run), "the rank at the barrier")
        run.signal(signal.SIGINT)
        assert run.wait() == 130
        assert "the wait is over" in run.text
        says_nothing_of_failures(run)


def status(run: Launched) -> str:
    if not run.session:
        return ""
    done = subprocess.run(
        [sys.executable, "-m", "shmbridge.launch", "status", run.session], capture_output=True, text=True
    )
    return done.stdout


# What a killed rank leaves

# The worker, as a DataLoader's, holds the tracker of the names open until it is killed itself.
LEAVES = """
import multiprocessing, os, signal, time, shmbridge
if __name__ == "__main__":
    with shmbridge.connect() as bridge:
        bridge.wait_ready()
        context = multiprocessing.get_context("spawn")
        locks = [context.Lock() for _ in range(3)]
        context.Process(target=time.sleep, args=(600,)).start()
        print("locks", *(lock._semlock.name for lock in locks), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_leaves_no_semaphores_of_multiprocessing(directory):
    (directory / "leaves.py").write_text(LEAVES)
    with launch(directory, "--teacher", "toy:build", "--cpu", "1", "ring.max_tokens=64", "--", "leaves.py") as run:
        assert run.wait() == 137
        line = next(line for line in run.text.splitlines() if "locks /mp-" in line)
        names = line.split("locks ")[1].split()
        assert len(names) == 3
        assert [name for name in names if Path(f"/dev/shm/sem.{name[1:]}").exists()] == []


# The terminal

ASKS = """
import shmbridge
bridge = shmbridge.connect()
answer = 41
breakpoint()
print("the answer is", answer, flush=True)
bridge.close()
"""


@pytest.mark.slow
def test_a_debugger_in_the_only_rank_reads_from_the_terminal(directory):
    (directory / "asks.py").write_text(ASKS)
    command = [sys.executable, "-m", "shmbridge.launch", "--teacher", "toy:build", "--cpu", "1", "ring.max_tokens=64"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.execv(sys.executable, [*command, "--", "asks.py"])
    code = None
    try:
        shown = read_until(terminal, b"(Pdb)")
        os.write(terminal, b"answer += 1\nc\n")
        shown += read_until(terminal, b"done in")
        _, code = os.waitpid(pid, 0)
    finally:
        os.close(terminal)  # which hangs up on the launcher, where it still runs
        if code is None:
            os.waitpid(pid, 0)
    assert b"the answer is 42" in shown, shown.decode()
    assert code == 0


def read_until(terminal: int, text: bytes) -> bytes:
    found = b""
    while text not in found:
        assert select.select([terminal], [], [], PATIENCE_S)[0], found.decode()
        found += os.read(terminal, 4096)
    return found


# HuggingFace's Trainer

TRAINER = """
import torch, shmbridge
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
class Tells(TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 3:
            print("at step 3", flush=True)
class Distils(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        wanted = bridge.exchange(inputs["input_ids"]).logits
        return (model(inputs["input_ids"]).logits - wanted).square().mean()
with shmbridge.connect() as bridge:
    bridge.wait_ready()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    how = {"enable_jit_checkpoint": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments("out", **how)
    Distils(model, arguments, train_dataset=[{"input_ids": torch.arange(4)}] * 10**6, callbacks=[Tells()]).train()
"""


@pytest.mark.slow
def test_trainers_jit_checkpoint_at_sigterm_is_whole(directory):
    """It trains on for three seconds after the signal, with replies of the teacher, and saves then."""
    if not hasattr(pytest.importorskip("transformers").TrainingArguments, "enable_jit_checkpoint"):
        pytest.skip("this transformers has no enable_jit_checkpoint")
    (directory / "jit.py").write_text(TRAINER)
    with launch(directory, "--teacher", "toy:build", "--cpu", "1", "ring.max_tokens=64", "--", "jit.py") as run:
        run.says("at step 3")
        run.signal(signal.SIGTERM)
        assert run.wait() == 143
        (checkpoint,) = directory.glob("out/checkpoint-*")
        assert (checkpoint / "trainer_state.json").exists(), run.text
        assert not (checkpoint / "checkpoint-is-incomplete.txt").exists()
        says_nothing_of_failures(run)
