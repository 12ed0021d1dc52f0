"""Settings: strict structs, read from YAML and `a.b=c` overrides, and dumped resolved with every run.

A key that no struct declares is an error that names the nearest one. Environment variables are not settings:
SHMBRIDGE_SESSION, which the launcher writes, is the only one of shmbridge's own.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from shmbridge.errors import ConfigError

TorchDtype = Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
LogitsDtype = Literal["float32", "bfloat16", "float16"]


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    def _require(self, name: str, minimum: float, unit: str) -> None:
        value = getattr(self, name)
        if value is not None and not (minimum <= value < math.inf):
            raise ValueError(f"`{name}` is {value}; it must be a number of at least {minimum} {unit}")


class OutputConfig(_Section, frozen=True):
    """One tensor that a teacher of one's own returns. `shape` follows the batch axis: numbers, or `seq` for axis 1."""

    dtype: TorchDtype
    shape: tuple[int | Literal["seq"], ...]


class TeacherConfig(_Section, frozen=True):
    model: str = ""
    """Local directory, hub id or .gguf file of a causal language model; or `module:build`, a teacher of one's own."""
    gpus: str = ""
    """The teacher's GPUs, such as `7` or `6,7`. Empty: the CPU."""
    python: str = ""
    """Interpreter of the teacher's own environment (shmbridge must be installed there). Empty: the launcher's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. `auto` is what the checkpoint says."""
    attn_implementation: str = ""
    """As in transformers: `sdpa`, `eager`, `flash_attention_2`. Empty: its default."""
    revision: str = ""
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    args: dict[str, Any] = {}
    """Free-form settings for a teacher of one's own; `build` reads them as settings.teacher.args."""
    outputs: dict[str, OutputConfig] = {}
    """What a teacher of one's own returns. Empty: taken from a probe forward."""
    vocab_size: int | None = None
    """Token IDs must be below it. None: the model's own (a teacher of one's own: `forward.vocab_size`, if it has one)."""
    pad_id: int = 0
    """The ID in the padding of a combined batch; its rows never come back."""
    collect: Literal["greedy", "lockstep"] = "greedy"
    """greedy: what is there after the linger. lockstep: one request of every open lane."""
    linger_ms: float = 2.0
    """How long a greedy forward waits for the lanes that have not submitted yet, in milliseconds."""
    max_batch_tokens: int = 16384
    """Padded tokens of one forward; more are split by rank and row."""
    cpu_threads: int | None = None
    """Threads of the teacher's process. None: half of the cores on a CPU, torch's default on a GPU."""

    def __post_init__(self) -> None:
        self._require("linger_ms", 0, "ms")
        self._require("max_batch_tokens", 1, "token")
        self._require("cpu_threads", 1, "thread")
        self._require("vocab_size", 1, "token")


class TrainConfig(_Section, frozen=True):
    gpus: str = ""
    """The training GPUs, such as `0-6` or `0,2,5`; one rank each."""
    cpu_ranks: int = 0
    """Ranks of a training group without GPUs."""
    torchrun_args: str = ""
    """Further flags of torchrun, as on its command line."""
    cpu_threads: int | None = None
    """Threads of each rank. None: its share of what the teacher leaves on a CPU, torchrun's default on GPUs."""

    def __post_init__(self) -> None:
        self._require("cpu_ranks", 0, "ranks")
        self._require("cpu_threads", 1, "thread")


class RingConfig(_Section, frozen=True):
    depth: int = 2
    """Requests that one rank may have in flight."""
    max_tokens: int = 8192
    """Largest request, batch x seq token IDs. Sizes the reply memory: depth x max_tokens x bytes per token, per rank."""
    max_batch: int = 256
    """Largest batch axis of a request. Sizes outputs that have no sequence axis."""
    spin_us: int | None = None
    """Busy-wait this long before sleeping, in microseconds. None: 50 where the machine has more cores than the session
    has processes, else 0."""

    def __post_init__(self) -> None:
        self._require("depth", 1, "slot")
        self._require("max_tokens", 1, "token")
        self._require("max_batch", 1, "row")
        self._require("spin_us", 0, "us")


