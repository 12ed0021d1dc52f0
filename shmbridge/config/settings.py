"""Settings: strict structs, read from YAML and `a.b=c` overrides, and dumped resolved with every run.

The docstring of a field documents the setting; `shmbridge-launch config` prints it. A type such as Tokens has the unit
and the smallest value. A key that no struct declares is an error that names the nearest one. Environment variables are
not settings: the only one of shmbridge is SHMBRIDGE_SESSION, which the launcher writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from shmbridge.config import decode
from shmbridge.config.sources import given
from shmbridge.errors import ConfigError

TorchDtype = Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
LogitsDtype = Literal["float32", "bfloat16", "float16"]

_LONGEST = 1e9  # finite, as JSON and the waits need it: 31 years in seconds
Tokens = Annotated[int, Meta(ge=1, extra={"unit": "tokens"})]
Positions = Annotated[int, Meta(ge=1, extra={"unit": "positions"})]
Rows = Annotated[int, Meta(ge=1, extra={"unit": "rows"})]
Words = Annotated[int, Meta(ge=1, extra={"unit": "words"})]
Requests = Annotated[int, Meta(ge=1, extra={"unit": "requests"})]
Chunks = Annotated[int, Meta(ge=1, extra={"unit": "chunks"})]
Replicas = Annotated[int, Meta(ge=1, extra={"unit": "replicas"})]
Threads = Annotated[int, Meta(ge=1, extra={"unit": "threads"})]
Restarts = Annotated[int, Meta(ge=0, extra={"unit": "restarts"})]
Ranks = Annotated[int, Meta(ge=0, extra={"unit": "ranks"})]
Replies = Annotated[int, Meta(ge=0, extra={"unit": "replies"})]
Candidates = Annotated[int, Meta(ge=0, extra={"unit": "words"})]
Microseconds = Annotated[int, Meta(ge=0, extra={"unit": "microseconds"})]
Milliseconds = Annotated[float, Meta(ge=0, le=_LONGEST, extra={"unit": "milliseconds"})]
Seconds = Annotated[float, Meta(gt=0, le=_LONGEST, extra={"unit": "seconds"})]
Share = Annotated[float, Meta(ge=0, lt=1)]


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    pass


class OutputConfig(_Section, frozen=True):
    """One tensor that a custom teacher returns."""

    dtype: TorchDtype
    shape: tuple[int | Literal["seq"], ...]
    """The axes after the batch axis: numbers, or `seq` for the sequence axis, which comes first."""


class TeacherConfig(_Section, frozen=True):
    """The teacher's process."""

    model: str = ""
    """Local directory, hub id or .gguf file of a causal language model; or `module:build`, a custom teacher."""
    gpus: str = ""
    """The teacher's GPUs, such as `7` or `6,7`. Empty: the CPU."""
    python: str = ""
    """Python interpreter of the teacher's own environment, in which shmbridge must be installed. Empty: the launcher's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the weights. auto: the checkpoint's own."""
    attn_implementation: str = ""
    """Attention implementation of transformers: `sdpa`, `eager`, `flash_attention_2`. Empty: its default."""
    revision: str = ""
    """Branch, tag or commit of a hub model. Empty: its default branch."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a hub model."""
    args: dict[str, Any] = {}
    """Free-form settings of a custom teacher; `build` reads them as settings.teacher.args."""
    outputs: dict[str, OutputConfig] = {}
    """What a custom teacher returns, such as `value: {dtype: float32, shape: [seq]}`. Empty: found by a probe forward."""
    vocab_size: Words | None = None
    """Token IDs must be below it. null: the model's own, or `forward.vocab_size` of a custom teacher that has one."""
    pad_id: int = 0
    """Token ID that pads a combined batch. Padded rows and positions are not sent back."""
    collect: Literal["greedy", "lockstep"] = "greedy"
    """Which requests one forward answers. greedy: those that have arrived after linger_ms. lockstep: one of every rank."""
    linger_ms: Milliseconds = 2.0
    """How long a greedy forward waits for ranks that have not submitted yet; for ranks of the forward before, up to half as
    long as that forward took. 0: no wait."""
    max_batch_tokens: Tokens = 16384
    """Largest forward, padding included. A larger batch is split by rank and row. A forward that runs out of memory is
    halved, and later ones are smaller until larger ones are found to fit again."""
    max_padding: Share = 0.25
    """Largest share of a combined forward that may be padding. Requests whose lengths differ by more run in separate
    forwards."""
    replicas: Replicas | None = None
    """Copies of the teacher; rank i is served by replica i % replicas. null: one for each GPU of teacher.gpus, one on the
    CPU. With fewer replicas than GPUs each model is spread over its share of them."""
    serve_until: Literal["closed", "exited"] = "closed"
    """closed: serve until every rank has closed its bridge. exited: until the ranks' processes have ended, so that one that
    has closed may connect() again, as tests under `-m pytest` and cells of a notebook do."""
    keep: bool = False
    """Stay loaded when training has ended. `shmbridge-launch teacher start` sets it."""
    restarts: Restarts = 0
    """How often a teacher that died is started again, while training waits for it."""
    compile: bool = False
    """Use torch.compile on the model. Sequence lengths are dynamic after the first recompilation."""
    cpu_threads: Threads | None = None
    """CPU threads of the teacher's process. null: half of the cores for a teacher on the CPU, torch's default on a GPU."""


