"""Who owes something, and for how long: asked once a second by the supervisor while training runs.

A debt is something that a party owes: a teacher an answer, a rank its attaching or, under lockstep, its request, any of them
its heartbeat. And all together movement: where nobody waits on the bridge and nobody moves either, the training's own
collectives stand still. After timeouts.report_s a debt is due for a hang report, and the wait goes on; then again each time
that it has doubled.

Time counts only while the launcher itself ran, and not where the one who owes has declared a phase, or owes only because
another has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from launcher.console.text import seconds
from launcher.hang import rules, snapshot, stacks
from launcher.hang.snapshot import Facts, LaneState, Participant, View, called
from launcher.supervisor.cause import Cause
from shmbridge.config import Config
from shmbridge.shm import process
from shmbridge.shm.status import Phase

_LONGEST_TICK_S = 5.0  # a longer one: the launcher was stopped, or the machine slept
_MOST_TOLD = 3
_BEFORE_READY = {str(phase) for phase in (Phase.ABSENT, Phase.STARTING, Phase.LOADING, Phase.PROBING, Phase.OFFERED)}


class Debt(msgspec.Struct, frozen=True):
    """What somebody owes."""

    who: str
    what: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.what} for {seconds(self.seconds)}"


class _Owed(msgspec.Struct, frozen=True):
    """A debt as it is seen in one tick; the same key is the same debt."""

    key: tuple[object, ...]
    who: str
    what: str
    counts: bool = True  # False: its time stands still
    from_s: float | None = None  # due after this instead of timeouts.report_s


class _Account(msgspec.Struct):
    """A debt over time."""

    seen: _Owed
    due_s: float
    seconds: float = 0.0


class Watch:
    """Of one session."""

    def __init__(self, view: View, settings: Config) -> None:
        """`view` is followed over its generations."""
        self._view = view
        self._report_s = settings.timeouts.report_s
        self._startup_s = settings.timeouts.startup_s
        self._accounts: dict[tuple[object, ...], _Account] = {}
        self._seen: object = None
        self._moves = 0  # how often anybody has moved
        self._rank_moves = 0  # how often an attached rank has
        self._ranks_seen: object = None
        self._last: float | None = None

    def due(self, now: float) -> list[Debt]:
        """Look, and count. What is to be reported now, the longest first: empty in nearly all ticks. `now`: monotonic."""
        step_s = 0.0 if self._last is None else min(max(0.0, now - self._last), _LONGEST_TICK_S)
        self._last = now
        seen = snapshot.look(self._view, search=False)
        self._note_moves(seen)
        owed = {one.key: one for one in self._owed(seen)}
        self._accounts = {key: self._account(one, step_s) for key, one in owed.items()}
        accounts = sorted(self._accounts.values(), key=lambda account: -account.seconds)
        longest = max((one.seconds for one in accounts if one.seconds >= one.due_s), default=None)
        if longest is None:
            return []
        of_one_standstill = [one for one in accounts if one.seconds >= longest / 2]
        for account in of_one_standstill:
            account.due_s = max(account.due_s, account.seconds + longest)
        return [Debt(one.seen.who, one.seen.what, one.seconds) for one in of_one_standstill]

    def hard(self, now: float) -> Cause | None:
        """The failure of ranks that have not attached within timeouts.startup_s, though all teachers are ready and the attached
        ranks stand still, or of a kept teacher that is not ready within that time; None in nearly all ticks. To be asked after
        `due`."""
        late = [one.seen for one in self._accounts.values() if one.seconds >= self._startup_s]
        teachers = [one.who for one in late if one.key[0] == "loading"]
        ranks = [one.key[1] for one in late if one.key[0] == "missing"]
        if teachers:
            return self._late_teacher(teachers)
        if not ranks:
            return None
        processes = snapshot.processes_of(self._view)
        identities = [found for rank in ranks if (found := process.identity(processes.get(int(str(rank)), 0)))]
        seen = snapshot.look(self._view, stacks.collect(identities, None))
        return self._cause([one for one in seen.ranks if one.rank in ranks])

    def _late_teacher(self, late: list[str]) -> Cause | None:
        run = Path(self._view.settings.run_dir)
        seen = snapshot.look(self._view, stacks.collect(snapshot.identities(self._view), run))
        first = next(one for one in seen.teachers if one.who in late)
        share = f" ({first.done} of {first.total})" if first.total else ""
        reason = (
            f"was not ready within {seconds(self._startup_s)} (timeouts.startup_s); it is in phase {first.phase}{share}"
        )
        return self._cause_of(first, reason)

    def _cause(self, late: list[Participant]) -> Cause | None:
        """`late` may have attached in the last moment."""
        late = [one for one in late if not one.attached]
        if not late:
            return None
        first = late[0]
        place = rules.standing(first) if first.stacks.threads else f"process {first.process or 'not found'}"
        more = f" (nor {'has' if len(late) == 2 else 'have'} {called(late[1:])})" if len(late) > 1 else ""
        reason = (
            f"did not attach within {seconds(self._startup_s)} (timeouts.startup_s) while the others waited{more}; it is "
            f"{place}"
        )
        return self._cause_of(first, reason)

    def _cause_of(self, one: Participant, reason: str) -> Cause:
        return Cause(
            role=one.role,
            rank=one.rank,
            who=one.who,
            pid=one.pid,
            reason=reason,
            status=1,
            at_ns=time.monotonic_ns(),
            phase=one.phase,
            traceback=_stack_text(one),
        )

    def _account(self, owed: _Owed, step_s: float) -> _Account:
        account = self._accounts.get(owed.key)
        if account is None:
            return _Account(owed, owed.from_s or self._report_s)
        account.seen = owed
        account.seconds += step_s if owed.counts else 0.0
        return account

    def _note_moves(self, seen: Facts) -> None:
        ranks = (
            [_position(one) for one in seen.ranks if one.attached],
            seen.lanes and [_cursors(one) for one in seen.lanes],
        )
        everyone = [_position(one) for one in seen.participants], ranks
        self._moves += everyone != self._seen
        self._rank_moves += ranks != self._ranks_seen
        self._seen, self._ranks_seen = everyone, ranks

    def _owed(self, seen: Facts) -> Iterator[_Owed]:
        yield from self._unhealthy(seen)
        yield from self._unanswered(seen)
        yield from self._missing(seen)
        yield from self._standstill(seen)
        yield from self._kept(seen)

    def _unhealthy(self, seen: Facts) -> Iterator[_Owed]:
        """Stopped, or silent."""
        for one in seen.participants:
            if one.open and one.process == "stopped":
                yield _Owed(("stopped", one.who, one.pid), one.who, f"{one.who} (pid {one.pid}) is stopped")
            elif one.open and one.process not in snapshot.GONE and (one.heartbeat_s or 0.0) > rules.STALE_S:
                loads = one.role == snapshot.TEACHER and not one.ready
                what = f"{one.who} (pid {one.pid}) gives no heartbeat"
                from_s = self._startup_s if loads else None
                yield _Owed(("silent", one.who, one.pid), one.who, what, not one.excused, from_s)

    def _unanswered(self, seen: Facts) -> Iterator[_Owed]:
        """A teacher owes its replies; under lockstep ranks owe the request that the others wait for."""
        ranks = {one.rank: one for one in seen.ranks}
        for teacher in seen.teachers:
            lanes = [lane for lane in seen.lanes if lane.teacher == teacher.rank and _is_open(lane, ranks)]
            asking = [lane for lane in lanes if lane.unanswered]
            collecting = seen.lockstep and teacher.phase == str(Phase.COLLECTING)
            awaited = [lane for lane in lanes if not lane.unanswered] if collecting and asking else []
            excused = any(ranks[lane.rank].excused for lane in awaited)
            from_s = self._startup_s if teacher.phase in _BEFORE_READY else None
            for lane in asking:
                if lane.chunks_full and not awaited:
                    continue  # the rank has yet to read what there is
                reply = ("reply", lane.rank, seen.generation, lane.replied, lane.streamed)
                what = f"rank {lane.rank}'s request (sequence {lane.replied}) is unanswered"
                yield _Owed(reply, teacher.who, what, not excused, from_s)
            for lane in awaited:
                rank = ranks[lane.rank]
                if rank.attached:
                    what = f"{rank.who} sends no request, which all others await"
                    request = ("request", lane.rank, seen.generation, lane.requested)
                    yield _Owed(request, rank.who, what, not rank.excused)

    def _missing(self, seen: Facts) -> Iterator[_Owed]:
        """A rank that has not attached, though the teachers are ready and the others stand still."""
        others = [one for one in seen.ranks if one.open]
        if not others or not all(one.ready for one in seen.teachers):
            return
        excused = any(one.excused for one in others)
        for one in seen.ranks:
            if not one.attached:
                key = ("missing", one.rank, seen.generation, self._rank_moves)
                yield _Owed(key, one.who, f"{one.who} has not attached", not excused)

    def _standstill(self, seen: Facts) -> Iterator[_Owed]:
        """Nobody moves, and nobody waits on the bridge."""
        open_ranks = [one for one in seen.ranks if one.open and one.process not in snapshot.GONE]
        unattached = [one for one in seen.ranks if not one.attached]
        asking = any(lane.unanswered for lane in seen.lanes if not lane.closed)
        if not (open_ranks or unattached) or asking or not all(one.ready for one in seen.teachers):
            return
        excused = any(one.excused for one in open_ranks)
        what = "no rank has moved" if open_ranks else "no rank has attached"
        key = ("still", seen.generation, self._moves)
        yield _Owed(key, called(open_ranks or unattached), what, not excused, None if open_ranks else self._startup_s)

    def _kept(self, seen: Facts) -> Iterator[_Owed]:
        """Between two training groups a kept teacher loads, or finishes what the last one has left."""
        for one in seen.teachers if seen.over else ():
            if one.lost or one.phase == str(Phase.IDLE):
                continue
            if one.phase in _BEFORE_READY:
                yield _Owed(("loading", one.rank, one.pid), one.who, f"{one.who} is not ready", from_s=self._startup_s)
            else:
                what = f"{one.who} has not finished what the last training group has left"
                yield _Owed(("drain", one.rank, seen.generation), one.who, what)


def told(debts: Sequence[Debt]) -> str:
    """What a hang report says that it is for: `rank 0's request (sequence 7) is unanswered for 2 min 00 s`."""
    more = f"; and {len(debts) - _MOST_TOLD} more" if len(debts) > _MOST_TOLD else ""
    return "; ".join(map(str, debts[:_MOST_TOLD])) + more


def _is_open(lane: LaneState, ranks: dict[int, Participant]) -> bool:
    return not lane.closed and ranks[lane.rank].process not in snapshot.GONE


def _position(one: Participant) -> tuple[object, ...]:
    return one.attached, one.pid, one.phase, one.step, one.sequence, one.declared, one.ready, one.done


def _cursors(lane: LaneState) -> tuple[int, ...]:
    return lane.requested, lane.replied, lane.released, lane.streamed, lane.consumed, lane.closed


def _stack_text(one: Participant) -> str:
    """As a traceback is read: the innermost call last."""
    if not one.stacks.threads:
        return f"no stack: {one.stacks.missing or 'its process was not found'}\n{one.stacks.kernel}".rstrip()
    source = one.stacks.source
    lines = [
        f'  File "{frame.file}", line {frame.line}, in {frame.function}'
        for frame in reversed(one.stacks.threads[0].frames)
    ]
    return "\n".join([f"The stack of {one.who}, pid {one.pid} (by {source}):", *lines])