class LogitsConfig(_Section, frozen=True):
    dtype: LogitsDtype = "bfloat16"
    """What the logits travel in, whatever the weights are in."""


class PayloadConfig(_Section, frozen=True):
    logits: LogitsConfig = LogitsConfig()


class TimeoutsConfig(_Section, frozen=True):
    startup_s: float = 600.0
    """From wait_ready to a loaded teacher, and from its offer to the reply memory."""
    request_s: float = 1800.0
    """From wait to reply."""
    shutdown_s: float = 10.0
    """One shared grace for everything that was asked to end, before it is killed."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be a number of more than 0 s")


class LogConfig(_Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """debug shows every hand-over."""


class Config(_Section, frozen=True):
    enabled: bool = True
    """False: training runs alone and the bridge gives replies without tensors."""
    name: str = ""
    """Alias of the session; refused while a live launcher holds it."""
    run_dir: str = "runs"
    """Each run gets a directory of its own below it: logs, the resolved config, the report."""
    teacher: TeacherConfig = TeacherConfig()
    train: TrainConfig = TrainConfig()
    ring: RingConfig = RingConfig()
    payload: PayloadConfig = PayloadConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        if self.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name):
            raise ValueError(f"`name` is {self.name!r}; use at most 64 letters, digits, `_`, `.` and `-`")


_BUILDER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_builder(model: str) -> bool:
    """Whether teacher.model is `module:build`, a teacher of one's own."""
    return _BUILDER.fullmatch(model) is not None


def load(source: str | None = None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """The resolved config: defaults, then `source`, then `values`, then `overrides`.

    Args:
        source: a YAML file, or `FILE#section` for one (dotted) section of a file that holds other settings too.
        overrides: `a.b=c` strings; `c` is read as YAML.
        values: dotted keys with ready values, as the command line's flags give them.

    Raises:
        ConfigError: names the setting, what was found and what was expected.
    """
    tree = _read(source) if source else {}
    for key, value in (values or {}).items():
        _assign(tree, key, value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form a.b=c")
        _assign(tree, key, _parse_yaml(text, f"override {override!r}"))
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Config:
    """A Config of nested mappings. Raises ConfigError."""
    _refuse_unknown(Config, tree, "")
    try:
        return msgspec.convert(_with_gpus_as_text(tree), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"config: {error}") from None


def dump(config: Config) -> str:
    """The resolved config as YAML, readable by `load`."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)


def to_json(config: Config) -> bytes:
    return msgspec.json.encode(config)


def from_json(text: bytes) -> Config:
    try:
        return msgspec.json.decode(text, type=Config)
    except msgspec.DecodeError as error:
        raise ConfigError(f"config: {error}") from None


def _read(source: str) -> dict[str, Any]:
    path, _, section = source.partition("#")
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"config file {path!r}: {error.strerror}") from None
    tree = _parse_yaml(text, f"config file {path!r}")
    for key in section.split(".") if section else ():
        if not isinstance(tree, dict) or key not in tree:
            raise ConfigError(f"config file {path!r} has no section {section!r}")
        tree = tree[key]
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {source!r} is a {type(tree).__name__}; expected a mapping of settings")
    return tree


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"setting {key!r}: {parent!r} is a value, not a section")
    tree[leaf] = value


def _with_gpus_as_text(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """YAML reads `gpus: 7` as a number."""
    return {
        key: {**section, "gpus": str(section["gpus"])}
        if isinstance(section, Mapping) and isinstance(section.get("gpus"), int)
        else section
        for key, section in tree.items()
    }


def _refuse_unknown(struct: type[msgspec.Struct], tree: Any, prefix: str) -> None:
    if not isinstance(tree, Mapping):
        return
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known here: {', '.join(fields)}"
            raise ConfigError(f"unknown setting `{prefix}{key}`; {hint}")
        kind = fields[key].type
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            _refuse_unknown(kind, value, f"{prefix}{key}.")
