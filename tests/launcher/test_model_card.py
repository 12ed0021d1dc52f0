"""What is known of a model before it is loaded."""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from huggingface_hub import constants

from launcher.cli.main import main
from launcher.planning import model_card
from launcher.planning.model_card import ModelCard
from shmbridge import model_path
from shmbridge.config import TeacherConfig
from shmbridge.errors import ConfigError


def model(directory: Path, **settings: object) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    for name in ("model-1.safetensors", "model-2.safetensors", "pytorch_model.bin"):
        (directory / name).write_bytes(bytes(1000))
    return str(directory)


def test_weights_are_counted_in_the_dtype_that_they_are_loaded_in(tmp_path):
    path = model(tmp_path / "m", vocab_size=32000, torch_dtype="bfloat16")
    assert model_card.read(TeacherConfig(model=path)) == ModelCard(32000, 2000, None, "bfloat16")
    assert model_card.read(TeacherConfig(model=path, dtype="float32")) == ModelCard(32000, 4000, None, "float32")


@pytest.mark.parametrize(
    ("settings", "card"),
    [
        ({"vocab_size": 9, "hidden_size": 64}, (9, 64, None)),
        ({"vocab_size": 9, "n_embd": 48, "dtype": "float16"}, (9, 48, "float16")),
        ({"hidden_size": 7, "text_config": {"hidden_size": 64, "dtype": "bfloat16"}}, (None, 64, "bfloat16")),
        ({"vocab_size": 7, "text_config": {"vocab_size": 5}}, (5, None, None)),
        ({"vocab_size": "many", "hidden_size": 0, "dtype": "int4"}, (None, None, None)),
        ("garbled", (None, None, None)),
    ],
)
def test_a_card_tells_vocabulary_and_hidden_state(tmp_path, settings, card):
    path = model(tmp_path / "m", **(settings if isinstance(settings, dict) else {}))
    if settings == "garbled":
        (tmp_path / "m" / "config.json").write_text("[")
    read = model_card.read(TeacherConfig(model=path))
    assert (read.vocab_size, read.hidden_size, read.dtype) == card


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


def gguf(*pairs: bytes, tensors: Sequence[bytes] = ()) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join([*pairs, *tensors])


def tensor(*dims: int) -> bytes:
    """Four bits a weight."""
    return string("blk.0.weight") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 12, 0)


NAME = string("general.name") + struct.pack("<I", 8) + string("x")
FLOATS = string("rope.factors") + struct.pack("<IIQ", 9, 6, 3) + bytes(12)
WORDS = string("general.tags") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc")
VOCAB = string("llama.vocab_size") + struct.pack("<II", 4, 77)
WIDTH = string("llama.embedding_length") + struct.pack("<II", 4, 64)
TOKENS = string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + string("a") * 3


@pytest.mark.parametrize(
    ("content", "vocab", "width", "parameters"),
    [
        (gguf(NAME, FLOATS, WORDS, VOCAB, tensors=[tensor(1000)]), 77, None, 1000),
        (gguf(WIDTH, NAME, TOKENS, tensors=[tensor(64, 3), tensor(64)]), 3, 64, 256),
        (gguf(TOKENS, VOCAB, WORDS, WIDTH, tensors=[tensor(64)])[:-3], 3, 64, None),
        (gguf(NAME, WIDTH, VOCAB)[:-3], None, 64, None),
        (b"", None, None, None),
        (b"something else" * 9, None, None, None),
        (gguf(struct.pack("<Q", 2**60)), None, None, None),
        (gguf(struct.pack("<Q", 2**64 - 1)), None, None, None),
    ],
)
def test_a_gguf_file_is_counted_as_it_is_loaded_and_not_as_it_is_stored(tmp_path, content, vocab, width, parameters):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    for wanted, dtype, nbytes in (("auto", "float32", 4), ("bfloat16", "bfloat16", 2)):
        weight_bytes = parameters and parameters * nbytes
        assert model_card.read(TeacherConfig(model=str(path), dtype=wanted)) == ModelCard(
            vocab, weight_bytes, width, dtype
        )


def test_a_gguf_file_without_the_package_that_reads_it_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(VOCAB, WIDTH))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    assert main(["--teacher", str(path), "--cpu", "1", "--dry-run", "--", "-m", "this"]) == 2
    assert "pip install 'shmbridge[gguf]'" in capsys.readouterr().err
    model_path.converted(path).mkdir(parents=True)
    assert model_card.read(TeacherConfig(model=str(path))).vocab_size == 77


def test_a_hub_that_cannot_be_reached_is_not_told_as_one_without_the_model(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"  # where nobody listens any more
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match=f"the hub {address} could not be asked for it"):
        model_path.require_on_hub("organisation/not-in-the-cache")
