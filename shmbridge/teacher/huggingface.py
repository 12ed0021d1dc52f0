"""The HuggingFace teacher: the only module of the teacher that imports transformers.

    AutoModelForCausalLM.from_pretrained(local directory | hub id | .gguf file)

A .gguf file takes long to dequantise, so its converted copy is kept under ~/.cache/shmbridge/gguf and loaded from there
the next time.
"""

from __future__ import annotations

import fcntl
import io
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from shmbridge import fingerprint, model_path
from shmbridge.config import Config, TeacherConfig
from shmbridge.errors import ConfigError
from shmbridge.head import Head
from shmbridge.log import logger
from shmbridge.output_spec import Tokens
from shmbridge.plane.tensors import DTYPES
from shmbridge.teacher.batch import Batch

Progress = Callable[[int, int], None]


class HuggingFaceTeacher:
    """A causal language model as a teacher.

    It returns {"hidden": (batch, seq, width)}, the state before the output head, and has the head as `head`. A model that does
    something else between the two returns {"logits": (batch, seq, vocab)}; its `head` is None and `no_head` says why.
    """

    def __init__(self, settings: Config, device: torch.device, progress: Progress, gpus: int = 1) -> None:
        """Load the model onto `device`, or spread it over the first `gpus` GPUs; `progress(done, total)` is called while the
        weights load.

        Raises:
            ConfigError: the model is neither here nor on the hub, or payload.vocab cuts words that the tokenizer has.
            Exception: whatever transformers raises for a model it cannot load.
        """
        teacher = settings.teacher
        _watch_progress(progress)
        self.path = local_copy(teacher)
        self.model = _load(teacher, self.path, device, gpus)
        self.vocab_size: int = self.model.get_input_embeddings().num_embeddings
        self.max_seq: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.tokenizer = _tokenizer(self.path, teacher, settings.payload.vocab)
        self._wants_one_row = "flash" in str(self.model.config._attn_implementation)
        """FlashAttention finds packed documents in batches of one row only."""
        with torch.inference_mode():
            self.head, self.no_head = _head_of(self.model, self.vocab_size, device)
            if self.head is None:
                logger.warning(
                    "the teacher's head is not taken apart: %s. Every forward computes whole logits.", self.no_head
                )
            elif settings.payload.vocab is not None:
                self.head = self.head.first(settings.payload.vocab)
            self._trunk = self.model.base_model if self.head else self.model
            if teacher.compile:
                self._trunk = torch.compile(self._trunk)

    def __call__(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Hidden states, or logits where the model has no plain head."""
        rows, seq = batch.input_ids.shape
        given: dict[str, torch.Tensor | None] = {"attention_mask": batch.attention_mask}
        input_ids = batch.input_ids
        if batch.position_ids is not None:
            given["position_ids"] = batch.position_ids
            if rows > 1 and self._wants_one_row and batch.attention_mask is None:
                input_ids = input_ids.reshape(1, -1)
                given["position_ids"] = batch.position_ids.reshape(1, -1)
        output = self._trunk(input_ids=input_ids, use_cache=False, **given)
        name = "hidden" if self.head else "logits"
        found = output.last_hidden_state if self.head else output.logits
        return {name: found.reshape(rows, seq, -1)}

    def reference(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """What the model itself gives, by its own forward: its logits, and as `hidden` what its own output head was given."""
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        if self.head is None:
            return {"logits": self.model(**given).logits}
        seen: list[torch.Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            return {"logits": self.model(**given).logits, "hidden": seen[0]}
        finally:
            hook.remove()


def _head_of(model: Any, vocab_size: int, device: torch.device) -> tuple[Head | None, str]:
    """The output head, where head(hidden) is what the model gives; else None, and why not."""
    module = model.get_output_embeddings()
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        found = type(module).__name__ if weight is None else weight.dtype
        return None, f"its output head is {found}, no matrix of floats"
    if model.base_model is model:
        return None, "it has no trunk apart from its output head"
    text = model.config.get_text_config()
    known = {name: getattr(text, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")}
    numbers = {name: float(value) for name, value in known.items() if isinstance(value, (int, float)) and value}
    head = Head(
        weight.detach(),
        None if bias is None else bias.detach(),
        softcap=numbers.get("final_logit_softcapping"),
        scale=numbers.get("logit_scale", 1.0) / numbers.get("logits_scaling", 1.0),  # Cohere; Granite
    )
    ids = torch.arange(8, device=device).remainder(vocab_size).reshape(1, 8)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float().to(logits.device)
    off = float((ours - logits).abs().max() / logits.abs().max()) if ours.shape == logits.shape else math.inf
    tolerance = 0.02 if weight.dtype.itemsize == 2 else 1e-4  # relative, for sums in another order
    if off <= tolerance:
        return head, ""
    return None, f"head(hidden) is off from the model's own logits by {off:.1%}: it does something in between"


def _load(teacher: TeacherConfig, path: str, device: torch.device, gpus: int) -> Any:
    options: dict[str, Any] = {"trust_remote_code": teacher.trust_remote_code}
    if teacher.revision:
        options["revision"] = teacher.revision
    if teacher.attn_implementation:
        options["attn_implementation"] = teacher.attn_implementation
    options["dtype"] = "auto" if teacher.dtype == "auto" else DTYPES[teacher.dtype]
    if gpus > 1:  # the others that this process sees are the training's
        room = {i: torch.cuda.mem_get_info(i)[0] for i in range(gpus)}
        return AutoModelForCausalLM.from_pretrained(path, device_map="balanced", max_memory=room, **options).eval()
    return AutoModelForCausalLM.from_pretrained(path, **options).to(device).eval()


def _tokenizer(path: str, teacher: TeacherConfig, vocab: int | None) -> Tokens | None:
    """The table of the model's tokenizer, where it has one. Raises ConfigError where `vocab` cuts words of it."""
    try:
        found = AutoTokenizer.from_pretrained(
            path, revision=teacher.revision or "main", trust_remote_code=teacher.trust_remote_code
        )
        names = set(found.vocab_files_names.values())  # empty for some kinds, which need no file
        files = (*names, "tokenizer.json", "tokenizer.model")
        if names and Path(path).is_dir() and not any(Path(path, name).is_file() for name in files):
            return None  # transformers 5 makes an empty tokenizer of the class that the model's type tells
        table = fingerprint.of_tokenizer(found)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    if vocab is not None and vocab < table.entries:
        raise ConfigError(
            f"payload.vocab is {vocab}; the teacher's tokenizer has {table.entries} entries, so words would be lost. Only the "
            f"padding may be cut: set payload.vocab to {table.entries} or more."
        )
    return table


def _watch_progress(progress: Progress) -> None:
    """Report the loading of shards and weights; without a hook in this transformers only the phase is reported."""
    set_hook = getattr(transformers.utils.logging, "set_tqdm_hook", None)
    if set_hook is None:
        return
    nowhere = io.StringIO()  # the launcher shows the progress

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bar = factory(*args, **{**kwargs, "disable": False, "file": nowhere, "mininterval": 0})
        bar.display = lambda *_, **__: progress(int(bar.n), int(bar.total or 0))
        return bar

    set_hook(hook)


def local_copy(teacher: TeacherConfig) -> str:
    """What from_pretrained takes: a local directory, the id of a model on the hub, or the converted copy of a .gguf file, which
    is made now if there is none. Safe for several processes at once.

    Raises:
        ConfigError: there is no such file or directory, nor such a model on the hub.
    """
    file = model_path.local(teacher.model)
    if file is None:
        model_path.require_on_hub(teacher.model, teacher.revision)
        return teacher.model
    if file.suffix != ".gguf":
        return str(file.resolve())
    target = model_path.converted(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _write_conversion(file.resolve(), partial)
            partial.rename(target)
    return str(target)


def _write_conversion(file: Path, target: Path) -> None:
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source)
    # The weights are plain floats by now, but the model still calls itself quantised and would refuse to be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
