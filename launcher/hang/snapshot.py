"""What can be seen of a session at one moment: its participants, their processes, and the cursors of its lanes."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from launcher.console.text import listed
from launcher.hang.stacks import Stacks
from launcher.plan import gpus, replicas
from shmbridge.config import Config
from shmbridge.errors import AttachError, ConfigError
from shmbridge.shm import process
from shmbridge.shm.layout import ControlWord
from shmbridge.shm.process import Identity
from shmbridge.shm.session import SESSION_VARIABLE, Control, Lane, Token
from shmbridge.shm.status import Phase, Record

TEACHER, TRAINER = "teacher", "trainer"
GONE = ("gone", "zombie")


class View(Protocol):
    """A session that is mapped: an Owner's own, or one that was attached."""

    @property
    def session_id(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def settings(self) -> Config: ...
    @property
    def control(self) -> Control: ...
    @property
    def lanes(self) -> list[Lane]: ...


class Participant(msgspec.Struct, frozen=True, kw_only=True):
    """One teacher or rank."""

    role: str
    rank: int  # of a teacher the replica
    who: str
    attached: bool = True
    pid: int = 0  # 0: not known
    gpu: str = ""
    phase: str = str(Phase.ABSENT)
    declared: str = ""  # what the script said that it does
    declared_left_s: float = 0.0  # negative: it has said that it would be over by now
    step: int | None = None
    sequence: int | None = None
    phase_s: float = 0.0
    still_s: float = 0.0  # since its phase began, or since its latest request
    heartbeat_s: float | None = None
    process: str = ""  # running, sleeping, stopped, zombie or gone
    ready: bool = True  # of a teacher: it has opened the barrier of this generation, or waits for the first
    lost: bool = False  # of a teacher: no new one comes, and the ranks go on without
    done: int = 0  # of a teacher that loads: done of total
    total: int = 0
    stacks: Stacks = Stacks()

    @property
    def open(self) -> bool:
        """It has attached, and not said that it is done."""
        return self.attached and not self.lost and self.phase != str(Phase.CLOSED)

    @property
    def excused(self) -> bool:
        """It has said that its loop stands still, and for how long."""
        return bool(self.declared) and self.declared_left_s > 0


class LaneState(msgspec.Struct, frozen=True, kw_only=True):
    """The cursors of one lane."""

    rank: int
    teacher: int = 0
    depth: int = 2
    requested: int = 0
    replied: int = 0
    released: int = 0
    abandoned: int = 0
    closed: bool = False
    chunks: int = 0  # 0 where replies are not streamed
    streamed: int = 0
    consumed: int = 0
    oldest_s: float | None = None  # age of the oldest request that is not answered
    lost: bool = False  # its teacher is, and nobody waits for what is unanswered
    garbled: str = ""

    @property
    def unanswered(self) -> int:
        return 0 if self.lost else self.requested - self.replied

    @property
    def full(self) -> bool:
        return self.requested - self.released >= self.depth

    @property
    def chunks_full(self) -> bool:
        return 0 < self.chunks <= self.streamed - self.consumed


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """A session at one moment."""

    session_id: str
    generation: int
    launcher_pid: int
    kept: bool = False  # the teachers are kept across runs: the launcher is their keeper
    over: bool = False  # the training group of this generation has ended, or none has come yet; its ranks are left out
    model: str = ""
    lockstep: bool = False
    patience_s: float = 5.0  # who has moved within so many seconds does not hang
    participants: tuple[Participant, ...] = ()  # the teachers, then the ranks
    lanes: tuple[LaneState, ...] = ()

    @property
    def teachers(self) -> list[Participant]:
        return [one for one in self.participants if one.role == TEACHER]

    @property
    def ranks(self) -> list[Participant]:
        return [one for one in self.participants if one.role == TRAINER]


def look(view: View, stacks: Mapping[int, Stacks] = {}, *, search: bool = True) -> Facts:
    """The session now, with the stacks that were collected of its processes; `search`: also for the processes of ranks that have
    not attached, through all of /proc."""
    kept = view.settings.teacher.keep
    over = kept and view.control.words[ControlWord.TRAINING_DONE] >= view.generation
    lanes = [] if over else view.lanes
    where = _gpus(view.settings, len(view.control.teachers), len(lanes))
    searched = search and any(lane.records[0].identity is None for lane in lanes)
    unattached = processes_of(view) if searched else {}
    teachers = [_teacher(view, record, where, stacks) for record in view.control.teachers]
    lost = {i for i, one in enumerate(view.control.teachers) if one.lost}
    return Facts(
        session_id=view.session_id,
        generation=view.generation,
        launcher_pid=view.control.owner_identity.pid,
        kept=kept,
        over=over,
        model=view.settings.teacher.model,
        lockstep=view.settings.teacher.collect == "lockstep",
        participants=(*teachers, *(_rank(lane, where, unattached.get(lane.index), stacks) for lane in lanes)),
        lanes=tuple(state_of(lane, lost) for lane in lanes),
    )


def identities(view: View) -> list[Identity]:
    """The processes of all participants, those of ranks that have not attached where they can be told."""
    records = [*view.control.teachers, *(record for lane in view.lanes for record in lane.records)]
    signed_in = [who for record in records if (who := record.identity) and record.phase is not Phase.CLOSED]
    if len(signed_in) < len(records):
        others = [found for pid in processes_of(view).values() if (found := process.identity(pid))]
        return list(dict.fromkeys([*signed_in, *others]))
    return signed_in


def processes_of(view: View) -> dict[int, int]:
    """Pids by rank, also of ranks that have not attached, whoever has started them: what this generation of the session was told
    to, and by torchrun its rank."""
    everyone = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = ranks_among(everyone, f"{SESSION_VARIABLE}={Token(view.session_id, view.generation)}")
    return {rank: who.pid for rank, who in found.items() if rank < len(view.lanes)}


def ranks_among(pids: Iterable[int], having: str = "") -> dict[int, Identity]:
    """Those of `pids` that torchrun has started, by their LOCAL_RANK; `having`: an assignment that must stand in their
    environment too. A rank's workers inherit its environment: the rank is who started first."""
    found: dict[int, Identity] = {}
    for pid in pids:
        environment = _environment(pid)
        rank = next((entry[11:] for entry in environment if entry.startswith(b"LOCAL_RANK=")), b"")
        who = process.identity(pid) if rank.isdigit() and (not having or having.encode() in environment) else None
        if who:
            found[int(rank)] = min(found.get(int(rank), who), who, key=lambda one: (one.start, one.pid))
    return found


def _environment(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return []


def _teacher(view: View, record: Record, where: dict[str, str], stacks: Mapping[int, Stacks]) -> Participant:
    who = replicas.called(record.rank, len(view.control.teachers))
    done, total = record.progressed
    seen = _seen(record, TEACHER, who, where, stacks, record.seconds_in_phase)
    ready = record.lost or (record.ready == view.generation if view.generation else record.phase is Phase.IDLE)
    return msgspec.structs.replace(seen, ready=ready, lost=record.lost, done=done, total=total)


def _rank(lane: Lane, where: dict[str, str], pid: int | None, stacks: Mapping[int, Stacks]) -> Participant:
    record, who = lane.records[0], f"rank {lane.index}"
    if record.identity:
        return _seen(record, TRAINER, who, where, stacks, min(record.seconds_in_phase, _since_request(lane)))
    return Participant(
        role=TRAINER,
        rank=lane.index,
        who=who,
        attached=False,
        pid=pid or 0,
        gpu=where.get(who, ""),
        process=process.state(pid) if pid else "",
        stacks=stacks.get(pid or 0, Stacks()),
    )


def _seen(
    record: Record, role: str, who: str, where: dict[str, str], stacks: Mapping[int, Stacks], still_s: float
) -> Participant:
    identity, declared = record.identity, record.declared
    gpu = where.get(who, "")
    if identity is None:
        return Participant(role=role, rank=record.rank, who=who, attached=False, gpu=gpu)
    return Participant(
        role=role,
        rank=record.rank,
        who=who,
        pid=identity.pid,
        gpu=gpu,
        phase=str(record.phase),
        declared=declared[0] if declared else "",
        declared_left_s=declared[1] if declared else 0.0,
        step=record.step,
        sequence=record.sequence,
        phase_s=record.seconds_in_phase,
        still_s=still_s,
        heartbeat_s=record.heartbeat_age_s,
        process=state_of_process(identity),
        stacks=stacks.get(identity.pid, Stacks()),
    )


def state_of_process(who: Identity) -> str:
    """As process.state; gone where the pid is another process by now."""
    return process.state(who.pid) if process.identity(who.pid) == who else "gone"


def state_of(lane: Lane, lost: Collection[int] = ()) -> LaneState:
    """The cursors of a lane, `lost` the teachers that are; what is garbled is told, never raised."""
    ring = lane.ring
    replied = ring.replied  # before `requested`, which it never passes
    try:
        submitted = ring.read_request(replied).submitted_ns if ring.next_request() is not None else None
        garbled = ""
    except AttachError as error:
        submitted, garbled = None, str(error)
    if garbled and ring.replied != replied:  # it moved on while we read
        garbled = ""
    return LaneState(
        rank=lane.index,
        teacher=lane.teacher,
        lost=lane.teacher in lost,
        depth=ring.depth,
        requested=ring.requested,
        replied=replied,
        released=ring.released,
        abandoned=ring.abandoned,
        closed=ring.closed,
        chunks=ring.layout.chunks,
        streamed=ring.streamed,
        consumed=ring.consumed,
        oldest_s=None if submitted is None else max(0.0, (time.monotonic_ns() - submitted) / 1e9),
        garbled=garbled,
    )


def _since_request(lane: Lane) -> float:
    """Seconds since the rank's latest request; infinite before the first."""
    requested = lane.ring.requested
    if not requested:
        return float("inf")
    try:
        return (time.monotonic_ns() - lane.ring.read_request(requested - 1).submitted_ns) / 1e9
    except AttachError:
        return float("inf")


def _gpus(settings: Config, teachers: int, ranks: int) -> dict[str, str]:
    """Who has which GPU, as people number them."""
    try:
        own = gpus.parse(settings.teacher.gpus, "teacher.gpus") if settings.teacher.gpus else []
        train = gpus.parse(settings.train.gpus, "train.gpus", shared=True) if settings.train.gpus else []
    except ConfigError:
        return {}
    shares = replicas.shares(own, teachers)
    found = {replicas.called(i, teachers): ",".join(map(str, share)) for i, share in enumerate(shares)}
    return found | {f"rank {rank}": str(number) for rank, number in list(enumerate(train))[:ranks]}


def called(those: Sequence[Participant]) -> str:
    """`rank 2`, `ranks 0, 1 and 3`, `the teacher`, `rank 0 and the teacher`."""
    ranks = [str(one.rank) for one in those if one.role == TRAINER]
    teachers = [str(one.rank) for one in those if one.role == TEACHER]
    parts = [f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"] if ranks else []
    if teachers:
        alone = [one.who for one in those if one.role == TEACHER] == ["teacher"]
        parts.append("the teacher" if alone else f"teacher{'s' if len(teachers) > 1 else ''} {listed(teachers)}")
    return listed(parts)
