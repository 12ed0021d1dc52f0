"""Restarts of training and of teachers, and save hooks: whole runs of the command, with torchrun and the teacher's process."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.harness import until
from tests.launcher.running import Launched, launch

# Orders are files, each obeyed once: `forward` in the forward of token 9, `load` while loading, once `forward` is
# carried out. `raise` ends the teacher by a CUDA error in place of a signal.
TEACHER = """
import os, signal, torch
from pathlib import Path
orders = Path("orders")
def obey(name):
    try:
        (orders / name).unlink()
    except FileNotFoundError:
        return False
    return True
class Forward:
    vocab_size = 16
    table = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    def __call__(self, batch):
        if (batch.input_ids == 9).any() and obey("forward"):
            if obey("raise"):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            os.kill(os.getpid(), signal.SIGKILL)
        return {"logits": self.table[batch.input_ids]}
def build(settings):
    if not (orders / "forward").exists() and obey("load"):
        os.kill(os.getpid(), signal.SIGKILL)
    return Forward()
"""

# Learns STEPS steps with a checkpoint after each. MODE tells how the last rank crashes, in one generation after the other: before
# step 5, 7 and 9.
TRAIN = """
import os, signal, sys, time, torch, shmbridge
from pathlib import Path
steps, mode = int(sys.argv[1]), sys.argv[2]
rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
generation = int(os.environ["SHMBRIDGE_SESSION"].rpartition("@")[2])
checkpoint = Path(f"rank{rank}.pt")
weight, begin = torch.zeros(16, 16), 0
if checkpoint.exists():
    begin, weight = torch.load(checkpoint)
weight.requires_grad_()

def save():
    Path(f"saving{rank}").touch()
    if "raising" in mode:
        raise ValueError("no room")
    while "gated" in mode and not Path("gate").exists():
        time.sleep(0.005)
    Path(f"saved{rank}").touch()

def crash():
    if rank != ranks - 1:
        return
    ways = [way for way in ("killed", "boom", "torchrun") if way in mode]
    if ways[generation - 1 :] == []:
        return
    while not Path("rank0.pt").exists():  # and with it the hook of rank 0
        time.sleep(0.005)
    print(f"{time.monotonic():.6f} crashes", flush=True)
    if "orders" in mode:
        Path("orders/forward").touch()
    way = ways[generation - 1]
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "boom":
        raise RuntimeError("boom")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)

with shmbridge.connect() as bridge:
    if "hook" in mode:
        bridge.on_stop(save)
    bridge.wait_ready()
    print(f"{time.monotonic():.6f} attached in generation {generation} at step {begin}", flush=True)
    step = begin
    while step < steps:
        if step == 3 + 2 * generation:
            crash()
        ids = (torch.arange(4).reshape(1, 4) + 4 * rank + step) % 16
        with bridge.submit(ids, step=step).wait() as reply:
            if reply.missing:
                print(f"step {step} has no teacher", flush=True)
            else:
                loss = (weight[ids] - reply.logits).square().mean()
                loss.backward()
                with torch.no_grad():
                    weight -= 0.1 * weight.grad
                    weight.grad = None
                print(f"loss {step} {loss.item().hex()}", flush=True)
        step += 1
        torch.save((step, weight.detach()), "part")  if ranks == 1 else torch.save((step, weight.detach()), f"part{rank}")
        os.replace("part" if ranks == 1 else f"part{rank}", checkpoint)