class TrainConfig(_Section, frozen=True):
    """The training group."""

    gpus: str = ""
    """The training GPUs, such as `0-6` or `0,2,5`, one rank each."""
    cpu_ranks: Ranks = 0
    """Size of a training group on the CPU."""
    restarts: Restarts = 0
    """How often the training group is started again after a crash, while the teacher stays loaded."""
    torchrun_args: str = ""
    """Further flags of torchrun, as on its command line."""
    cpu_threads: Threads | None = None
    """CPU threads of each rank. null: an equal share of what the teacher leaves on the CPU, torchrun's default on GPUs."""


class RingConfig(_Section, frozen=True):
    """The requests of each rank."""

    depth: Requests = 2
    """How many requests one rank may have in flight: the replies that its loop holds at a time, plus those that the teacher
    computes ahead."""
    max_tokens: Tokens = 8192
    """Largest request: batch x seq token IDs."""
    max_positions: Positions | None = None
    """Most positions of one request whose outputs are sent back; set it where requests carry a `positions` mask. It sizes
    the reply memory of each rank: depth x max_positions x bytes per position. null: max_tokens."""
    max_batch: Rows = 256
    """Largest batch axis of a request. It sizes outputs that have no sequence axis."""
    spin_us: Microseconds | None = None
    """How long a wait is busy before it sleeps. null: 50 where the machine has more cores than the session has processes,
    else 0."""


class LogitsConfig(_Section, frozen=True):
    """The logits of every word. Sent by default, where no other payload is named."""

    dtype: LogitsDtype = "bfloat16"
    """The dtype that logits are sent in, whatever the dtype of the weights."""


class TopkConfig(_Section, frozen=True):
    """The k most likely words of each position, and the exact log-mass of all others."""

    k: Words = 64
    """Words of each position, by their log-probability in the full softmax at temperature 1."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures, above 0, at which the log-mass of all other words is sent."""

    def __post_init__(self) -> None:
        if not self.temperatures or not all(0 < t < math.inf for t in self.temperatures):
            raise ValueError(f"`temperatures` is {list(self.temperatures)}; expected a list of numbers above 0")


class LogprobsConfig(_Section, frozen=True):
    """The log-probability of the next token of each position."""

    entropy: bool = False
    """Send the entropy of each position's distribution too, in nats."""
    candidates: Candidates = 0
    """Words per position whose log-probabilities a request may ask for with `submit(candidates=...)`. 0: none."""


class HiddenConfig(_Section, frozen=True):
    """The last hidden state of each position, in the model's dtype, and the output head once per session: as exact as
    logits, and many times smaller."""


class StreamConfig(_Section, frozen=True):
    """Send replies in chunks (`pending.chunks()`), so that reply memory does not grow with the request. null: whole."""

    chunk_positions: Positions = 256
    """Positions of one chunk."""
    chunks: Chunks = 3
    """Chunks of each rank's ring. Reply memory of each rank: chunks x chunk_positions x bytes per position."""


