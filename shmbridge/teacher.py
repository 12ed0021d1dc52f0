"""The HuggingFace teacher: the only module that imports transformers.

    AutoModelForCausalLM.from_pretrained(local directory | hub id | .gguf file)

A .gguf file takes long to dequantise, so its converted copy is kept under ~/.cache/shmbridge/gguf and loaded from there
the next time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from shmbridge.config import Config, OutputConfig
from shmbridge.errors import ConfigError
from shmbridge.payload import DTYPES, Batch

Progress = Callable[[int, int], None]


class HuggingFaceTeacher:
    """A causal language model as a teacher: {"logits": (batch, seq, vocab)}."""

    def __init__(self, settings: Config, device: torch.device, progress: Progress) -> None:
        """Load the model onto `device`; `progress(done, total)` is called while the weights load.

        Raises:
            ConfigError: the path does not exist.
            Exception: whatever transformers raises for a model it cannot load.
        """
        teacher = settings.teacher
        _watch_progress(progress)
        self.path = _local_copy(teacher.model)
        options: dict[str, Any] = {"trust_remote_code": teacher.trust_remote_code}
        if teacher.revision:
            options["revision"] = teacher.revision
        if teacher.attn_implementation:
            options["attn_implementation"] = teacher.attn_implementation
        dtype = "auto" if teacher.dtype == "auto" else DTYPES[teacher.dtype]
        options["torch_dtype" if _old_transformers() else "dtype"] = dtype
        self.model = AutoModelForCausalLM.from_pretrained(self.path, **options).to(device).eval()
        self.vocab_size: int = self.model.get_input_embeddings().num_embeddings
        self.max_seq: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        head = self.model.get_output_embeddings()
        words = self.vocab_size if head is None else head.weight.shape[0]
        self.outputs = {"logits": OutputConfig(dtype=settings.payload.logits.dtype, shape=("seq", words))}

    def __call__(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return {"logits": output.logits}


def _old_transformers() -> bool:
    """Before 4.56 the argument was called torch_dtype."""
    major, minor = transformers.__version__.split(".")[:2]
    return (int(major), int(minor)) < (4, 56)


def _watch_progress(progress: Progress) -> None:
    """Report the loading of shards and weights; without a hook in this transformers only the phase is reported."""
    set_hook = getattr(transformers.utils.logging, "set_tqdm_hook", None)
    if set_hook is None:
        return

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bar = factory(*args, **{**kwargs, "disable": False, "file": _Nowhere(), "mininterval": 0})
        bar.display = lambda *_, **__: progress(int(bar.n), int(bar.total or 0))
        return bar

    set_hook(hook)


class _Nowhere:
    """Where a progress bar draws itself; the launcher shows the progress."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _local_copy(model: str) -> str:
    """What from_pretrained takes: the model itself, or the converted copy of a .gguf file. Raises ConfigError."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"teacher.model is {model!r}; there is no such file.")
        return str(_convert(path.resolve()))
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or model.startswith(("./", "../", "~")):
        raise ConfigError(f"teacher.model is {model!r}; there is no such directory.")
    return model


def _convert(file: Path) -> Path:
    """The cached conversion of a .gguf file, made now if it is not there. Safe for several processes at once."""
    status = file.stat()
    key = hashlib.sha256(f"{file}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "shmbridge" / "gguf"
    target = cache / f"{file.stem}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            partial = cache / f"{target.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _write_conversion(file, partial)
            partial.rename(target)
    return target


def _write_conversion(file: Path, target: Path) -> None:
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source)
    # The weights are plain floats by now, but the model still calls itself quantised and would refuse to be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
