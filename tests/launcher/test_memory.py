"""The memory plan and what is known of a model before it is loaded."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from launcher.console.text import seconds, size
from launcher.plan import memory, model_card
from launcher.plan.gpus import Gpu
from launcher.plan.machine import Machine
from launcher.plan.model_card import ModelCard
from launcher.plan.remedy import CONTEXT_BYTES, RAM, SHM, Kind
from shmbridge import config
from shmbridge.config import TeacherConfig
from shmbridge.errors import ConfigError, PlanError
from shmbridge.output_spec import HeadSpec, Offer, OutputSpec
from shmbridge.shm import layout

GIB = 2**30
MACHINE = Machine(cores=8, shm_free=8 * GIB, ram_free=64 * GIB)


def model(directory: Path, **settings: object) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    for name in ("model-1.safetensors", "model-2.safetensors", "pytorch_model.bin"):
        (directory / name).write_bytes(bytes(1000))
    return str(directory)


def plan(card: ModelCard, *overrides: str, machine: Machine = MACHINE, gpus: tuple[Gpu, ...] = ()) -> memory.MemoryPlan:
    teachers = tuple((gpu,) for gpu in gpus) or ((),)
    return memory.plan(config.load(overrides=["teacher.model=m", *overrides]), 2, card, teachers, machine)


def test_a_card_of_a_directory(tmp_path):
    path = model(tmp_path / "m", vocab_size=32000, torch_dtype="bfloat16")
    assert model_card.read(TeacherConfig(model=path)) == ModelCard(32000, 2000, None, "bfloat16")
    assert model_card.read(TeacherConfig(model=path, dtype="float32")) == ModelCard(32000, 4000, None, "float32")


@pytest.mark.parametrize(
    ("settings", "card"),
    [
        ({"vocab_size": 9, "hidden_size": 64}, (9, 64, None)),
        ({"vocab_size": 9, "n_embd": 48, "dtype": "float16"}, (9, 48, "float16")),
        ({"hidden_size": 7, "text_config": {"hidden_size": 64, "dtype": "bfloat16"}}, (None, 64, "bfloat16")),
        ({"vocab_size": "many", "hidden_size": 0, "dtype": "int4"}, (None, None, None)),
    ],
)
def test_a_card_tells_the_hidden_state(tmp_path, settings, card):
    read = model_card.read(TeacherConfig(model=model(tmp_path / "m", **settings)))
    assert (read.vocab_size, read.hidden_size, read.dtype) == card


def test_a_nested_vocabulary_is_the_texts(tmp_path):
    path = model(tmp_path / "m", text_config={"vocab_size": 5}, vocab_size=7)
    assert model_card.read(TeacherConfig(model=path)).vocab_size == 5


def test_a_garbled_config_makes_an_empty_card(tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text("[")
    assert model_card.read(TeacherConfig(model=str(path))) == ModelCard()


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "../nowhere", "~/nowhere", "nowhere.gguf"])
def test_a_local_path_that_does_not_exist_is_refused(path):
    with pytest.raises(ConfigError, match="there is no file or directory /"):
        model_card.read(TeacherConfig(model=path))


def test_no_model_is_refused():
    with pytest.raises(ConfigError, match="--teacher MODEL"):
        model_card.read(TeacherConfig())


@pytest.mark.parametrize("name", ["organisation/not-in-the-cache", "toy:build", "package.toy:build"])
def test_what_is_not_here_has_an_empty_card(name):
    assert model_card.read(TeacherConfig(model=name)) == ModelCard()


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(*pairs: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


NAME = string("general.name") + struct.pack("<I", 8) + string("x")
FLOATS = string("rope.factors") + struct.pack("<IIQ", 9, 6, 3) + bytes(12)
WORDS = string("general.tags") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc")
VOCAB = string("llama.vocab_size") + struct.pack("<II", 4, 77)
WIDTH = string("llama.embedding_length") + struct.pack("<II", 4, 64)
TOKENS = string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + string("a") * 3


@pytest.mark.parametrize(
    ("content", "vocab", "width"),
    [
        (gguf(NAME, FLOATS, WORDS, VOCAB), 77, None),
        (gguf(WIDTH, NAME, TOKENS), 3, 64),
        (gguf(TOKENS, VOCAB, WORDS, WIDTH), 3, 64),
        (gguf(NAME), None, None),
        (gguf(NAME, WIDTH, VOCAB)[:-3], None, 64),
        (b"something else", None, None),
        (gguf(struct.pack("<Q", 2**60)), None, None),
    ],
)
def test_a_card_of_a_gguf_file(tmp_path, content, vocab, width):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert model_card.read(TeacherConfig(model=str(path))) == ModelCard(vocab, len(content), width, "float32")
    assert model_card.read(TeacherConfig(model=str(path), dtype="bfloat16")).dtype == "bfloat16"


def test_the_plan_counts_what_the_session_will_create():
    planned = plan(ModelCard(1000, 5 * GIB), "ring.depth=2", "ring.max_tokens=4096")
    lane = layout.LaneLayout(2, 4096).nbytes
    reply = layout.reply_bytes(2, 4096 * 1000 * 2)
    assert planned.needed(SHM) == layout.control_bytes(1) + 2 * (lane + reply)
    assert planned.needed(RAM) == planned.needed(SHM) + 5 * GIB
    planned.check()


def test_declared_outputs_size_the_replies():
    outputs = "teacher.outputs={hidden: {dtype: float32, shape: [seq, 8]}}"
    planned = plan(ModelCard(), "teacher.model=toy:build", outputs, "ring.max_tokens=1024")
    assert any(item.what.startswith("replies: 2 ranks x 2 slots") for item in planned.items)


def test_unknown_sizes_are_told_and_do_not_fail():
    planned = plan(ModelCard())
    planned.check()
    assert "known once it has loaded" in str(planned)


@pytest.mark.parametrize(
    ("machine", "place", "setting"),
    [
        (MACHINE._replace(shm_free=64 * 2**20), SHM, "ring.max_tokens"),
        (MACHINE._replace(ram_free=GIB), RAM, "teacher.model"),
    ],
)
def test_a_place_that_is_too_small_is_refused_with_table_and_setting(machine, place, setting):
    with pytest.raises(PlanError) as caught:
        plan(ModelCard(32000, 5 * GIB), machine=machine).check()
    text = str(caught.value)
    assert f"of {place}" in text
    assert setting in text
    assert "replies: 2 ranks" in text


def test_weights_that_do_not_fit_the_gpu_are_refused():
    gpu = Gpu(7, "7", 80 * GIB, 79 * GIB)
    with pytest.raises(PlanError, match=r"of GPU 7"):
        plan(ModelCard(None, 100 * GIB), gpus=(gpu,)).check()


TWO = (Gpu(6, "6", 80 * GIB, 79 * GIB), Gpu(7, "7", 80 * GIB, 79 * GIB))


def weights(planned: memory.MemoryPlan) -> list[tuple[str, str, int | None]]:
    return [(item.what, item.where, item.nbytes) for item in planned.items if item.kind is Kind.WEIGHTS]


def test_each_replica_has_the_weights_on_a_gpu_of_its_own():
    planned = plan(ModelCard(None, 70 * GIB), gpus=TWO)
    assert weights(planned) == [
        ("teacher 0's weights", "GPU 6", 70 * GIB),
        ("teacher 1's weights", "GPU 7", 70 * GIB),
    ]
    assert planned.items[0].nbytes == layout.control_bytes(2)
    planned.check()
    with pytest.raises(PlanError, match=r"needs 100 GiB of GPU 6, and 79.0 GiB are free") as caught:
        plan(ModelCard(None, 100 * GIB), gpus=TWO).check()
    assert "Spread the model: lower teacher.replicas (now 2 on 2 GPUs)" in str(caught.value)
    assert "teacher.dtype=bfloat16" in str(caught.value)


def test_a_replica_that_is_spread_has_a_part_of_the_weights_on_each_gpu():
    settings = config.load(overrides=["teacher.model=m", "teacher.dtype=bfloat16"])
    planned = memory.plan(settings, 2, ModelCard(None, 100 * GIB), (TWO,), MACHINE)
    assert weights(planned) == [
        ("teacher's weights, part 1 of 2", "GPU 6", 50 * GIB),
        ("teacher's weights, part 2 of 2", "GPU 7", 50 * GIB),
    ]
    planned.check()
    with pytest.raises(PlanError, match="of GPU 6") as caught:
        memory.plan(settings, 2, ModelCard(None, 200 * GIB), (TWO,), MACHINE).check()
    assert "name more GPUs in teacher.gpus, with teacher.replicas=1" in str(caught.value)
    assert "teacher.dtype" not in str(caught.value)


def test_replicas_on_the_cpu_each_take_ram():
    settings = config.load(overrides=["teacher.model=m"])
    planned = memory.plan(settings, 2, ModelCard(None, 40 * GIB), ((), ()), MACHINE)
    assert planned.needed(RAM) == planned.needed(SHM) + 80 * GIB
    with pytest.raises(PlanError, match=r"lower teacher\.replicas \(now 2\)"):
        planned.check()


# Payloads

LLAMA = ModelCard(128_256, 16 * GIB, 4096, "bfloat16")
TOPK = "payload={topk: {k: 64}}"
HIDDEN = "payload={hidden: {}}"


def row(planned: memory.MemoryPlan, start: str) -> memory.Item:
    (item,) = [item for item in planned.items if item.what.startswith(start)]
    return item


def test_top_k_takes_what_its_words_take():
    planned = plan(LLAMA, TOPK, "ring.depth=2", "ring.max_tokens=8192")
    slot = 8192 * (64 * 4 + 64 * 4 + 4)
    assert row(planned, "replies: 2 ranks x 2 slots").nbytes == 2 * layout.reply_bytes(2, slot)
    assert row(plan(ModelCard(), TOPK), "replies").nbytes is not None, "the vocabulary is not needed for it"
    assert row(plan(ModelCard(), "payload={logprobs: {}}", "teacher.model=toy:build"), "replies").nbytes


def test_hidden_states_come_with_the_head_once():
    planned = plan(LLAMA, HIDDEN, "ring.max_tokens=8192", "ring.depth=2")
    assert row(planned, "output head: 128256 words x 4096 x bfloat16").nbytes == layout.PAGE + 128_256 * 4096 * 2
    assert row(planned, "replies").nbytes == 2 * layout.reply_bytes(2, 8192 * 4096 * 2)
    assert row(plan(LLAMA, HIDDEN, "payload.vocab=128000"), "output head: 128000 words").nbytes


@pytest.mark.parametrize("card", [ModelCard(), LLAMA._replace(hidden_size=None), LLAMA._replace(dtype=None)])
def test_hidden_states_of_an_unknown_size_are_told(card):
    planned = plan(card, HIDDEN)
    assert row(planned, "output head") == (Kind.HEAD, "output head", SHM, None)
    assert row(planned, "replies").nbytes is None
    planned.check()


def test_streamed_replies_take_their_chunks_alone():
    planned = plan(LLAMA, "payload={logits: {}, stream: {chunks: 3, chunk_positions: 256}}", "ring.max_tokens=65536")
    assert row(planned, "replies: 2 ranks x 3 chunks x 62.6 MiB").nbytes == 2 * layout.reply_bytes(3, 256 * 128_256 * 2)


def test_fewer_positions_take_smaller_replies():
    planned = plan(LLAMA, "ring.max_tokens=65536", "ring.max_positions=1024", "ring.depth=1")
    assert row(planned, "replies").nbytes == 2 * layout.reply_bytes(1, 1024 * 128_256 * 2)


def test_candidates_are_counted_in_the_lanes():
    planned = plan(LLAMA, "payload={logprobs: {candidates: 8}}", "ring.depth=2", "ring.max_tokens=4096")
    assert row(planned, "lanes").nbytes == 2 * layout.LaneLayout(2, 4096, candidates=8).nbytes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["payload={topk: {k: 200000}}"], "payload.topk.k is 200000; the teacher's distribution has 128256 words"),
        (["payload={topk: {}, vocab: 130000}"], "payload.vocab is 130000; the teacher's distribution has 128256"),
        (
            ["teacher.model=toy:build", "teacher.outputs={x: {dtype: int64, shape: [2]}}", "payload={stream: {}}"],
            "output 'x' has no sequence axis and cannot be streamed",
        ),
    ],
)
def test_a_payload_that_cannot_be_is_refused_before_anything_loads(overrides, message):
    with pytest.raises(PlanError, match=message):
        plan(LLAMA, *overrides)


def test_a_head_too_large_for_the_pool_has_a_remedy_of_its_own():
    with pytest.raises(PlanError, match="The output head") as caught:
        plan(LLAMA, HIDDEN, machine=MACHINE._replace(shm_free=512 * 2**20)).check()
    assert "payload.hidden=null payload.topk={}" in str(caught.value)
    assert "give /dev/shm more" in str(caught.value)
    assert "Lower ring" not in str(caught.value)
    with pytest.raises(PlanError, match=r"Lower ring\.max_tokens \(now 8192\)"):  # the head alone would fit
        plan(LLAMA, HIDDEN, machine=MACHINE._replace(shm_free=1025 * 2**20)).check()


def test_logits_that_do_not_fit_name_smaller_payloads_with_their_sizes():
    """The issue's own numbers: seven ranks, two slots of 32,768 positions, 128,256 words."""
    settings = config.load(overrides=["teacher.model=m", "ring.max_tokens=32768"])
    planned = memory.plan(settings, 7, LLAMA, [EIGHT[7:]], MACHINE)
    with pytest.raises(PlanError) as caught:
        planned.check()
    assert "needs 110 GiB of /dev/shm, and 8.0 GiB are free" in str(caught.value)
    remedy = str(caught.value).rpartition("\n\n")[2]
    assert remedy.startswith(
        "In place of logits send the most likely words and the rest's mass (payload.logits=null payload.topk={}: 234 MiB) "
        "or hidden states and the output head, which are as exact (payload.logits=null payload.hidden={}: 4.5 GiB). Lower"
    )
    for override in ("payload.topk={}", "payload.hidden={}"):  # what it says can be done
        chosen = config.load(overrides=["teacher.model=m", "ring.max_tokens=32768", "payload.logits=null", override])
        memory.plan(chosen, 7, LLAMA, [EIGHT[7:]], MACHINE).check()


