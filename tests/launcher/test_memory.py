"""The memory plan: what is counted where, and what is said where it does not fit."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from launcher.planning import memory
from launcher.planning.gpus import Gpu
from launcher.planning.machine import Machine
from launcher.planning.memory import CONTEXT_BYTES, RAM, SHM, Kind, MemoryPlan
from launcher.planning.model_card import ModelCard
from shmbridge import config
from shmbridge.errors import PlanError
from shmbridge.output_spec import HeadSpec, Offer, OutputSpec
from shmbridge.shm import layout

MIB, GIB = 2**20, 2**30
MACHINE = Machine(cores=8, shm_free=8 * GIB, ram_free=64 * GIB)
EIGHT = tuple(Gpu(i, str(i), 80 * GIB, 79 * GIB) for i in range(8))
LLAMA = ModelCard(128_256, 16 * GIB, 4096, "bfloat16")
UNKNOWN = ModelCard()
HEAD = layout.head_bytes(HeadSpec("bfloat16", 128_256, 4096))
SLOT = 8192 * 128_256 * 2
CUSTOM, TOPK, HIDDEN = "teacher.model=toy:build", "payload={topk: {k: 64}}", "payload={hidden: {}}"
STREAM = "payload={logits: {}, stream: {chunks: 3, chunk_positions: 256}}"
OUTPUTS = "teacher.outputs={x: {dtype: int64, shape: [1000000]}, y: {dtype: int64, shape: [seq, 1000]}}"


def plan(
    *overrides: str,
    card: ModelCard = LLAMA,
    machine: Machine = MACHINE,
    teachers: Sequence[Sequence[Gpu]] = ((),),
    train: Sequence[Gpu] = (),
    ranks: int = 2,
) -> MemoryPlan:
    settings = config.load(overrides=["teacher.model=m", f"train.cpu_ranks={ranks}", *overrides])
    return memory.plan(settings, card, teachers, machine, train)


def on_gpus(
    *overrides: str, train: Sequence[Gpu] = EIGHT[:2], teachers: Sequence[Sequence[Gpu]] = (EIGHT[7:],), **more: object
) -> MemoryPlan:
    return plan("plane=cuda_ipc", *overrides, train=train, teachers=teachers, **more)  # type: ignore[arg-type]


def row(planned: MemoryPlan, start: str) -> memory.Item:
    (item,) = [item for item in planned.items if item.what.startswith(start)]
    return item


def kinds(planned: MemoryPlan, kind: Kind) -> list[tuple[str, str, int]]:
    return [item[1:] for item in planned.items if item.kind is kind]


def refusal(planned: MemoryPlan) -> tuple[str, str]:
    """What does not fit, and the remedy."""
    with pytest.raises(PlanError) as caught:
        planned.check()
    first, *_, remedy = str(caught.value).split("\n\n")
    assert str(planned) in str(caught.value), "the table"
    return first, remedy


def slab_bytes(slots: int, stride: int) -> int:
    """Of GPU memory: the slots, a stamp for each, and a sample, in whole blocks of 2 MiB."""
    return -(-(slots * (stride + 8) + 4096) // (2 * MIB)) * 2 * MIB


# What is counted


def test_the_plan_counts_what_the_session_will_create():
    planned = plan("ring.depth=2", "ring.max_tokens=4096", card=ModelCard(1000, 5 * GIB))
    lane = layout.LaneLayout(2, 4096).nbytes
    reply = layout.reply_bytes(2, 4096 * 1000 * 2)
    assert planned.needed(SHM) == layout.control_bytes(1) + 2 * (lane + reply)
    assert planned.needed(RAM) == planned.needed(SHM) + 5 * GIB
    planned.check()


@pytest.mark.parametrize(
    ("overrides", "card", "start", "nbytes"),
    [
        ([TOPK], LLAMA, "replies: 2 ranks x 2 slots", 2 * layout.reply_bytes(2, 8192 * (64 * 4 + 64 * 4 + 4))),
        ([TOPK], UNKNOWN, "replies", 2 * layout.reply_bytes(2, 8192 * (64 * 4 + 64 * 4 + 4))),
        ([HIDDEN], LLAMA, "replies", 2 * layout.reply_bytes(2, 8192 * 4096 * 2)),
        ([HIDDEN], LLAMA, "output head: 128256 words x 4096 x bfloat16", layout.PAGE + HEAD),
        ([HIDDEN, "payload.vocab=128000"], LLAMA, "output head: 128000 words", layout.PAGE + 128_000 * 4096 * 2),
        (
            [STREAM, "ring.max_tokens=65536"],
            LLAMA,
            "replies: 2 ranks x 3 chunks x 62.6 MiB",
            2 * layout.reply_bytes(3, 256 * 128_256 * 2),
        ),
        (["ring.max_positions=1024"], LLAMA, "replies", 2 * layout.reply_bytes(2, 1024 * 128_256 * 2)),
        (["payload={logprobs: {candidates: 8}}"], LLAMA, "lanes", 2 * layout.LaneLayout(2, 8192, candidates=8).nbytes),
        (["payload={logprobs: {}}", CUSTOM], UNKNOWN, "replies", 2 * layout.reply_bytes(2, 8192 * 4)),
        (
            [CUSTOM, "teacher.outputs={hidden: {dtype: float32, shape: [seq, 8]}}"],
            UNKNOWN,
            "replies",
            2 * layout.reply_bytes(2, 8192 * 8 * 4),
        ),
        # What is not known before the teacher has loaded.
        ([], UNKNOWN, "replies", 0),
        ([HIDDEN], UNKNOWN, "output head", 0),
        ([HIDDEN], LLAMA._replace(hidden_size=None), "replies", 0),
        ([HIDDEN], LLAMA._replace(dtype=None), "replies", 0),
    ],
)
def test_what_a_payload_takes(overrides, card, start, nbytes):
    planned = plan(*overrides, card=card)
    assert row(planned, start).nbytes == nbytes
    assert ("known once it has loaded" in str(planned)) == (card != LLAMA)


def test_weights_lie_on_each_replicas_gpus_or_in_ram():
    two = plan(teachers=(EIGHT[6:7], EIGHT[7:]), card=ModelCard(None, 70 * GIB))
    assert kinds(two, Kind.WEIGHTS) == [
        ("teacher 0's weights", "GPU 6", 70 * GIB),
        ("teacher 1's weights", "GPU 7", 70 * GIB),
    ]
    assert two.items[0].nbytes == layout.control_bytes(2)
    two.check()
    spread = plan(teachers=(EIGHT[6:],), card=ModelCard(None, 100 * GIB))
    assert kinds(spread, Kind.WEIGHTS) == [
        ("teacher's weights, part 1 of 2", "GPU 6", 50 * GIB),
        ("teacher's weights, part 2 of 2", "GPU 7", 50 * GIB),
    ]
    spread.check()
    on_cpu = plan(teachers=((), ()), card=ModelCard(None, 40 * GIB))
    assert on_cpu.needed(RAM) == on_cpu.needed(SHM) + 80 * GIB


def test_replies_on_gpus_are_counted_where_they_lie():
    planned = on_gpus()
    exchange = memory.Shape.of(planned.config, 2).exchange_bytes
    assert planned.needed(SHM) == layout.control_bytes(1) + 2 * (layout.LaneLayout(2, 8192).nbytes + exchange)
    assert planned.needed(RAM) == planned.needed(SHM), "weights and replies are on the GPU"
    assert row(planned, "replies: 2 ranks x 2 slots x 2.0 GiB").where == "GPU 7"
    assert planned.needed("GPU 7") == 16 * GIB + 2 * slab_bytes(2, SLOT) + CONTEXT_BYTES
    assert planned.needed("GPU 0") == planned.needed("GPU 1") == 3 * SLOT + CONTEXT_BYTES
    planned.check()
    assert row(on_gpus("ring.depth=1", "ring.max_tokens=1"), "replies").nbytes == 2 * 20 * MIB, "blocks of their own"


@pytest.mark.parametrize(
    ("overrides", "slab", "copies"),
    [
        (["cuda.read=in_place"], slab_bytes(2, SLOT), 0),
        ([STREAM], slab_bytes(3, 256 * 128_256 * 2), 4 * 256 * 128_256 * 2),
    ],
)
def test_what_is_copied_from_gpu_to_gpu(overrides, slab, copies):
    planned = on_gpus(*overrides)
    assert row(planned, "replies").nbytes == 2 * slab
    assert planned.needed("GPU 0") == copies + CONTEXT_BYTES


def test_each_replica_has_the_replies_of_its_lanes_on_its_first_gpu():
    planned = on_gpus(teachers=[EIGHT[4:6], EIGHT[6:]], train=EIGHT[:3])
    assert [item[1:] for item in kinds(planned, Kind.REPLIES)] == [
        ("GPU 4", 2 * slab_bytes(2, SLOT)),
        ("GPU 6", slab_bytes(2, SLOT)),
    ]
    assert planned.needed("GPU 5") == 8 * GIB + CONTEXT_BYTES


def test_each_rank_copies_the_head_to_its_gpu():
    planned = on_gpus(HIDDEN, "cuda.read=in_place", train=(EIGHT[0], EIGHT[1], EIGHT[0]))
    assert row(planned, "output head, copied for 2 ranks")[2:] == ("GPU 0", 2 * HEAD)
    assert row(planned, "output head, copied for 1 rank")[2:] == ("GPU 1", HEAD)
    assert row(planned, "output head: 128256").where == SHM
    assert row(planned, "CUDA contexts of 2 processes")[2:] == ("GPU 0", 2 * CONTEXT_BYTES)
    on_host = plan("plane=host", HIDDEN, teachers=(EIGHT[7:],), train=EIGHT[:2])
    assert on_host.needed("GPU 0") == HEAD + CONTEXT_BYTES
    assert row(on_host, "replies").where == SHM


def test_a_gpu_for_both_holds_all_of_it():
    planned = on_gpus(train=(EIGHT[0], EIGHT[0]), teachers=(EIGHT[:1],))
    assert planned.needed("GPU 0") == 16 * GIB + 2 * slab_bytes(2, SLOT) + 2 * 3 * SLOT + 3 * CONTEXT_BYTES


def test_what_gpus_have_alike_is_one_row_and_training_is_not_counted():
    text = str(on_gpus(train=EIGHT[:7]))
    assert re.search(r"copies of replies: 1 rank x 3 x 2.0 GiB +GPUs 0-6 +5.9 GiB each\n", text)
    assert re.search(r"GPU 3 +needs 6.4 GiB \(training itself is not counted\) +79.0 GiB free(\n|$)", text)
    assert re.search(r"GPU 7 +needs 43.9 GiB +79.0 GiB free\n", text)
    unknown = str(on_gpus(train=EIGHT[:7], card=UNKNOWN))
    assert re.search(r"copies of replies: 1 rank x 3 +GPUs 0-6 +known once it has loaded\n", unknown)


@pytest.mark.parametrize(
    ("plane", "text"),
    [("host", "5.0 KiB in /dev/shm"), ("cuda_ipc", "1.2 GiB in the teacher's GPU memory, 5.0 KiB in /dev/shm")],
)
def test_what_was_created_is_told_with_its_place(plane, text):
    agreed = Offer((OutputSpec("logits", "bfloat16", ("seq", 20_000)),), "m")
    settings = config.load(overrides=[f"plane={plane}"])
    assert memory.created(settings, memory.Shape.of(settings, 2), agreed, 5 * 1024) == text


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["payload={topk: {k: 200000}}"], "payload.topk.k is 200000; the teacher's distribution has 128256 words"),
        (["payload={topk: {}, vocab: 130000}"], "payload.vocab is 130000; the teacher's distribution has 128256"),
        (
            [CUSTOM, "teacher.outputs={x: {dtype: int64, shape: [2]}}", "payload={stream: {}}"],
            "output 'x' has no sequence axis and cannot be streamed",
        ),
    ],
)
def test_a_payload_that_cannot_be_is_refused_before_anything_loads(overrides, message):
    with pytest.raises(PlanError, match=message):
        plan(*overrides)


MORE_SHM = "or give /dev/shm more (docker run --shm-size; Docker and Kubernetes give 64 MB unless told otherwise)."
FEWER_REQUESTS = "Lower ring.max_tokens (now 8192) or ring.depth (now 2), or "
SMALLER_REPLIES = (
    "Lower ring.max_tokens (now 8192), ring.max_positions (now 8192) or ring.depth (now 2), stream them "
    "(payload.stream={}), "
)
NO_TOPK = "Send the most likely words instead (payload.hidden=null payload.topk={}), or "


@pytest.mark.parametrize(
    ("overrides", "free", "remedy"),
    [
        # Requests, head and replies in shared memory.
        (
            ["ring.max_tokens=100000000"],
            GIB,
            f"Lower ring.max_tokens (now 100000000) or ring.depth (now 2), {MORE_SHM}",
        ),
        ([HIDDEN], GIB // 2, f"The output head (1.0 GiB) comes with payload.hidden, once for all ranks. {NO_TOPK}give"),
        ([HIDDEN], 1025 * MIB, SMALLER_REPLIES + MORE_SHM),  # the head alone would fit
        ([TOPK], MIB, SMALLER_REPLIES + MORE_SHM),
        ([TOPK, "ring.max_positions=4096"], MIB, "Lower ring.max_positions (now 4096) or ring.depth (now 2), stream"),
        (
            [STREAM, "payload.stream.chunk_positions=4096", CUSTOM, "payload.vocab=128256"],
            GIB,
            f"Lower payload.stream.chunks (now 3) or payload.stream.chunk_positions (now 4096), {MORE_SHM}",
        ),
        (
            [CUSTOM, OUTPUTS],
            GIB,
            "Lower ring.max_tokens (now 8192), ring.max_positions (now 8192), ring.max_batch (now 256) or ring.depth "
            f"(now 2), {MORE_SHM}",
        ),
    ],
)
def test_shared_memory_that_is_too_small(overrides, free, remedy):
    found, told = refusal(plan(*overrides, machine=MACHINE._replace(shm_free=free)))
    assert " of /dev/shm, and " in found
    assert told.startswith(remedy)


@pytest.mark.parametrize(
    ("replicas", "remedy"),
    [(1, ""), (2, "lower teacher.replicas (now 2), ")],
)
def test_ram_that_is_too_small(replicas, remedy):
    small = MACHINE._replace(ram_free=GIB)
    found, told = refusal(plan(TOPK, teachers=((),) * replicas, machine=small))
    assert " of RAM, and 1.0 GiB are free" in found
    assert told == (
        f"{SMALLER_REPLIES}{remedy}take a smaller teacher.model, or raise the memory limit; /dev/shm counts as RAM."
    )


@pytest.mark.parametrize(
    ("small", "more"),
    [({"shm_free": MIB // 8}, "give /dev/shm more"), ({"ram_free": MIB // 8}, "raise the memory limit")],
)
def test_requests_alone_are_lowered_where_replies_are_on_gpus(small, more):
    _, told = refusal(on_gpus(machine=MACHINE._replace(**small)))
    assert told.startswith(FEWER_REQUESTS + more)


@pytest.mark.parametrize(
    ("overrides", "train", "teacher", "message", "remedy"),
    [
        (
            [],
            79,
            20,
            "the run needs 24.3 GiB of GPU 7, and 20.0 GiB are free",
            f"{SMALLER_REPLIES}or keep the replies in host memory (plane=host).",
        ),
        (
            [],
            79,
            16,
            "of GPU 7",
            "Set teacher.dtype=bfloat16. Spread the model: name more GPUs in teacher.gpus, with teacher.replicas=1",
        ),
        (["teacher.dtype=bfloat16"], 79, 16, "of GPU 7", "Spread the model: name more GPUs"),
        (
            [],
            6,
            79,
            "the run needs 6.4 GiB of GPU 0, and 6.0 GiB are free",
            "Read replies where they lie (cuda.read=in_place). Lower ring.max_tokens (now 8192)",
        ),
        ([], 0.4, 79, "of GPU 0", "CUDA itself takes about 500 MiB for each process. Free that GPU, or name another"),
        (
            [HIDDEN],
            1,
            79,
            "of GPU 0",
            "The output head (1.0 GiB) comes with payload.hidden, and each rank copies it to its GPU. " + NO_TOPK,
        ),
    ],
)
def test_a_gpu_that_is_too_small(overrides, train, teacher, message, remedy):
    def with_free(gpu: Gpu, free: float) -> Gpu:
        return gpu._replace(free_bytes=int(free * GIB))

    ranks, own = (with_free(EIGHT[0], train), EIGHT[1]), (with_free(EIGHT[7], teacher),)
    found, told = refusal(on_gpus(*overrides, train=ranks, teachers=(own,)))
    assert message in found
    assert remedy in told


def test_weights_that_are_too_large_for_each_of_several_replicas():
    found, told = refusal(plan(teachers=(EIGHT[6:7], EIGHT[7:]), card=ModelCard(None, 100 * GIB)))
    assert found == "the run needs 100 GiB of GPU 6, and 79.0 GiB are free."
    assert "Spread the model: lower teacher.replicas (now 2 on 2 GPUs)" in told


def test_logits_that_do_not_fit_name_smaller_payloads_with_their_sizes():
    """Seven ranks, two slots of 32,768 positions, 128,256 words."""
    more = {"teachers": [EIGHT[7:]], "ranks": 7}
    found, told = refusal(plan("ring.max_tokens=32768", **more))
    assert found == "the run needs 110 GiB of /dev/shm, and 8.0 GiB are free."
    assert told.startswith(
        "In place of logits send the most likely words and the rest's mass (payload.logits=null payload.topk={}: 234 MiB) "
        "or hidden states and the output head, which are as exact (payload.logits=null payload.hidden={}: 4.5 GiB). Lower"
    )
    for override in ("payload.topk={}", "payload.hidden={}"):  # what it says can be done
        plan("ring.max_tokens=32768", "payload.logits=null", override, **more).check()


def test_a_payload_that_is_no_smaller_than_the_logits_is_not_named():
    _, told = refusal(plan(card=ModelCard(100, GIB, 4096, "bfloat16"), machine=MACHINE._replace(shm_free=2 * MIB)))
    assert told.startswith(SMALLER_REPLIES)


@pytest.mark.parametrize("overrides", [[HIDDEN], [TOPK], [CUSTOM, "payload={logits: {}}"]])
def test_other_payloads_are_named_for_the_logits_of_a_language_model_alone(overrides):
    assert plan(*overrides).instead == {}


# What is known only once the teachers have loaded


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (MACHINE._replace(shm_free=GIB), "needs 1.2 GiB of /dev/shm, and 1.0 GiB are free"),
        (MACHINE._replace(ram_free=GIB), "needs 1.2 GiB of RAM, and 1.0 GiB are free"),
    ],
)
def test_replies_are_checked_again_after_loading(machine, message):
    """What fits /dev/shm may still wake the out-of-memory killer."""
    agreed = Offer((OutputSpec("logits", "bfloat16", ("seq", 20_000)),), "m")
    settings = config.load(overrides=["ring.max_tokens=8192"])
    memory.check_replies(settings, 2, agreed, MACHINE)
    with pytest.raises(PlanError, match=message) as caught:
        memory.check_replies(settings, 2, agreed, machine)
    assert "(payload.logits=null payload.hidden={}: many times smaller)" in str(caught.value)
    assert "Lower ring.max_tokens (now 8192)" in str(caught.value)
    on_gpu = config.load(overrides=["plane=cuda_ipc"])
    memory.check_replies(on_gpu, 2, agreed, MACHINE._replace(shm_free=MIB, ram_free=MIB))


@pytest.mark.parametrize("plane", ["host", "cuda_ipc"])
def test_a_head_is_checked_again_after_loading(plane):
    """Of a hub model that was not in the cache."""
    agreed = Offer((OutputSpec("hidden", "float32", ("seq", 4096)),), "m", head=HeadSpec("float32", 128_256, 4096))
    settings = config.load(overrides=[HIDDEN, "ring.max_tokens=64", f"plane={plane}"])
    memory.check_replies(settings, 2, agreed, MACHINE)
    with pytest.raises(PlanError, match="The output head"):
        memory.check_replies(settings, 2, agreed, MACHINE._replace(shm_free=GIB))
