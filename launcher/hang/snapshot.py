"""A session at one moment: its participants, their processes, and the cursors of its lanes.

`shmbridge-launch status` shows it, and the rules judge it.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import msgspec

from launcher.console.text import ranges, seconds
from launcher.hang.stacks import COLLECTIVE, GONE, Stacks
from launcher.planning import placement
from shmbridge.config import Config
from shmbridge.errors import AttachError
from shmbridge.shm import process
from shmbridge.shm.layout import ControlWord
from shmbridge.shm.participant_record import Phase, Record
from shmbridge.shm.process import Identity
from shmbridge.shm.ring import Ring
from shmbridge.shm.session import SESSION_VARIABLE, Lane, MappedSession, Token

TEACHER, TRAINER = "teacher", "trainer"
STILL_S = 5.0  # a standstill of fewer seconds is not reported; half of timeouts.report_s, if that is less


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
        on_the_bridge = self.phase in (str(Phase.BARRIER), str(Phase.WAITING))
        return self.alive and (on_the_bridge or self.stacks.place.kind == COLLECTIVE)

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


# The cursors of a lane in the order of a request's life, each behind the one before it; then those of its chunks.
CURSORS = ("requested", "replied", "released", "abandoned")
CHUNK_CURSORS = ("streamed", "consumed")


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
        """A number that changes whenever a participant or a cursor moves."""
        seen = [
            (p.attached, p.pid, p.phase, p.step, p.sequence, p.declared, p.ready, p.done) for p in self.participants
        ]
        cursors = [[getattr(lane, name) for name in CURSORS + CHUNK_CURSORS] for lane in self.lanes]
        return zlib.crc32(repr((seen, cursors)).encode())


def look(view: MappedSession, stacks: Mapping[int, Stacks] = {}, *, search: bool = True) -> Snapshot:
    """The session now.

    Args:
        stacks: the stacks of its processes by pid, where they were collected.
        search: also search /proc for the processes of ranks that have not attached.
    """
    control, settings = view.control, view.settings
    # While a run ends, its ranks may still save: they are looked at until the last one has gone.
    goes_on = settings.teacher.keep or not control.words[ControlWord.SESSION_ENDING]
    over = goes_on and control.words[ControlWord.TRAINING_DONE] >= view.generation
    lanes = [] if over else view.lanes
    search = search and any(lane.records[0].identity is None for lane in lanes)
    pids = processes_of(view) if search else {}
    seen = [_participant(record, view, 0, stacks) for record in control.teachers]
    seen += [_participant(lane.records[0], view, pids.get(lane.index, 0), stacks) for lane in lanes]
    lost = {record.rank for record in control.teachers if record.lost}
    return Snapshot(
        session_id=view.session_id,
        generation=view.generation,
        launcher_pid=control.owner_identity.pid,
        kept=settings.teacher.keep,
        over=over,
        model=settings.teacher.model,
        lockstep=settings.teacher.collect == "lockstep",
        patience_s=min(STILL_S, settings.timeouts.report_s / 2),
        participants=tuple(seen),
        lanes=tuple(_lane(lane, lane.teacher in lost) for lane in lanes),
    )


def _participant(record: Record, view: MappedSession, pid: int, stacks: Mapping[int, Stacks]) -> Participant:
    """`pid`: its process, where that is known although it has not attached."""
    identity, teachers = record.identity, len(view.control.teachers)
    pid = identity.pid if identity else pid
    phase_s = still_s = record.seconds_in_phase if identity else 0.0
    if record.role == TEACHER:
        who = placement.teacher_name(record.rank, teachers)
        opened = record.ready == view.generation if view.generation else record.phase is Phase.IDLE
    else:
        who, opened = f"rank {record.rank}", True
        ring = view.lanes[record.rank].ring
        with suppress(AttachError):  # it has sent none
            still_s = min(phase_s, _age_s(ring, ring.requested - 1))
    declared, left_s = record.declared or ("", 0.0)
    done, total = record.progressed
    return Participant(
        role=record.role,
        rank=record.rank,
        who=who,
        attached=identity is not None,
        pid=pid,
        gpu=_gpu(view.settings, record, teachers),
        phase=str(record.phase),
        declared=declared,
        declared_left_s=left_s,
        step=record.step,
        sequence=record.sequence,
        phase_s=phase_s,
        still_s=still_s,
        heartbeat_s=record.heartbeat_age_s,
        process=process.state_of(identity) if identity else process.state(pid) if pid else "",
        ready=record.lost or opened,
        lost=record.lost,
        done=done,
        total=total,
        stacks=stacks.get(pid, Stacks()),
    )


def _lane(lane: Lane, lost: bool) -> LaneState:
    """`lost`: its teacher is lost. A garbled lane does not raise: `LaneState.garbled` has the error."""
    ring = lane.ring
    # Backwards, because no cursor passes the one before it.
    cursors = {name: getattr(ring, name) for name in reversed(CURSORS + CHUNK_CURSORS)}
    oldest_s, garbled = None, ""
    try:
        if ring.next_request() is not None:
            oldest_s = _age_s(ring, cursors["replied"])
    except AttachError as error:
        garbled = str(error) if ring.replied == cursors["replied"] else ""  # else the slot was used again meanwhile
    return LaneState(
        rank=lane.index,
        teacher=lane.teacher,
        depth=ring.depth,
        closed=ring.closed,
        chunks=ring.layout.chunks,
        oldest_s=oldest_s,
        lost=lost,
        garbled=garbled,
        **cursors,
    )


def _age_s(ring: Ring, sequence: int) -> float:
    """Seconds since a request was submitted. Raises AttachError where its slot does not hold it."""
    return (time.monotonic_ns() - ring.read_request(sequence).submitted_ns) / 1e9


def _gpu(settings: Config, record: Record, teachers: int) -> str:
    """The participant's GPUs, as people number them."""
    mine: Sequence[int] = ()
    if record.role == TEACHER and settings.teacher.gpus:
        mine = placement.shares(placement.parse_gpus(settings.teacher.gpus, "teacher.gpus"), teachers)[record.rank]
    if record.role == TRAINER and settings.train.gpus:
        mine = placement.parse_gpus(settings.train.gpus, "train.gpus", shared=True)[record.rank : record.rank + 1]
    return ",".join(map(str, mine))


# Processes


def identities(view: MappedSession) -> list[Identity]:
    """The processes of all participants. Those of ranks that have not attached are searched for in /proc."""
    records = [*view.control.teachers, *(record for lane in view.lanes for record in lane.records)]
    found = [who for record in records if (who := record.identity) and record.phase is not Phase.CLOSED]
    if len(found) < len(records):
        found += [who for pid in processes_of(view).values() if (who := process.identity(pid))]
    return list(dict.fromkeys(found))


def processes_of(view: MappedSession) -> dict[int, int]:
    """Pids by rank, also of ranks that have not attached. They are found by their environment, which has the session,
    its generation and torchrun's LOCAL_RANK."""
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