@pytest.mark.parametrize("overrides", [[HIDDEN], [TOPK], ["teacher.model=toy:build", "payload={logits: {}}"]])
def test_other_payloads_are_named_for_the_logits_of_a_language_model_alone(overrides):
    assert plan(LLAMA, *overrides).instead == ()


OUTPUTS = "teacher.outputs={x: {dtype: int64, shape: [1000000]}, y: {dtype: int64, shape: [seq, 1000]}}"


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (
            [],
            "Lower ring.max_tokens (now 8192), ring.max_positions (now 8192) or ring.depth (now 2), "
            "stream them (payload.stream={}), or give /dev/shm more",
        ),
        (["ring.max_positions=4096"], "Lower ring.max_positions (now 4096) or ring.depth (now 2), stream them"),
        (
            ["payload={logits: {}, stream: {chunk_positions: 4096}}"],
            "Lower payload.stream.chunks (now 3) or payload.stream.chunk_positions (now 4096), or give /dev/shm more",
        ),
        (["ring.max_tokens=100000000"], "Lower ring.max_tokens (now 100000000) or ring.depth (now 2), or give"),
        (
            ["teacher.model=toy:build", OUTPUTS],
            "Lower ring.max_tokens (now 8192), ring.max_positions (now 8192), ring.max_batch (now 256) or ring.depth "
            "(now 2), or give /dev/shm more",
        ),
    ],
)
def test_the_remedy_names_what_helps(overrides, remedy):
    with pytest.raises(PlanError) as caught:
        plan(LLAMA, *overrides, machine=MACHINE._replace(shm_free=GIB)).check()
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (MACHINE._replace(shm_free=GIB), "needs 1.2 GiB of /dev/shm, and 1.0 GiB are free"),
        (MACHINE._replace(ram_free=GIB), "needs 1.2 GiB of RAM, and 1.0 GiB are free"),
    ],
)
def test_replies_known_only_after_loading_are_checked_too(machine, message):
    """What fits /dev/shm may still wake the out-of-memory killer."""
    agreed = Offer((OutputSpec("logits", "bfloat16", ("seq", 20_000)),), "m")
    settings = config.load(overrides=["ring.max_tokens=8192"])
    memory.check_replies(settings, 2, agreed, MACHINE)
    with pytest.raises(PlanError, match=message) as caught:
        memory.check_replies(settings, 2, agreed, machine)
    assert "(payload.logits=null payload.hidden={}: many times smaller)" in str(caught.value)
    assert "Lower ring.max_tokens (now 8192)" in str(caught.value)


