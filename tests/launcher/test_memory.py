"""The memory plan and what is known of a model before it is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from launcher import memory, model_card
from launcher.gpus import Gpu
from launcher.machine import Machine
from launcher.memory import RAM, SHM
from launcher.model_card import ModelCard
from launcher.text import seconds, size
from shmbridge import config, layout
from shmbridge.config import TeacherConfig
from shmbridge.errors import ConfigError, PlanError
from shmbridge.offer import OutputSpec

GIB = 2**30
MACHINE = Machine(cores=8, shm_free=8 * GIB, ram_free=64 * GIB)


def model(directory: Path, **settings: object) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    for name in ("model-1.safetensors", "model-2.safetensors", "pytorch_model.bin"):
        (directory / name).write_bytes(bytes(1000))
    return str(directory)


def plan(card: ModelCard, *overrides: str, machine: Machine = MACHINE, gpus: tuple[Gpu, ...] = ()) -> memory.MemoryPlan:
    return memory.plan(config.load(overrides=["teacher.model=m", *overrides]), 2, card, gpus, machine)


def test_a_card_of_a_directory(tmp_path):
    path = model(tmp_path / "m", vocab_size=32000, torch_dtype="bfloat16")
    assert model_card.read(TeacherConfig(model=path)) == ModelCard(32000, 2000)
    assert model_card.read(TeacherConfig(model=path, dtype="float32")) == ModelCard(32000, 4000)


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
    with pytest.raises(ConfigError, match="no such file or directory"):
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
TOKENS = string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + string("a") * 3


@pytest.mark.parametrize(
    ("content", "vocab"),
    [
        (gguf(NAME, FLOATS, WORDS, VOCAB), 77),
        (gguf(NAME, TOKENS), 3),
        (gguf(NAME), None),
        (gguf(NAME, VOCAB)[:-3], None),
        (b"something else", None),
        (gguf(struct.pack("<Q", 2**60)), None),
    ],
)
def test_a_card_of_a_gguf_file(tmp_path, content, vocab):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert model_card.read(TeacherConfig(model=str(path))) == ModelCard(vocab, len(content))


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


def test_of_several_gpus_the_first_holds_the_model():
    """teacher_job puts it whole on cuda:0."""
    two = (Gpu(6, "6", 80 * GIB, 79 * GIB), Gpu(7, "7", 80 * GIB, 79 * GIB))
    with pytest.raises(PlanError, match=r"needs 100 GiB of GPU 6, and 79.0 GiB are free") as caught:
        plan(ModelCard(None, 100 * GIB), gpus=two).check()
    assert "ore GPUs" not in str(caught.value)
    assert "teacher.dtype=bfloat16" in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (MACHINE._replace(shm_free=GIB), "needs 1.2 GiB of /dev/shm, and 1.0 GiB are free"),
        (MACHINE._replace(ram_free=GIB), "needs 1.2 GiB of RAM, and 1.0 GiB are free"),
    ],
)
def test_replies_known_only_after_loading_are_checked_too(machine, message):
    """Row 18: what fits /dev/shm may still wake the out-of-memory killer."""
    outputs = (OutputSpec("logits", "bfloat16", ("seq", 20_000)),)
    settings = config.load(overrides=["ring.max_tokens=8192"])
    memory.check_replies(settings, 2, outputs, MACHINE)
    with pytest.raises(PlanError, match=message) as caught:
        memory.check_replies(settings, 2, outputs, machine)
    assert "Lower ring.max_tokens (now 8192)" in str(caught.value)


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
