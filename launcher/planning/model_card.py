"""What is known of a teacher's model before it is loaded: its sizes, its weights, and what it will offer. Without torch.

The launcher plans memory with it and refuses what cannot fit. It does not decide how a model is loaded. What is not
known is None.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from shmbridge import model_path
from shmbridge.config import Config, TeacherConfig, TorchDtype, is_builder
from shmbridge.errors import ConfigError, PlanError
from shmbridge.output_spec import HeadSpec, OutputSpec, payload_outputs

_WEIGHTS = (".safetensors", ".bin")
_DTYPE_BYTES: dict[TorchDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# GGUF: values of a key-value header by their type number; 8 is a string, 9 an array.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


class ModelCard(NamedTuple):
    """What the files of a model tell."""

    vocab_size: int | None = None
    weight_bytes: int | None = None  # once loaded; on disk where the checkpoint does not tell its dtype
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
    if path is None:
        return ModelCard()
    if path.is_dir():
        return _of_directory(path, teacher.dtype)
    if not teacher.python:  # another environment may have the package
        model_path.require_gguf(path)
    sizes = _gguf_sizes(path)
    dtype = _dtype(teacher.dtype) or "float32"  # what dequantising gives
    weight_bytes = sizes["parameters"] * _DTYPE_BYTES[dtype] if "parameters" in sizes else None
    return ModelCard(sizes.get("vocab"), weight_bytes, sizes.get("width"), dtype)


def _of_directory(path: Path, wanted: str) -> ModelCard:
    try:
        tree = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        tree = None
    tree = tree if isinstance(tree, dict) else {}
    text = tree.get("text_config")
    both = tree | text if isinstance(text, dict) else tree
    stored = next(
        (found for key in ("dtype", "torch_dtype") if (found := _dtype(tree.get(key) or both.get(key)))), None
    )
    loaded = _dtype(wanted) or stored
    width = both.get("hidden_size", both.get("n_embd"))  # as most models call it; as GPT-2 does
    weight_bytes = next(filter(None, (_bytes_on_disk(path, suffix) for suffix in _WEIGHTS)), None)
    if weight_bytes and stored and loaded:
        weight_bytes = weight_bytes * _DTYPE_BYTES[loaded] // _DTYPE_BYTES[stored]
    return ModelCard(_size(both.get("vocab_size")), weight_bytes, _size(width), loaded)


def _bytes_on_disk(path: Path, suffix: str) -> int:
    """A directory with several kinds of weights holds the same weights several times."""
    return sum(file.stat().st_size for file in path.glob(f"*{suffix}") if file.exists())


def _dtype(name: object) -> TorchDtype | None:
    return next((known for known in _DTYPE_BYTES if known == name), None)


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _gguf_sizes(path: Path) -> dict[str, int]:
    """The vocabulary, the width of the hidden state and the number of parameters, as far as the file's header tells
    them."""
    found: dict[str, int] = {}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _GgufHeader(data)
            magic, _version, tensors, pairs = header.read("4s"), header.read("I"), header.read("Q"), header.read("Q")
            if magic != b"GGUF":
                return found
            for _ in range(pairs):
                key, value = header.read_string(), _size(header.read_value(header.read("I")))
                if value and key.endswith((".vocab_size", "tokenizer.ggml.tokens")):  # whichever comes first
                    found.setdefault("vocab", value)
                if value and key.endswith(".embedding_length"):
                    found.setdefault("width", value)
            parameters = 0
            for _ in range(tensors):
                header.read_string()
                parameters += math.prod([header.read("Q") for _ in range(header.read("I"))])
                header.read("I"), header.read("Q")  # its type and its place in the file
            found["parameters"] = parameters
    except (OSError, ValueError, LookupError, OverflowError, struct.error):
        pass  # truncated or foreign: the loader will say it
    return found


class _GgufHeader:
    """Reads the header of a .gguf file from its start."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def read(self, form: str) -> Any:
        """One number in the notation of `struct`."""
        (value,) = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return value

    def read_string(self) -> str:
        nbytes = self.read("Q")
        self._at += nbytes
        return self._data[self._at - nbytes : self._at].decode(errors="replace")

    def read_value(self, kind: int) -> Any:
        """A number, a text, or the length of an array."""
        if kind == _GGUF_STRING:
            return self.read_string()
        if kind != _GGUF_ARRAY:
            return self.read(_GGUF_SCALARS[kind])
        item, count = self.read("I"), self.read("Q")
        if item in _GGUF_SCALARS:
            self._at += count * struct.calcsize(f"<{_GGUF_SCALARS[item]}")
        else:
            for _ in range(count):
                self.read_value(item)
        return count
