"""The processes of tests/gpu: `python -m tests.gpu.actors ROLE ARGUMENTS`, in the session of SHMBRIDGE_SESSION.

A role is a function here; its arguments are JSON, and what it has to say are lines of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import shmbridge
from shmbridge.errors import TeacherDied, TornReply
from shmbridge.plane import cuda_ipc
from shmbridge.plane.cuda import TeacherCudaPlane
from shmbridge.rank.bridge import Bridge
from shmbridge.rank.reply import Reply
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.ring import Ring
from shmbridge.shm.session import SESSION_VARIABLE, Token
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher import payload
from shmbridge.teacher.batch import Batch
from shmbridge.teacher.main import build, serve
from shmbridge.teacher.server import Server

WORDS, WIDTH = 512, 96
CYCLES = 2_000_000_000  # of a kernel that takes about a second
SYNCS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
)
STEPS = 20


def token() -> Token:
    return Token.parse(os.environ[SESSION_VARIABLE])


def tell(what: object) -> None:
    print(json.dumps(what), flush=True)


def table(device: torch.device) -> torch.Tensor:
    """The same numbers in every process."""
    return torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)


# Teachers


def teach_model(device: torch.device, model: str, gpus: int = 1) -> None:
    """The HuggingFace teacher that the settings name."""
    session = TeacherSession(token())
    settings = session.settings
    assert settings.teacher.model == model
    serve(session, build(session, settings, device, gpus), device)


class Lookup:
    """Rows of a table; a kernel that takes a while before, where `slow`. It never waits for its GPU."""

    vocab_size = WORDS

    def __init__(self, device: torch.device, slow: bool = False, dies_in: int | None = None) -> None:
        self.table = table(device)
        self.slow, self.dies_in = slow, dies_in
        self.forwards = 0

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.forwards += 1
        if self.forwards == self.dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.slow:
            torch.cuda._sleep(CYCLES)
        return {"rows": self.table[batch.input_ids]}


def teach_table(device: torch.device, **options: Any) -> None:
    serve(TeacherSession(token()), Lookup(device, **options), device)


def teach_without_waiting(device: torch.device) -> None:
    """Each round, from collected requests to published replies, where torch raises at a host that waits."""
    real, rounds = Server._answer, []

    def answer(self: Server, answers: Any) -> None:
        rounds.append(len(answers))
        torch.cuda.set_sync_debug_mode("error" if len(rounds) > 3 else "default")
        try:
            real(self, answers)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    Server._answer = answer
    teach_table(device)
    tell({"rounds": len(rounds)})


def teach_profiled(device: torch.device) -> None:
    """Tells what CUDA was asked to wait for in rounds 5 to 14."""
    real, rounds, found = Server._answer, [], []

    def answer(self: Server, answers: Any) -> None:
        rounds.append(None)
        if 5 <= len(rounds) < 15:
            with profiled(found):
                real(self, answers)
        else:
            real(self, answers)

    Server._answer = answer
    teach_table(device)
    tell({"calls": found, "rounds": len(rounds)})


def teach_killed_at(device: torch.device, point: str, reply: int, slow: bool = False) -> None:
    """Killed by SIGKILL before the stamp, or after the reply was published, perhaps with its copy still on its way."""
    owner, name = (TeacherCudaPlane, "seal") if point == "before the stamp" else (Ring, "publish_reply")
    real, calls = getattr(owner, name), []

    def kill(self: Any, *args: Any) -> Any:
        calls.append(None)
        mine = len(calls) == reply + 1
        if mine and name == "seal":
            os.kill(os.getpid(), signal.SIGKILL)
        done = real(self, *args)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, name, kill)
    teach_table(device, slow=slow)


def teach_torn(device: torch.device, reply: int) -> None:
    """From `reply` on there is no stamp, though the event comes."""

    real = TeacherCudaPlane.seal

    def seal(self: TeacherCudaPlane, number: int) -> None:
        if number < reply:
            real(self, number)
        else:
            self._begin(number)
            self._slab.ready[number % self._slab.slots].record(self._stream)

    TeacherCudaPlane.seal = seal
    teach_table(device)


def unusable(device: torch.device) -> None:
    """Whether this process, with its environment, can export."""
    tell({"reason": cuda_ipc.unusable(device), "backend": torch.cuda.get_allocator_backend()})


# Ranks


@contextmanager
def connected(device: torch.device, lane: int) -> Iterator[Bridge]:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with Bridge(RankSession(token(), lane), device) as bridge:
        bridge.wait_ready()
        yield bridge


def ids(lane: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * lane + step)
    return torch.randint(0, WORDS, (1 + step % 3, 5 + 7 * (step % 5)), generator=generator)


def compare_model(device: torch.device, lane: int, model: str, streams: bool, steps: int = STEPS) -> None:
    """Every payload of the reply against the model in this process."""
    from transformers import AutoModelForCausalLM

    with connected(device, lane) as bridge:
        own = AutoModelForCausalLM.from_pretrained(model).to(device).eval()
        checked = 0
        for step in range(steps):
            sent = ids(lane, step)
            pending = bridge.submit(sent, step=step)
            with torch.inference_mode():
                logits = own(sent.to(device)).logits
            if streams:
                for rows, chunk in pending.chunks():
                    checked += check(bridge, chunk, logits.flatten(0, 1)[rows], sent, rows)
            else:
                with pending.wait() as reply:
                    checked += check(bridge, reply, logits, sent, slice(None))
    tell({"checked": checked})


def check(bridge: Bridge, reply: Reply, logits: torch.Tensor, sent: torch.Tensor, rows: slice) -> int:
    """How many outputs were compared. `logits` are the model's own, with the leading axes of the reply."""
    close = {"rtol": 1e-3, "atol": 1e-3}
    logprobs = logits.float().log_softmax(-1)
    for name in reply.names:
        assert reply[name].device == logits.device, name
    if "logits" in reply:
        torch.testing.assert_close(reply.logits.float(), logits.float(), **close)
    if "hidden" in reply:
        torch.testing.assert_close(bridge.head(reply.hidden).float(), logits.float(), **close)
    if "topk_ids" in reply:
        values, _, tails = payload.top_k(logprobs.flatten(0, -2), 8, (1.0,)).values()
        torch.testing.assert_close(reply["topk_logprobs"].flatten(0, -2), values, **close)
        torch.testing.assert_close(reply["tail_logmass"].flatten(0, -2), tails, **close)
    if "logprobs" in reply:
        targets = torch.full_like(sent, -100)
        targets[:, :-1] = sent[:, 1:]
        wanted = targets.flatten()[rows].to(logits.device)
        torch.testing.assert_close(
            reply["logprobs"].flatten(), payload.of_targets(logprobs.flatten(0, -2), wanted), **close
        )
    return len(reply.names)


