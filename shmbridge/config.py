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
from types import UnionType
from typing import Any, Literal, get_args

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
    """How long a greedy forward waits for the lanes that have not submitted yet, in milliseconds; for lanes of the forward
    before up to half as long as that one took. 0: for nobody."""
    max_batch_tokens: int = 16384
    """Padded tokens of one forward; more are split by rank and row."""
    max_padding: float = 0.25
    """Share of a combined forward that may be padding; requests whose lengths differ by more go into forwards of their
    own."""
    replicas: int | None = None
    """Copies of the teacher; lane i is served by replica i % replicas. None: one for each GPU of teacher.gpus, one on a
    CPU. Fewer replicas than GPUs: each model is spread over its share of them."""
    keep: bool = False
    """Stay loaded when training has ended, for the next. Set by `shmbridge-launch teacher start`."""
    restarts: int = 0
    """How often a teacher that died is started again while training waits for it."""
    compile: bool = False
    """torch.compile the model. Sequence lengths are dynamic after the first recompilation."""
    cpu_threads: int | None = None
    """Threads of the teacher's process. None: half of the cores on a CPU, torch's default on a GPU."""

    def __post_init__(self) -> None:
        self._require("linger_ms", 0, "ms")
        self._require("max_batch_tokens", 1, "token")
        self._require("cpu_threads", 1, "thread")
        self._require("vocab_size", 1, "token")
        self._require("replicas", 1, "replica")
        self._require("restarts", 0, "restarts")
        if not 0 <= self.max_padding < 1:
            raise ValueError(f"`max_padding` is {self.max_padding}; it is a share of 0 to below 1")


class TrainConfig(_Section, frozen=True):
    gpus: str = ""
    """The training GPUs, such as `0-6` or `0,2,5`; one rank each."""
    cpu_ranks: int = 0
    """Ranks of a training group without GPUs."""
    restarts: int = 0
    """How often the training group is started again after a crash, while the teacher stays loaded."""
    torchrun_args: str = ""
    """Further flags of torchrun, as on its command line."""
    cpu_threads: int | None = None
    """Threads of each rank. None: its share of what the teacher leaves on a CPU, torchrun's default on GPUs."""

    def __post_init__(self) -> None:
        self._require("cpu_ranks", 0, "ranks")
        self._require("restarts", 0, "restarts")
        self._require("cpu_threads", 1, "thread")


class RingConfig(_Section, frozen=True):
    depth: int = 2
    """Requests that one rank may have in flight."""
    max_tokens: int = 8192
    """Largest request, batch x seq token IDs."""
    max_positions: int | None = None
    """Positions of one request whose outputs come back, at most. None: max_tokens; less where requests carry a
    `positions` mask. Sizes the reply memory of each rank: depth x max_positions x bytes per position."""
    max_batch: int = 256
    """Largest batch axis of a request. Sizes outputs that have no sequence axis."""
    spin_us: int | None = None
    """Busy-wait this long before sleeping, in microseconds. None: 50 where the machine has more cores than the session
    has processes, else 0."""

    def __post_init__(self) -> None:
        self._require("depth", 1, "slot")
        self._require("max_tokens", 1, "token")
        self._require("max_batch", 1, "row")
        self._require("max_positions", 1, "position")
        self._require("spin_us", 0, "us")


class LogitsConfig(_Section, frozen=True):
    dtype: LogitsDtype = "bfloat16"
    """What the logits travel in, whatever the weights are in."""


class TopkConfig(_Section, frozen=True):
    k: int = 64
    """Words of each position, by their log-probability in the full softmax at temperature 1."""
    temperatures: tuple[float, ...] = (1.0,)
    """The exact log-mass of all other words is sent for each of these."""

    def __post_init__(self) -> None:
        self._require("k", 1, "word")
        if not self.temperatures or not all(0 < t < math.inf for t in self.temperatures):
            raise ValueError(f"`temperatures` is {list(self.temperatures)}; it lists numbers of more than 0")


class LogprobsConfig(_Section, frozen=True):
    entropy: bool = False
    """Send the entropy of each position's distribution too, in nats."""
    candidates: int = 0
    """IDs per position whose log-probabilities a request may ask for (`submit(candidates=...)`); 0: none."""

    def __post_init__(self) -> None:
        self._require("candidates", 0, "candidates")


class HiddenConfig(_Section, frozen=True):
    """The last hidden state, in the model's dtype, and the output head once per session."""


class StreamConfig(_Section, frozen=True):
    chunk_positions: int = 256
    """Positions of one chunk."""
    chunks: int = 3
    """Chunks of each rank's ring. Reply memory of each rank: chunks x chunk_positions x bytes per position."""

    def __post_init__(self) -> None:
        self._require("chunk_positions", 1, "position")
        self._require("chunks", 1, "chunk")