class PayloadConfig(_Section, frozen=True):
    """What a reply carries: every section that is not null. All null: the logits of a language model, or whatever a
    custom teacher returns."""

    vocab: Words | None = None
    """The teacher's distribution is over its first `vocab` words; padded words after them are in no payload and no softmax.
    null: all words."""
    logits: LogitsConfig | None = None
    topk: TopkConfig | None = None
    logprobs: LogprobsConfig | None = None
    hidden: HiddenConfig | None = None
    stream: StreamConfig | None = None

    def __post_init__(self) -> None:
        k = self.topk.k if self.topk else 0
        if self.vocab is not None and k > self.vocab:
            raise ValueError(f"`topk.k` is {k}, above the {self.vocab} words of `vocab`; lower payload.topk.k")

    @property
    def named(self) -> tuple[str, ...]:
        """The names of the payloads that are on."""
        return tuple(name for name in ("logits", "topk", "logprobs", "hidden") if getattr(self, name) is not None)


class CudaConfig(_Section, frozen=True):
    """How a rank reads a reply that lies in the teacher's GPU memory (plane cuda_ipc)."""

    read: Literal["copy", "in_place"] = "copy"
    """copy: a side stream copies it into the rank's own memory, and the teacher's slot is free again at once. in_place: the
    rank's kernels read the teacher's memory each time they touch it, until the lease is released."""


class TimeoutsConfig(_Section, frozen=True):
    """Deadlines of waits."""

    startup_s: Seconds = 600.0
    """From wait_ready to a loaded teacher, and from what it offers to the reply memory. A kept teacher that is not ready within it
    ends; a group that comes with --attach waits no longer for its turn."""
    request_s: Seconds = 1800.0
    """From wait to reply."""
    report_s: Seconds = 120.0
    """The hang report is printed, and the wait goes on, when a process has not done what others wait for in this time."""
    save_s: Seconds = 60.0
    """From the stop of a run to the end of saving, for ranks that have a save hook (bridge.on_stop)."""
    shutdown_s: Seconds = 10.0
    """One grace for all processes that were asked to end, before they are killed. Ranks save within it in their own handlers of
    SIGINT and SIGTERM."""


class LogConfig(_Section, frozen=True):
    """Log lines of the ranks and the teacher."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """debug: a line for every hand-over."""
    stats_every: Replies = 50
    """Replies between two lines of rank 0 that tell whether teacher or student takes longer. 0: no lines."""


_BUILDER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_builder(model: str) -> bool:
    """Whether teacher.model is `module:build`, a custom teacher."""
    return _BUILDER.fullmatch(model) is not None


class Config(_Section, frozen=True):
    enabled: bool = True
    """false: training runs without a teacher, and every reply is `missing`."""
    name: str = ""
    """Alias of the session. Refused while a live launcher has the same. Empty: none."""
    run_dir: str = "runs"
    """Folder in which each run gets a directory for its logs, resolved config and report. Within a session: that directory."""
    teacher: TeacherConfig = TeacherConfig()
    train: TrainConfig = TrainConfig()
    ring: RingConfig = RingConfig()
    payload: PayloadConfig = PayloadConfig()
    plane: Literal["auto", "cuda_ipc", "host"] = "auto"
    """Where replies lie. cuda_ipc: in the teacher's GPU memory, which the ranks read over NVLink or PCIe. host: in POSIX
    shared memory. auto: cuda_ipc where a trial at the start shows that it works between the GPUs of this run, else host.
    Within a session: the plane that was chosen."""
    cuda: CudaConfig = CudaConfig()
    on_teacher_lost: Literal["stop", "wait", "continue"] = "stop"
    """What happens when the teacher died and teacher.restarts are used up. stop: ranks raise TeacherDied, after their save
    hooks. wait: the teacher is started again and again, with growing pauses, until timeouts.request_s. continue: replies are
    `missing` from then on."""
    parity: bool = True
    """Before step 1 every rank sends a probe batch and compares the reply with what the teacher's process
    computed for that batch directly. false: for a teacher whose answers to the same batch differ."""
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
        values: dotted keys with ready values, as the command line's flags give them. None takes back what `source` has.

    Raises:
        ConfigError: names the setting, what was found and what was expected.
    """
    return from_tree(given(source, overrides, values))


def from_tree(tree: Mapping[str, Any]) -> Config:
    """A Config of nested mappings. Raises ConfigError."""
    return decode.convert(_with_gpus_as_text(tree), Config)


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


def _with_gpus_as_text(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """YAML reads `gpus: 7` as a number."""
    return {
        key: {**section, "gpus": str(section["gpus"])}
        if isinstance(section, Mapping) and isinstance(section.get("gpus"), int)
        else section
        for key, section in tree.items()
    }
