"""A session at one moment: its participants, their processes, and the cursors of its lanes.

`shmbridge-launch status` shows it, and the rules judge it.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from launcher.console.text import ranges, seconds
from launcher.hang.stacks import COLLECTIVE, GONE, Stacks
from launcher.plan import placement
from shmbridge.config import Config
from shmbridge.errors import AttachError, ConfigError
from shmbridge.shm import process
from shmbridge.shm.layout import ControlWord
from shmbridge.shm.process import Identity
from shmbridge.shm.record import Phase, Record
from shmbridge.shm.session import SESSION_VARIABLE, Lane, MappedSession, Token

TEACHER, TRAINER = "teacher", "trainer"
STILL_S = 5.0  # nobody who has moved within so many seconds is waited for; less where timeouts.report_s is short


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
    lost: bool = False  # of a teacher: it is not replaced, and the ranks go on without it
    done: int = 0  # of a teacher that loads: done of total
    total: int = 0
    stacks: Stacks = Stacks()

    @property
    def open(self) -> bool:
        """It has attached, and not said that it is done."""
        return self.attached and not self.lost and self.phase != str(Phase.CLOSED)

    @property
    def alive(self) -> bool:
        return self.process not in GONE

    @property
    def excused(self) -> bool:
        """It has said that its loop stands still, and for how long."""
        return bool(self.declared) and self.declared_left_s > 0

    @property
    def waits(self) -> bool:
        """For a teacher, or in a collective."""
        in_collective = self.stacks.place is not None and self.stacks.place.kind == COLLECTIVE
        return self.alive and (self.phase in (str(Phase.BARRIER), str(Phase.WAITING)) or in_collective)

    @property
    def activity(self) -> str:
        """`training`, `loading 3/4`, `training: eval (12.0 s left)`."""
        if not self.attached:
            return "not attached"
        if self.total and not self.ready:
            return f"{self.phase} {self.done}/{self.total}"
        if not self.declared:
            return self.phase
        name = self.declared if len(self.declared) <= 20 else f"{self.declared[:17]}..."
        left = f"{seconds(abs(self.declared_left_s))} {'over' if self.declared_left_s < 0 else 'left'}"
        return f"{self.phase}: {name} ({left})"


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
    lost: bool = False  # its teacher is lost: nobody waits for what is unanswered
    garbled: str = ""

    @property
    def unanswered(self) -> int:
        return 0 if self.lost or self.closed else self.requested - self.replied

    @property
    def full(self) -> bool:
        return self.requested - self.released >= self.depth


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A session at one moment."""

    session_id: str
    generation: int
    launcher_pid: int
    kept: bool = False  # the teachers are kept across runs: the launcher is their keeper
    over: bool = False  # the training group of this generation has ended, or none has come yet; its ranks are left out
    model: str = ""
    lockstep: bool = False
    patience_s: float = STILL_S
    participants: tuple[Participant, ...] = ()  # the teachers, then the ranks
    lanes: tuple[LaneState, ...] = ()  # of the ranks, in their order

    @property
    def teachers(self) -> list[Participant]:
        return [participant for participant in self.participants if participant.role == TEACHER]

    @property
    def ranks(self) -> list[Participant]:
        return [participant for participant in self.participants if participant.role == TRAINER]

    @property
    def pairs(self) -> list[tuple[Participant, LaneState]]:
        """The ranks with their lanes."""
        return list(zip(self.ranks, self.lanes, strict=False))

    @property
    def ready(self) -> bool:
        """All teachers are, or are lost."""
        return all(teacher.ready for teacher in self.teachers)

    @property
    def progress(self) -> int:
        """A number that is another one once any participant or cursor has moved."""
        seen = [
            (p.attached, p.pid, p.phase, p.step, p.sequence, p.declared, p.ready, p.done) for p in self.participants
        ]
        cursors = [(lane.requested, lane.replied, lane.released, lane.streamed, lane.consumed) for lane in self.lanes]
        return zlib.crc32(repr((seen, cursors)).encode())


def look(view: MappedSession, stacks: Mapping[int, Stacks] = {}, *, search: bool = True) -> Snapshot:
    """The session now.

    Args:
        stacks: that were collected of its processes, by pid.
        search: also find the processes of ranks that have not attached, through all of /proc.
    """
    control, settings = view.control, view.settings
    over = settings.teacher.keep and control.words[ControlWord.TRAINING_DONE] >= view.generation
    lanes = [] if over else view.lanes
    search = search and any(lane.records[0].identity is None for lane in lanes)
    pids = processes_of(view) if search else {}
    count, generation = len(control.teachers), view.generation
    seen = [_participant(record, placement.teacher_name(record.rank, count), generation) for record in control.teachers]
    for i, lane in enumerate(lanes):
        seen.append(_participant(lane.records[0], f"rank {i}", generation, pids.get(i, 0), _since_request(lane)))
    gpu_of = _gpus(settings, count, len(lanes))
    lost = {record.rank for record in control.teachers if record.lost}
    return Snapshot(
        session_id=view.session_id,
        generation=generation,
        launcher_pid=control.owner_identity.pid,
        kept=settings.teacher.keep,
        over=over,
        model=settings.teacher.model,
        lockstep=settings.teacher.collect == "lockstep",
        patience_s=min(STILL_S, settings.timeouts.report_s / 2),
        participants=tuple(
            msgspec.structs.replace(who, gpu=gpu_of.get(who.who, ""), stacks=stacks.get(who.pid, Stacks()))
            for who in seen
        ),
        lanes=tuple(_lane(lane, lane.teacher in lost) for lane in lanes),
    )