def test_a_head_known_only_after_loading_is_checked_too():
    """Of a hub model that was not in the cache."""
    agreed = Offer((OutputSpec("hidden", "float32", ("seq", 4096)),), "m", head=HeadSpec("float32", 128_256, 4096))
    settings = config.load(overrides=[HIDDEN, "ring.max_tokens=64"])
    memory.check_replies(settings, 2, agreed, MACHINE)
    with pytest.raises(PlanError, match="The output head"):
        memory.check_replies(settings, 2, agreed, MACHINE._replace(shm_free=GIB))


# The CUDA plane

EIGHT = tuple(Gpu(i, str(i), 80 * GIB, 79 * GIB) for i in range(8))
ON_GPU = "plane=cuda_ipc"
SLOT = 8192 * 128_256 * 2
MIB = 2**20


def on_gpus(
    *overrides: str, train: tuple[Gpu, ...] = EIGHT[:2], teachers: tuple[Gpu, ...] = EIGHT[7:], card: ModelCard = LLAMA
) -> memory.MemoryPlan:
    settings = config.load(overrides=["teacher.model=m", ON_GPU, *overrides])
    return memory.plan(settings, len(train), card, [(gpu,) for gpu in teachers], MACHINE, train)


def with_free(gpu: Gpu, free: float) -> Gpu:
    return gpu._replace(free_bytes=int(free * GIB))