def compare_bits(device: torch.device, lane: int, model: str) -> None:
    """Whole float32 logits of the only rank: torch.equal to the model in this process."""
    from transformers import AutoModelForCausalLM

    with connected(device, lane) as bridge, torch.inference_mode():
        own = AutoModelForCausalLM.from_pretrained(model).to(device).eval()
        equal = 0
        for step in range(STEPS):
            sent = ids(lane, step)
            with bridge.submit(sent).wait() as reply:
                equal += torch.equal(reply.logits, own(sent.to(device)).logits)
    tell({"equal": equal, "of": STEPS})


def right(found: torch.Tensor, own: torch.Tensor, sent: torch.Tensor) -> bool:
    return torch.equal(found, own[sent.to(own.device)])


def compare_table(device: torch.device, lane: int, steps: int = 100, ahead: int = 1) -> None:
    """Up to `ahead` requests in flight, so that slots are used again while the GPU still reads."""
    own, wrong, waiting = table(device), [], []
    with connected(device, lane) as bridge:
        for step in range(steps):
            sent = ids(lane, step)
            waiting.append((sent, bridge.submit(sent)))
            if len(waiting) == ahead:
                asked, pending = waiting.pop(0)
                with pending.wait() as reply:
                    wrong.append((reply["rows"] != own[asked.to(device)]).any())
    tell({"compared": len(wrong), "wrong": int(torch.stack(wrong).sum())})


def ask_without_waiting(device: torch.device, lane: int) -> None:
    """submit, wait, a kernel, release: where torch raises at a host that waits for its GPU."""
    own = table(device)
    prepared = [(ids(lane, step), own[ids(lane, step).to(device)]) for step in range(STEPS)]
    wrong = torch.zeros((), device=device, dtype=torch.int64)
    with connected(device, lane) as bridge:
        bridge.exchange(prepared[0][0])
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        for sent, expected in prepared:
            with bridge.submit(sent).wait() as reply:
                wrong += (reply["rows"] != expected).any()
        torch.cuda.set_sync_debug_mode("default")
    tell({"wrong": int(wrong)})


def ask_profiled(device: torch.device, lane: int) -> None:
    found: list[str] = []
    with connected(device, lane) as bridge:
        for _ in range(5):
            bridge.exchange(ids(lane, 0))
        torch.cuda.synchronize(device)
        with profiled(found):
            for step in range(STEPS):
                with bridge.submit(ids(lane, step)).wait() as reply:
                    reply["rows"].sum()
    tell({"calls": found})