def _participant(
    record: Record, who: str, generation: int, pid: int = 0, since_request_s: float = float("inf")
) -> Participant:
    """`pid`: where it has not attached, and its process is known."""
    identity, declared = record.identity, record.declared or ("", 0.0)
    teaches = record.role == TEACHER
    if identity is None:
        state = process.state(pid) if pid else ""
        ready = not teaches or record.lost
        return Participant(
            role=record.role, rank=record.rank, who=who, attached=False, pid=pid, process=state, ready=ready
        )
    done, total = record.progressed if teaches else (0, 0)
    opened = record.ready == generation if generation else record.phase is Phase.IDLE
    return Participant(
        role=record.role,
        rank=record.rank,
        who=who,
        pid=identity.pid,
        phase=str(record.phase),
        declared=declared[0],
        declared_left_s=declared[1],
        step=record.step,
        sequence=record.sequence,
        phase_s=record.seconds_in_phase,
        still_s=min(record.seconds_in_phase, since_request_s),
        heartbeat_s=record.heartbeat_age_s,
        process=process.state_of(identity),
        ready=not teaches or record.lost or opened,
        lost=record.lost,
        done=done,
        total=total,
    )


def _lane(lane: Lane, lost: bool) -> LaneState:
    """The cursors of a lane. `lost`: whether its teacher is lost. A garbled lane does not raise: `LaneState.garbled` has the error."""
    ring = lane.ring
    replied = ring.replied  # before `requested`, which it never passes
    oldest_s, garbled = None, ""
    try:
        if ring.next_request() is not None:
            oldest_s = (time.monotonic_ns() - ring.read_request(replied).submitted_ns) / 1e9
    except AttachError as error:
        garbled = str(error) if ring.replied == replied else ""  # else it moved on while we read
    return LaneState(
        rank=lane.index,
        teacher=lane.teacher,
        lost=lost,
        depth=ring.depth,
        requested=ring.requested,
        replied=replied,
        released=ring.released,
        abandoned=ring.abandoned,
        closed=ring.closed,
        chunks=ring.layout.chunks,
        streamed=ring.streamed,
        consumed=ring.consumed,
        oldest_s=oldest_s,
        garbled=garbled,
    )


def _since_request(lane: Lane) -> float:
    """Seconds since the rank's latest request; infinite where there is none to read."""
    try:
        latest = lane.ring.requested - 1
        return (
            (time.monotonic_ns() - lane.ring.read_request(latest).submitted_ns) / 1e9 if latest >= 0 else float("inf")
        )
    except AttachError:
        return float("inf")


def _gpus(settings: Config, teachers: int, ranks: int) -> dict[str, str]:
    """Who has which GPU, as people number them."""
    try:
        of_teachers = placement.parse_gpus(settings.teacher.gpus, "teacher.gpus") if settings.teacher.gpus else []
        of_ranks = placement.parse_gpus(settings.train.gpus, "train.gpus", shared=True) if settings.train.gpus else []
    except ConfigError:
        return {}
    shares = enumerate(placement.shares(of_teachers, teachers))
    found = {placement.teacher_name(i, teachers): ",".join(map(str, share)) for i, share in shares}
    return found | {f"rank {rank}": str(number) for rank, number in list(enumerate(of_ranks))[:ranks]}


# Processes


def identities(view: MappedSession) -> list[Identity]:
    """The processes of all participants, those of ranks that have not attached where they can be told."""
    records = [*view.control.teachers, *(record for lane in view.lanes for record in lane.records)]
    found = [who for record in records if (who := record.identity) and record.phase is not Phase.CLOSED]
    if len(found) < len(records):
        found += [who for pid in processes_of(view).values() if (who := process.identity(pid))]
    return list(dict.fromkeys(found))


def processes_of(view: MappedSession) -> dict[int, int]:
    """Pids by rank, also of ranks that have not attached, whoever has started them. Their environment tells the
    session and its generation, and torchrun's LOCAL_RANK."""
    everyone = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = ranks_among(everyone, f"{SESSION_VARIABLE}={Token(view.session_id, view.generation)}")
    return {rank: who.pid for rank, who in found.items() if rank < len(view.lanes)}


def ranks_among(pids: Iterable[int], having: str = "") -> dict[int, Identity]:
    """Those of `pids` that torchrun has started, by their LOCAL_RANK; `having`: an assignment that must stand in their
    environment too. A rank's workers inherit its environment: the rank is who started first."""
    found: dict[int, Identity] = {}
    for pid in pids:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        rank = next((entry[11:] for entry in environment if entry.startswith(b"LOCAL_RANK=")), b"")
        who = process.identity(pid) if rank.isdigit() and (not having or having.encode() in environment) else None
        if who:
            found[int(rank)] = min(found.get(int(rank), who), who, key=lambda other: (other.start, other.pid))
    return found


def names(participants: Sequence[Participant]) -> str:
    """`rank 2`, `ranks 0-2,5`, `rank 0, teacher`."""
    ranks = [participant.rank for participant in participants if participant.role == TRAINER]
    named = [f"rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}"] if ranks else []
    return ", ".join(named + [participant.who for participant in participants if participant.role == TEACHER])