def slab_bytes(slots: int, stride: int) -> int:
    """Of GPU memory: the slots, a stamp for each, and a sample, in whole blocks of 2 MiB."""
    return -(-(slots * (stride + 8) + 4096) // (2 * MIB)) * 2 * MIB


def test_a_small_slab_has_a_block_of_its_own():
    planned = on_gpus("ring.depth=1", "ring.max_tokens=1")
    assert row(planned, "replies: 2 ranks x 1 slot").nbytes == 2 * 20 * MIB


def test_replies_on_gpus_are_counted_where_they_lie():
    planned = on_gpus("ring.depth=2", "ring.max_tokens=8192")
    exchange = memory.Shape.of(planned.config, 2).exchange_bytes
    lane = layout.LaneLayout(2, 8192).nbytes
    assert planned.needed(SHM) == layout.control_bytes(1) + 2 * (lane + exchange)
    assert planned.needed(RAM) == planned.needed(SHM), "weights and replies are on the GPU"
    assert row(planned, "replies: 2 ranks x 2 slots x 2.0 GiB").where == "GPU 7"
    slabs = 2 * slab_bytes(2, SLOT)
    assert planned.needed("GPU 7") == 16 * GIB + slabs + CONTEXT_BYTES
    assert planned.needed("GPU 0") == planned.needed("GPU 1") == 3 * SLOT + CONTEXT_BYTES
    planned.check()


def test_each_replica_has_the_replies_of_its_lanes_on_its_first_gpu():
    settings = config.load(overrides=["teacher.model=m", ON_GPU])
    shares = [EIGHT[4:6], EIGHT[6:]]
    planned = memory.plan(settings, 3, LLAMA, shares, MACHINE, EIGHT[:3])
    slabs = [item for item in planned.items if item.kind is Kind.REPLIES]
    assert [(item.where, item.nbytes) for item in slabs] == [
        ("GPU 4", 2 * slab_bytes(2, SLOT)),
        ("GPU 6", slab_bytes(2, SLOT)),
    ]
    assert planned.needed("GPU 5") == 8 * GIB + CONTEXT_BYTES


def test_replies_read_in_place_are_not_copied():
    planned = on_gpus("cuda.read=in_place")
    assert planned.needed("GPU 0") == CONTEXT_BYTES


def test_chunks_are_copied_as_they_come():
    stream = "payload={logits: {}, stream: {chunks: 3, chunk_positions: 256}}"
    chunk = 256 * 128_256 * 2
    planned = on_gpus(stream)
    assert row(planned, "replies: 2 ranks x 3 chunks").nbytes == 2 * slab_bytes(3, chunk)
    assert planned.needed("GPU 0") == 4 * chunk + CONTEXT_BYTES


def test_each_rank_copies_the_head_to_its_gpu():
    head = layout.head_bytes(HeadSpec("bfloat16", 128_256, 4096))
    planned = on_gpus(HIDDEN, "cuda.read=in_place", train=(EIGHT[0], EIGHT[1], EIGHT[0]))
    assert row(planned, "output head, copied for 2 ranks")[2:] == ("GPU 0", 2 * head)
    assert row(planned, "output head, copied for 1 rank")[2:] == ("GPU 1", head)
    assert row(planned, "output head: 128256").where == SHM
    assert row(planned, "CUDA contexts of 2 processes")[2:] == ("GPU 0", 2 * CONTEXT_BYTES)


def test_on_the_host_plane_ranks_have_their_head_and_context_alone():
    settings = config.load(overrides=["teacher.model=m", "plane=host", HIDDEN])
    planned = memory.plan(settings, 2, LLAMA, [EIGHT[7:]], MACHINE._replace(shm_free=64 * GIB), EIGHT[:2])
    assert planned.needed("GPU 0") == layout.head_bytes(HeadSpec("bfloat16", 128_256, 4096)) + CONTEXT_BYTES
    assert row(planned, "replies").where == SHM


def test_a_gpu_for_both_holds_all_of_it():
    planned = on_gpus(train=(EIGHT[0], EIGHT[0]), teachers=EIGHT[:1])
    slabs = 2 * slab_bytes(2, SLOT)
    assert planned.needed("GPU 0") == 16 * GIB + slabs + 2 * 3 * SLOT + 3 * CONTEXT_BYTES


def test_what_gpus_have_alike_is_one_row_and_training_is_not_counted():
    text = str(on_gpus(train=EIGHT[:7]))
    assert "copies of replies: 1 rank x 3 x 2.0 GiB" in text
    assert re.search(r"copies of replies: 1 rank x 3 x 2.0 GiB +GPUs 0-6 +5.9 GiB each\n", text)
    assert re.search(r"GPU 3 +needs 6.4 GiB \(training itself is not counted\) +79.0 GiB free(\n|$)", text)
    assert re.search(r"GPU 7 +needs 43.9 GiB +79.0 GiB free\n", text)
    unknown = str(on_gpus(train=EIGHT[:7], card=ModelCard()))
    assert re.search(r"copies of replies: 1 rank x 3 +GPUs 0-6 +known once it has loaded\n", unknown)


@pytest.mark.parametrize(
    ("overrides", "train", "teacher", "message", "remedy"),
    [
        (
            [],
            79,
            20,
            "the run needs 24.3 GiB of GPU 7, and 20.0 GiB are free",
            "Lower ring.max_tokens (now 8192), ring.max_positions (now 8192) or ring.depth (now 2), stream them "
            "(payload.stream={}), or keep the replies in host memory (plane=host).",
        ),
        ([], 79, 16, "of GPU 7", "Spread the model"),
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
            "The output head (1.0 GiB) comes with payload.hidden, and each rank copies it to its GPU. Send",
        ),
    ],
)
def test_a_gpu_that_is_too_small_is_refused_with_what_helps(overrides, train, teacher, message, remedy):
    ranks = (with_free(EIGHT[0], train), EIGHT[1])
    with pytest.raises(PlanError) as caught:
        on_gpus(*overrides, train=ranks, teachers=(with_free(EIGHT[7], teacher),)).check()
    assert message in str(caught.value)
    assert remedy in str(caught.value)
    assert "replies: 2 ranks" in str(caught.value)