@contextmanager
def profiled(found: list[str]) -> Iterator[None]:
    """Names of calls in the block in which a host waits, without those that a profile of nothing has; first, that calls were seen
    at all."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as empty:
        pass
    with torch.profiler.profile(activities=activities) as profile:
        yield
    seen = [event.name for event in profile.events()]
    assert any("LaunchKernel" in name for name in seen), "the profile shows no call of CUDA"
    waits = Counter(name for name in seen if name in SYNCS)
    waits -= Counter(event.name for event in empty.events())
    found += waits.elements()


def read_torn(device: torch.device, lane: int, streams: bool = False) -> None:
    """Numbers that were right, replies that were NaN in every position, and what was raised in the end."""
    own, counts = table(device), {"right": 0, "nan": 0, "wrong": 0, "raised": ""}
    with connected(device, lane) as bridge:
        try:
            for step in range(50):
                sent = ids(lane, step)
                if streams:
                    counts[judge(bridge.exchange(sent)["rows"], own, sent)] += 1
                    continue
                with bridge.submit(sent).wait() as reply:  # judged before the release, which raises on an idle card
                    counts[judge(reply["rows"], own, sent)] += 1
        except TornReply as error:
            counts["raised"] = str(error)
    tell(counts)


def judge(found: torch.Tensor, own: torch.Tensor, sent: torch.Tensor) -> str:
    torn = bool(found.isnan().any(-1).all())
    return "nan" if torn else "right" if right(found, own, sent) else "wrong"


def outlive(device: torch.device, lane: int) -> None:
    """What a rank sees whose teacher is killed: its event comes, or never comes, or CUDA raises at every call.

    It looks at a reply once its event has come, and gives up after 20 s.
    """
    own = table(device)
    counts = {"right": 0, "nan": 0, "wrong": 0, "stuck": 0, "raised": ""}
    bridge = Bridge(RankSession(token(), lane), device)
    torch.cuda.set_device(device)
    try:
        bridge.wait_ready()
        for step in range(50):
            sent = ids(lane, step)
            found = bridge.exchange(sent, step=step)["rows"]
            read = torch.cuda.Event()
            read.record()
            deadline = time.monotonic() + 20
            while not read.query() and time.monotonic() < deadline:
                time.sleep(0.001)
            if not read.query():
                counts["stuck"] += 1
                break
            counts[judge(found, own, sent)] += 1
    except (TeacherDied, TornReply) as error:
        counts["raised"] = f"{type(error).__name__}: {error}"
    except RuntimeError as error:  # CUDA's, outside of the bridge
        died = bridge._requests.watchdog.blame(error)
        if died is None:
            raise
        counts["raised"] = f"TeacherDied: {died}"
    tell(counts)
    os._exit(0)  # a stuck stream would hold up a clean end


def wait_in_item(device: torch.device, lane: int) -> None:
    """Reads a reply whose teacher is killed, and waits for it in C, where no exception gets through; its heartbeat watches."""
    torch.cuda.set_device(device)
    with shmbridge.connect(
        lane=lane, device=device
    ) as bridge:  # whose end tells an error of CUDA from the script's own
        bridge.wait_ready()
        for step in range(50):
            pending = bridge.submit(ids(lane, step), step=step)
            try:
                with pending.wait() as reply:
                    tell({"read": step})
                    reply["rows"].sum().item()
            except TornReply:
                pass  # the event came all the same
    tell({"ended": True})


def hold(device: torch.device, lane: int, streams: bool = False) -> None:
    """Holds a reply, says so, and waits to be killed."""
    with connected(device, lane) as bridge:
        pending = bridge.submit(ids(lane, 0))
        held: object = next(pending.chunks()) if streams else pending.wait()
        tell({"holds": held is not None})
        sys.stdin.read()


def grow(device: torch.device, lane: int, steps: int) -> None:
    """What this process and its GPU hold early and late."""
    held = []
    with connected(device, lane) as bridge:
        sent = ids(lane, 4)
        for step in range(steps):
            with bridge.submit(sent).wait() as reply:
                reply["rows"].sum()
            if step in (steps // 10, steps - 1):
                torch.cuda.synchronize(device)
                held.append(
                    {
                        "allocated": torch.cuda.memory_allocated(device),
                        "reserved": torch.cuda.memory_reserved(device),
                        "free": torch.cuda.mem_get_info(device)[0],
                        "files": len(os.listdir("/proc/self/fd")),
                        "threads": len(os.listdir("/proc/self/task")),
                    }
                )
    tell(held)


def main() -> None:
    role, arguments = sys.argv[1], json.loads(sys.argv[2])
    if "device" in arguments:
        arguments["device"] = torch.device(arguments["device"])
    globals()[role](**arguments)


if __name__ == "__main__":
    main()
