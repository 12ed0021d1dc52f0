"""What can be known of a teacher's model before it is loaded: its vocabulary and the bytes of its weights. No torch.

The launcher sizes memory with it and refuses what cannot fit. Nothing here decides how a model is loaded; what is not
known is None.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shmbridge.config import TeacherConfig, is_builder
from shmbridge.errors import ConfigError

_WEIGHTS = (".safetensors", ".bin")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# GGUF: values of a key-value header by their type number; 8 is a string, 9 an array.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


class ModelCard(NamedTuple):
    """`weight_bytes` is what the weights take once loaded, where the checkpoint tells its dtype; else its size on disk."""

    vocab_size: int | None = None
    weight_bytes: int | None = None


def read(teacher: TeacherConfig) -> ModelCard:
    """What the local files tell of `teacher.model`; an empty card where they tell nothing.

    Raises:
        ConfigError: no model is given, or a local path does not exist.
    """
    model = teacher.model
    if not model:
        raise ConfigError("teacher.model is not set: give --teacher MODEL, or --no-teacher to train without one.")
    if is_builder(model):
        return ModelCard(teacher.vocab_size)
    path = Path(model).expanduser()
    if path.is_file():
        return _of_gguf(path) if path.suffix == ".gguf" else ModelCard()
    if path.is_dir():
        return _of_directory(path, teacher.dtype)
    if model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf"):
        raise ConfigError(f"teacher.model is {model!r}: no such file or directory.")
    cached = _in_hub_cache(model, teacher.revision)
    return _of_directory(cached, teacher.dtype) if cached else ModelCard()


def _of_directory(path: Path, dtype: str) -> ModelCard:
    try:
        tree = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        tree = {}
    if not isinstance(tree, dict):
        tree = {}
    text = tree["text_config"] if isinstance(tree.get("text_config"), dict) else {}
    vocab = text.get("vocab_size", tree.get("vocab_size"))
    stored = tree.get("dtype") or tree.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return ModelCard(vocab if isinstance(vocab, int) else None, _weight_bytes(path, stored, dtype))


def _weight_bytes(path: Path, stored: object, wanted: str) -> int | None:
    for suffix in _WEIGHTS:  # a directory with both holds the same weights twice
        size = sum(file.stat().st_size for file in path.glob(f"*{suffix}") if file.exists())
        if size:
            scale = _DTYPE_BYTES.get(wanted, 0) / _DTYPE_BYTES[stored] if stored in _DTYPE_BYTES else 0
            return int(size * scale) if scale else size
    return None


def _in_hub_cache(model: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # takes 0.2 s

    try:
        found: Any = try_to_load_from_cache(model, "config.json", revision=revision or None)
    except ValueError:  # not a name that a hub model can have; transformers will say so
        return None
    return Path(found).parent if isinstance(found, str) else None


def _of_gguf(path: Path) -> ModelCard:
    try:
        with path.open("rb") as file:
            return ModelCard(_gguf_vocab(file), path.stat().st_size)
    except (OSError, struct.error, UnicodeDecodeError, KeyError):
        return ModelCard(None, path.stat().st_size)  # truncated or foreign: the loader will say it


def _gguf_vocab(file: BinaryIO) -> int | None:
    """`<arch>.vocab_size`, or the length of the token list, whichever comes first in the key-value header."""
    magic, _version, _tensors, pairs = _unpack(file, "<4sIQQ")
    if magic != b"GGUF":
        return None
    for _ in range(pairs):
        key = _gguf_string(file)
        (kind,) = _unpack(file, "<I")
        if key.endswith(".vocab_size") and kind in _GGUF_SCALARS:
            return int(_unpack(file, "<" + _GGUF_SCALARS[kind])[0])
        if key == "tokenizer.ggml.tokens" and kind == _GGUF_ARRAY:
            return int(_unpack(file, "<IQ")[1])
        _skip(file, kind)
    return None


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _GGUF_STRING:
        file.seek(_unpack(file, "<Q")[0], os.SEEK_CUR)
    elif kind == _GGUF_ARRAY:
        item, count = _unpack(file, "<IQ")
        if item in _GGUF_SCALARS:
            file.seek(count * struct.calcsize("<" + _GGUF_SCALARS[item]), os.SEEK_CUR)
        else:
            for _ in range(count):
                _skip(file, item)
    else:
        file.seek(struct.calcsize("<" + _GGUF_SCALARS[kind]), os.SEEK_CUR)


def _gguf_string(file: BinaryIO) -> str:
    (nbytes,) = _unpack(file, "<Q")
    if nbytes > 65535:  # the format's own limit for a key
        raise KeyError(nbytes)
    return file.read(nbytes).decode()


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))