def test_shared_memory_too_small_for_the_requests_of_a_gpu_run():
    settings = config.load(overrides=["teacher.model=m", ON_GPU])
    for machine, more in (
        (MACHINE._replace(shm_free=MIB // 8), "give /dev/shm more"),
        (MACHINE._replace(ram_free=MIB // 8), "memory limit"),
    ):
        with pytest.raises(PlanError) as caught:
            memory.plan(settings, 2, LLAMA, [EIGHT[7:]], machine, EIGHT[:2]).check()
        remedy = str(caught.value).rpartition("\n\n")[2]
        assert remedy.startswith("Lower ring.max_tokens (now 8192) or ring.depth (now 2), or")
        assert more in remedy
        assert "max_positions" not in remedy


@pytest.mark.parametrize(
    ("plane", "text"),
    [("host", "5.0 KiB in /dev/shm"), ("cuda_ipc", "1.2 GiB in the teacher's GPU memory, 5.0 KiB in /dev/shm")],
)
def test_what_was_created_is_told_with_its_place(plane, text):
    agreed = Offer((OutputSpec("logits", "bfloat16", ("seq", 20_000)),), "m")
    settings = config.load(overrides=[f"plane={plane}"])
    assert memory.created(settings, memory.Shape.of(settings, 2), agreed, 5 * 1024) == text


def test_replies_on_gpus_are_not_looked_for_in_shared_memory_after_loading():
    agreed = Offer((OutputSpec("logits", "bfloat16", ("seq", 20_000)),), "m")
    small = MACHINE._replace(shm_free=MIB, ram_free=MIB)
    memory.check_replies(config.load(overrides=[ON_GPU]), 2, agreed, small)
    with_head = Offer((OutputSpec("hidden", "float32", ("seq", 4096)),), "m", head=HeadSpec("float32", 128_256, 4096))
    with pytest.raises(PlanError, match="The output head"):
        memory.check_replies(config.load(overrides=[ON_GPU, HIDDEN]), 2, with_head, small)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1.0 KiB"), (98304, "96.0 KiB"), (3 * GIB, "3.0 GiB")]
)
def test_sizes(nbytes, text):
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")]
)
def test_durations(value, text):
    assert seconds(value) == text