"""


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "toy.py").write_text(TEACHER)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "orders").mkdir()
    return tmp_path


def run_of(directory: Path, *more: str, steps: int = 12, mode: str = "ok", ranks: int = 1):
    flags = ["--teacher", "toy:build", "--cpu", str(ranks), "ring.max_tokens=64", "parity=false", *more]
    return launch(directory, *flags, "--", "train.py", str(steps), mode)


def order(directory: Path, *names: str) -> None:
    for name in names:
        (directory / "orders" / name).touch()


def losses(run: Launched) -> dict[int, str]:
    """By step, as hexadecimal text: bit for bit."""
    return {int(step): loss for step, loss in re.findall(r"loss (\d+) (\S+)", run.text)}


def moments(run: Launched, text: str) -> list[float]:
    return [float(at) for at in re.findall(rf"(\d+\.\d+) {text}", run.text)]


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, str]:
    """What one rank learns that nobody disturbs."""
    table = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(16, 16, requires_grad=True)
    found = {}
    for step in range(12):
        ids = (torch.arange(4).reshape(1, 4) + step) % 16
        loss = (weight[ids] - table[ids]).square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= 0.1 * gradient
        found[step] = loss.item().hex()
    return found


# Training


CRASHES = {
    "killed": "rank 0 was killed by SIGKILL",
    "boom": "rank 0 failed: RuntimeError: boom",
    "torchrun": "torchrun was killed",
}


@pytest.mark.parametrize("ways", [pytest.param(["killed", "boom", "torchrun"], marks=pytest.mark.slow), ["boom"]])
def test_crashed_training_starts_again_under_the_loaded_teacher_and_learns_the_same(directory, undisturbed, ways):
    """What it learns is the same bit for bit, whichever way it crashes."""
    with run_of(directory, "--train-restarts", "4", mode=" ".join(ways)) as run:
        assert run.wait() == 0
        assert losses(run) == undisturbed
        for nth, way in enumerate(ways):
            assert f"training starts again (restart {nth + 1} of 4), the teacher stays loaded" in run.text
            assert f"[launcher] {CRASHES[way]}" in run.text
            assert f"attached in generation {nth + 2} at step {5 + 2 * nth}" in run.text
        assert run.text.count("ready in") == 1
        assert "The run failed" not in run.text
        crashes, attached = moments(run, "crashes"), moments(run, "attached in generation")[1:]
        print("attached again after", [later - crash for crash, later in zip(crashes, attached, strict=True)], "s")


@pytest.mark.parametrize(
    ("script", "more"),
    [("def broken(:\n", []), pytest.param(TRAIN, ["--torchrun=--no-such-flag"], marks=pytest.mark.matrix)],
    ids=["syntax", "flag"],
)
def test_training_that_never_gets_a_reply_is_not_started_again(directory, script, more):
    (directory / "train.py").write_text(script)
    with run_of(directory, "--train-restarts", "9", *more) as run:
        assert run.wait() in (1, 2)
        assert "training starts again" not in run.text
        assert "The run failed" in run.text


# The teacher


@pytest.mark.slow
def test_a_teacher_that_fails_for_good_is_followed_by_others_and_nothing_is_lost(directory, undisturbed):
    """First an exception that its process cannot go on after, then a death while the next one loads."""
    order(directory, "forward", "raise", "load")
    with run_of(directory, "--teacher-restarts", "2") as run:
        assert run.wait() == 0
        assert losses(run) == undisturbed
        assert run.text.count("training waits for a new one (restart 1 of 2)") == 1
        assert "CUDA error" in run.text
        assert "(restart 2 of 2)" in run.text
        assert run.text.count("is back after") == 1


@pytest.mark.slow
def test_teacher_and_training_may_both_start_again(directory, undisturbed):
    """The new teacher serves the new generation, though it was planned for the old one."""
    flags = "--teacher-restarts", "1", "--train-restarts", "1"
    with run_of(directory, *flags, mode="boom orders") as run:
        assert run.wait() == 0
        assert losses(run) == undisturbed
        at = [run.text.index(text) for text in ("crashes", "attached in generation 2", "teacher is back after")]
        assert at == sorted(at)


@pytest.mark.slow
def test_with_restarts_used_up_each_rank_saves_and_the_run_ends(directory):
    order(directory, "forward", "load")
    with run_of(directory, "--teacher-restarts", "1", mode="hook", ranks=2) as run:
        assert run.wait() == 137
        assert ": teacher was killed by SIGKILL" in run.text
        assert "TeacherDied" in run.text
        assert (directory / "saved0").exists() and (directory / "saved1").exists()


def test_training_goes_on_without_a_teacher(directory):
    order(directory, "forward")
    with run_of(directory, "on_teacher_lost=continue", steps=40) as run:
        assert run.wait() == 0
        assert run.text.count("no new one follows, and training goes on (on_teacher_lost=continue)") == 1
        assert "is back" not in run.text
        assert run.text.count("Replies are missing from now on") == 1
        assert "step 39 has no teacher" in run.text
        assert run.text.count("has no teacher") + len(losses(run)) == 40


@pytest.mark.slow
def test_a_replica_is_replaced_while_the_other_serves_its_lane(directory):
    with run_of(
        directory, "--teacher-restarts", "1", "--teacher-replicas", "2", steps=1_000_000, ranks=2, mode="hook"
    ) as run:
        run.says("loss 20 ", times=2)
        killed = time.monotonic()
        os.kill(run.below_shim("shmbridge.teacher.main --teacher-index 0"), signal.SIGKILL)
        run.says("training waits for a new one (restart 1 of 1)")
        before = steps_of(run, 0)
        until(lambda: steps_of(run, 0) > before + 1, "replies to rank 0")
        print("lane taken over after", time.monotonic() - killed, "s")
        assert "is back" not in run.text
        run.says("teacher 0 is back after")
        before = [steps_of(run, rank) for rank in (0, 1)]
        until(lambda: all(steps_of(run, rank) > before[rank] + 20 for rank in (0, 1)), "replies to both")
        run.signal(signal.SIGINT)
        assert run.wait() == 130
        assert "warning" not in run.text
        assert "is served by this teacher now" in run.text


def steps_of(run: Launched, rank: int) -> int:
    found = re.findall(rf"\[rank {rank}\] +loss (\d+) ", run.text)
    return int(found[-1]) if found else 0


# Save hooks


@pytest.mark.slow
def test_a_sigterm_to_every_process_at_once_lets_the_ranks_save(directory):
    """As Slurm ends a step: launcher, shims, torchrun, ranks and teacher; torchrun gets it twice."""
    with run_of(directory, steps=1_000_000, mode="hook gated", ranks=2) as run:
        run.says("loss 9 ", times=2)
        torchrun = run.below_shim("elastic.py")
        for pid in [run.process.pid, *run.processes()]:
            os.kill(pid, signal.SIGTERM)
        for rank in range(2):
            until((directory / f"saving{rank}").exists, f"the hook of rank {rank}")
        os.kill(torchrun, signal.SIGTERM)
        assert run.processes("shmbridge.teacher.main")
        assert run.process.poll() is None
        (directory / "gate").touch()
        assert run.wait() == 143
        assert (directory / "saved0").exists() and (directory / "saved1").exists()


@pytest.mark.slow
def test_a_hook_that_takes_too_long_is_killed(directory):
    with run_of(directory, "timeouts.save_s=0.3", "timeouts.shutdown_s=0.3", steps=1_000_000, mode="hook gated") as run:
        run.says("loss 9 ")
        run.signal(signal.SIGTERM)
        assert run.wait() == 143
        assert (directory / "saving0").exists() and not (directory / "saved0").exists()
        assert "the grace of 0.3 s (timeouts.shutdown_s) is over" in run.text


@pytest.mark.slow
def test_a_hook_that_raises_changes_nothing_about_ctrl_c(directory):
    """No report tells its traceback, so the terminal shows all of it."""
    with run_of(directory, steps=1_000_000, mode="hook raising") as run:
        run.says("loss 9 ")
        run.signal(signal.SIGINT)
        assert run.wait() == 130
        assert "The run failed" not in run.text
        assert re.search(r"\[rank 0\] +raise ValueError\(\"no room\"\)", run.text)
        assert re.search(r"\[rank 0\] +ValueError: no room$", run.text, re.M)


@pytest.mark.slow
def test_the_other_ranks_save_when_one_is_killed(directory):
    with run_of(directory, steps=1_000_000, mode="hook killed", ranks=2) as run:
        assert run.wait() == 137
        assert ": rank 1 was killed by SIGKILL" in run.text
        assert (directory / "saved0").exists() and not (directory / "saving1").exists()
