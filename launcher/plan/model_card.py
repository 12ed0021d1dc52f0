"""What is known of a teacher's model before it is loaded: its sizes, its weights, and what it will offer. Without torch.

The launcher plans memory with it and refuses what cannot fit. It does not decide how a model is loaded. What is not
known is None.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shmbridge import model_path
from shmbridge.config import Config, TeacherConfig, TorchDtype, is_builder
from shmbridge.errors import ConfigError, PlanError
from shmbridge.output_spec import HeadSpec, OutputSpec, payload_outputs

_WEIGHTS = (".safetensors", ".bin")
_DTYPE_BYTES: dict[TorchDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_WIDTH = ("hidden_size", "n_embd")  # as most models call it; as GPT-2 does

# GGUF: values of a key-value header by their type number; 8 is a string, 9 an array.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
# Keys by how they end; the vocabulary is told by whichever of its two comes first.
_GGUF_SIZES = {".vocab_size": "vocab", "tokenizer.ggml.tokens": "vocab", ".embedding_length": "width"}


class ModelCard(NamedTuple):
    """`weight_bytes` is the size of the loaded weights, or the size on disk if the checkpoint does not tell its
    dtype."""

    vocab_size: int | None = None
    weight_bytes: int | None = None
    hidden_size: int | None = None
    dtype: TorchDtype | None = None  # that the model will compute in, and its hidden states have

    def outputs(self, config: Config) -> tuple[OutputSpec, ...] | None:
        """The outputs of a reply: as the config declares them for a custom teacher without a payload section, else as the
        payload of a language model has them.

        Raises:
            PlanError: this model cannot give the payload.
        """
        payload = config.payload
        if not payload.named:
            specs = tuple(OutputSpec(name, out.dtype, out.shape) for name, out in config.teacher.outputs.items())
            whole = [spec.name for spec in specs if not spec.per_token]
            if payload.stream and whole:
                raise PlanError(
                    f"output {whole[0]!r} has no sequence axis and cannot be streamed; leave payload.stream out."
                )
            return specs or None
        words = self._words(config)
        if words is None or (payload.hidden is not None and (self.hidden_size is None or self.dtype is None)):
            return None
        return payload_outputs(payload, words, self.hidden_size, self.dtype or "float32")

    def head(self, config: Config) -> HeadSpec | None:
        """The output head, if the payload is hidden. A bias, which few models have, is not counted."""
        words = self._words(config)
        if config.payload.hidden is None or words is None or self.hidden_size is None or self.dtype is None:
            return None
        return HeadSpec(self.dtype, config.payload.vocab or words, self.hidden_size)

    def _words(self, config: Config) -> int | None:
        """The size of the distribution, or a number for which outputs have the same size."""
        payload = config.payload
        if self.vocab_size is not None and not is_builder(config.teacher.model):
            return self.vocab_size
        if payload.vocab is not None:
            return payload.vocab
        if payload.logits is None and payload.hidden is None:  # then no output is as wide as the distribution
            return payload.topk.k if payload.topk else 1
        return None


def read(teacher: TeacherConfig) -> ModelCard:
    """The card of `teacher.model` from local files; empty if they do not have its sizes.

    Raises:
        ConfigError: no model is given, a local path does not exist, or it is a .gguf file that nothing here can read.
    """
    model = teacher.model
    if not model:
        raise ConfigError("teacher.model is not set: give --teacher MODEL, or --no-teacher to train without one.")
    if is_builder(model):
        return ModelCard(teacher.vocab_size)
    path = model_path.local(model) or model_path.cached(model, teacher.revision)
    if path and path.is_dir():
        return _of_directory(path, teacher.dtype)
    if path and path.suffix == ".gguf":
        if not teacher.python:  # another environment may have the package
            model_path.require_gguf(path)
        sizes = _gguf_sizes(path)
        dtype = _dtype(teacher.dtype) or "float32"  # what dequantising gives
        return ModelCard(sizes.get("vocab"), path.stat().st_size, sizes.get("width"), dtype)
    return ModelCard()


def _of_directory(path: Path, wanted: str) -> ModelCard:
    try:
        tree = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        tree = {}
    tree = tree if isinstance(tree, dict) else {}
    text = tree["text_config"] if isinstance(tree.get("text_config"), dict) else {}
    both = {**tree, **text}
    stored = _dtype(tree.get("dtype") or tree.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"))
    width = next((both[name] for name in _WIDTH if name in both), None)
    loaded = _dtype(wanted) or stored
    return ModelCard(_size(both.get("vocab_size")), _weight_bytes(path, stored, loaded), _size(width), loaded)


def _dtype(name: object) -> TorchDtype | None:
    return next((known for known in _DTYPE_BYTES if known == name), None)


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _weight_bytes(path: Path, stored: TorchDtype | None, loaded: TorchDtype | None) -> int | None:
    for suffix in _WEIGHTS:  # a directory with both holds the same weights twice
        size = sum(file.stat().st_size for file in path.glob(f"*{suffix}") if file.exists())
        if size:
            return size * _DTYPE_BYTES[loaded] // _DTYPE_BYTES[stored] if stored and loaded else size
    return None


def _gguf_sizes(path: Path) -> dict[str, int]:
    """The vocabulary and the width of the hidden state, as far as the file's header tells them."""
    found: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for key, value in _gguf_pairs(file):
                name = next((name for end, name in _GGUF_SIZES.items() if key.endswith(end)), None)
                if name and isinstance(value, int):
                    found.setdefault(name, value)
                if len(found) == 2:  # before the long lists that follow
                    break
    except (OSError, struct.error, UnicodeDecodeError, KeyError):
        pass  # truncated or foreign: the loader will say it
    return found


def _gguf_pairs(file: BinaryIO) -> Iterator[tuple[str, object]]:
    """Each key of the header with its number, or the length of its array; None for other types."""
    magic, _version, _tensors, pairs = _unpack(file, "<4sIQQ")
    for _ in range(pairs if magic == b"GGUF" else 0):
        key = _gguf_string(file)
        (kind,) = _unpack(file, "<I")
        start = file.tell()
        form = "<IQ" if kind == _GGUF_ARRAY else "<" + _GGUF_SCALARS.get(kind, "")
        yield key, next(reversed(_unpack(file, form)), None)
        file.seek(start)
        _skip(file, kind)


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