class PayloadConfig(_Section, frozen=True):
    """What a reply carries: every section that is there. None is there: logits of a model, and whatever a teacher of one's
    own returns."""

    vocab: int | None = None
    """The teacher's distribution is over its first `vocab` words; the rest, padding, is in no payload and no softmax."""
    logits: LogitsConfig | None = None
    topk: TopkConfig | None = None
    logprobs: LogprobsConfig | None = None
    hidden: HiddenConfig | None = None
    stream: StreamConfig | None = None
    """Replies come in chunks (`pending.chunks()`), so that reply memory does not grow with the request. None: whole."""

    def __post_init__(self) -> None:
        self._require("vocab", 1, "word")
        k = self.topk.k if self.topk else 0
        if self.vocab is not None and k > self.vocab:
            raise ValueError(f"`topk.k` is {k}, above the {self.vocab} words of `vocab`; lower payload.topk.k")

    @property
    def named(self) -> tuple[str, ...]:
        """The payloads that are there, by name."""
        return tuple(name for name in ("logits", "topk", "logprobs", "hidden") if getattr(self, name) is not None)


class CudaConfig(_Section, frozen=True):
    """How a rank reads a reply that lies in the teacher's GPU memory (plane cuda_ipc)."""

    read: Literal["copy", "in_place"] = "copy"
    """copy: by a side stream into memory of the rank's own, and the teacher's slot is free again at once. in_place: the
    rank's kernels read the teacher's memory, each time they touch it, until the lease is released."""


class TimeoutsConfig(_Section, frozen=True):
    startup_s: float = 600.0
    """From wait_ready to a loaded teacher, and from its offer to the reply memory."""
    request_s: float = 1800.0
    """From wait to reply."""
    report_s: float = 120.0
    """The hang report is printed, and the wait goes on, when a party has owed something for this long."""
    save_s: float = 60.0
    """For ranks that have a save hook (bridge.on_stop), from the stop of a run to the end of their saving."""
    shutdown_s: float = 10.0
    """One shared grace for everything that was asked to end, before it is killed."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be a number of more than 0 s")


class LogConfig(_Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """debug shows every hand-over."""
    stats_every: int = 50
    """Replies between two lines of rank 0 that tell whether teacher or student is the longer, and by how much. 0: none."""

    def __post_init__(self) -> None:
        self._require("stats_every", 0, "replies")


_BUILDER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_builder(model: str) -> bool:
    """Whether teacher.model is `module:build`, a teacher of one's own."""
    return _BUILDER.fullmatch(model) is not None


class Config(_Section, frozen=True):
    enabled: bool = True
    """False: training runs alone and the bridge gives replies without tensors."""
    name: str = ""
    """Alias of the session; refused while a live launcher holds it."""
    run_dir: str = "runs"
    """Each run gets a directory of its own below it: logs, the resolved config, the report. Inside a session it is that
    directory."""
    teacher: TeacherConfig = TeacherConfig()
    train: TrainConfig = TrainConfig()
    ring: RingConfig = RingConfig()
    payload: PayloadConfig = PayloadConfig()
    plane: Literal["auto", "cuda_ipc", "host"] = "auto"
    """Where replies lie. cuda_ipc: in the teacher's GPU memory, which the ranks read over NVLink or PCIe. host: in POSIX
    shared memory. auto: cuda_ipc where a trial at the start shows that it works between the GPUs of this run, else host.
    Inside a session it is what was chosen."""
    cuda: CudaConfig = CudaConfig()
    on_teacher_lost: Literal["stop", "wait", "continue"] = "stop"
    """Once teacher.restarts are used up. stop: ranks raise TeacherDied, after their save hooks. wait: a teacher is started again
    and again, with growing pauses, until timeouts.request_s. continue: replies are `missing` from then on."""
    parity: bool = True
    """Before step 1 every rank sends a probe batch and compares the reply with what the model gives in its own process.
    Off for a teacher whose answers to the same batch differ."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        if self.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name):
            raise ValueError(f"`name` is {self.name!r}; use at most 64 letters, digits, `_`, `.` and `-`")
        if not self.payload.named and not is_builder(self.teacher.model):
            logits = msgspec.structs.replace(self.payload, logits=LogitsConfig())
            msgspec.structs.force_setattr(self, "payload", logits)


def load(source: str | None = None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """The resolved config: defaults, then `source`, then `values`, then `overrides`.

    Args:
        source: a YAML file, or `FILE#section` for one (dotted) section of a file that holds other settings too.
        overrides: `a.b=c` strings; `c` is read as YAML.
        values: dotted keys with ready values, as the command line's flags give them.

    Raises:
        ConfigError: names the setting, what was found and what was expected.
    """
    return from_tree(given(source, overrides, values))


def given(
    source: str | None = None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `load` resolves: the settings that were given alone, as nested mappings. Raises ConfigError."""
    tree = _read(source) if source else {}
    for key, value in (values or {}).items():
        _assign(tree, key, value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form a.b=c")
        _assign(tree, key, _parse_yaml(text, f"override {override!r}"))
    return tree


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
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
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
        declared = fields[key].type
        for kind in get_args(declared) if isinstance(declared, UnionType) else (declared,):  # X, or X | None
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                _refuse_unknown(kind, value, f"{prefix}{key}.")
