"""Who is waited for: the table of rules that turns a snapshot into findings. Pure.

Every rule reads the snapshot alone, with stacks or without. The monitor times a finding by its key; a report tells
the first finding that has stood for a while. RULES is in the order of a report: what is wrong with a process comes
before what its loop does, and what somebody owes on the bridge before the training's own collectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from launcher.console.text import seconds
from launcher.hang.snapshot import TEACHER, LaneState, Participant, Snapshot, names
from launcher.hang.stacks import COLLECTIVE, WAIT
from shmbridge.shm.participant_record import Phase

STALE_S = 5.0  # a heartbeat comes every second
HEALTHY = ("closed", "moving")  # the kinds of finding of a session in which nothing hangs

Who = Sequence[Participant]
_BEFORE_READY = {str(phase) for phase in (Phase.ABSENT, Phase.STARTING, Phase.LOADING, Phase.PROBING, Phase.OFFERED)}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody who is waited for."""

    kind: str  # the rule
    suspects: tuple[str, ...]  # their stacks come first in a report
    sentence: str
    action: str
    key: tuple[str | int, ...]  # the same in a later snapshot as long as nothing has changed about it
    still_s: float | None = None  # how long it has stood by the snapshot's own times; None: long enough for a report
    excused: bool = False  # a rank has declared a phase: the monitor's time stands still
    report_after: str = "report_s"  # which of the timeouts the monitor reports it after; empty: it does not
    fatal: bool = False  # the run ends once it has stood for timeouts.startup_s


def find(snapshot: Snapshot) -> list[Finding]:
    """What every rule finds."""
    return [finding for rule in RULES for finding in rule(snapshot)]


def verdict(snapshot: Snapshot) -> list[Finding]:
    """What a report says: the findings of one kind, or the finding that nothing hangs.

    The kind is the first in the order of RULES whose finding has stood for `patience_s`. Findings that a declared phase excuses come
    after all others.
    """
    stood = [found for found in find(snapshot) if found.still_s is None or found.still_s >= snapshot.patience_s]
    stood.sort(key=lambda finding: finding.excused)
    return [finding for finding in stood if finding.kind == stood[0].kind] or [_healthy(snapshot)]


# What is wrong with a process


def _garbled(snapshot: Snapshot) -> Iterator[Finding]:
    for rank, lane in snapshot.pairs:
        if lane.garbled:
            action = "Something wrote into shared memory that is not its own; end the run and keep its logs."
            yield _finding("garbled", [rank], f"{rank.who}'s lane is garbled: {lane.garbled}", action)


def _dead(snapshot: Snapshot) -> Iterator[Finding]:
    """Not timed: the launcher sees the exit, and decides at once whether it ends the run."""
    for dead in snapshot.participants:
        if dead.open and not dead.alive:
            sentence = f"{dead.who} (pid {dead.pid}) has ended without closing the bridge, in phase {dead.phase}"
            action = "Its log tells why it ended; the launcher ends the run, or restarts what may be restarted."
            yield _finding("dead", [dead], sentence, action, report_after="")


def _stopped(snapshot: Snapshot) -> Iterator[Finding]:
    for stopped in snapshot.participants:
        if stopped.process == "stopped" and (stopped.open or not stopped.attached):
            pid = stopped.pid
            sentence = f"{stopped.who} (pid {pid}) is stopped, not dead (SIGSTOP, Ctrl-Z or a debugger)"
            action = f"Resume with `kill -CONT {pid}`, and the run goes on; or end it with `kill -KILL {pid}`."
            yield _finding("stopped", [stopped], sentence + _waiting(snapshot, stopped), action)


def _stalled(snapshot: Snapshot) -> Iterator[Finding]:
    for silent in snapshot.participants:
        silent_s = silent.heartbeat_s or 0.0
        running = silent.open and silent.alive and silent.process != "stopped"
        if running and silent_s > STALE_S and not silent.excused:
            why = "native code holds the GIL" + ("" if silent.process == "running" else ", or the process swaps")
            sentence = f"{silent.who} (pid {silent.pid}) has not run Python for {seconds(silent_s)}{_at(silent)}: {why}"
            action = "Look at the native call on top of its stack: it must release the GIL. `vmstat 1` shows swapping."
            after = "report_s" if silent.ready else "startup_s"  # loading may hold the GIL for long
            yield _finding("stalled", [silent], sentence + _waiting(snapshot, silent), action, report_after=after)


# Startup, and the end of a generation


def _unready(snapshot: Snapshot) -> Iterator[Finding]:
    """A teacher that loads, or that has not finished what the last training group left. Loading is timed for a kept teacher alone:
    in all other cases the ranks time their own wait for the teacher."""
    begun = any(rank.open for rank in snapshot.ranks)
    for late in snapshot.teachers:
        kept = snapshot.kept and late.phase in _BEFORE_READY
        if not late.ready and (kept or (not snapshot.over and (begun or late.attached))):
            sentence = f"{late.who} is not ready: {_where(late)}{_waiting(snapshot, late)}"
            action = "Its log tells how far it is. timeouts.startup_s bounds the wait."
            after = "startup_s" if kept else ""
            yield _finding("loading", [late], sentence, action, report_after=after, fatal=kept)
        elif snapshot.over and late.open and late.phase != str(Phase.IDLE):
            sentence = f"{_standing([late])} and has not finished what the last training group left"
            action = "The next group waits for it. Its log and its stack tell what it does."
            yield _finding("draining", [late], sentence, action, snapshot.generation, waits=[late])


def _missing(snapshot: Snapshot) -> Iterator[Finding]:
    others = [rank for rank in snapshot.ranks if rank.open]
    for rank in snapshot.ranks if snapshot.ready else ():
        if not rank.attached:
            process = f" (pid {rank.pid}, {rank.stacks.place.text or rank.process})" if rank.pid else ""
            sentence = f"{rank.who} has not attached to the session{process}; {_standing(others) or 'no rank has'}"
            action = (
                "Every rank calls shmbridge.connect(); where one does not come to it, its stack or its log tells why."
            )
            at = snapshot.generation, snapshot.progress
            after = "report_s" if others else "startup_s"
            waits = others or snapshot.teachers
            yield _finding(
                "missing", [rank], sentence, action, *at, waits=waits, report_after=after, fatal=bool(others)
            )


# What is owed on the bridge


def _unread(snapshot: Snapshot) -> Iterator[Finding]:
    for rank, lane in snapshot.pairs:
        if _is_unread(rank, lane):
            sentence = f"{_standing([rank])} and does not read its streamed reply: the teacher has no free chunk left"
            action = "Read the chunks, which gives them back to the teacher, or cancel the request (pending.cancel)."
            at = snapshot.generation, lane.replied, lane.consumed
            yield _finding("unread", [rank], sentence, action, *at, waits=[rank])


def _owed(snapshot: Snapshot) -> Iterator[Finding]:
    """Under lockstep the ranks without a request while others have one: the teacher waits for theirs. Else the oldest request
    that a teacher has not answered."""
    for teacher in snapshot.teachers:
        served = [(rank, lane) for rank, lane in snapshot.pairs if rank.alive and not lane.closed]
        served = [(rank, lane) for rank, lane in served if lane.teacher == teacher.rank]
        late = [(rank, lane) for rank, lane in served if not lane.unanswered]
        asked = [(rank, lane) for rank, lane in served if lane.unanswered and not _is_unread(rank, lane)]
        collects = snapshot.lockstep and teacher.phase == str(Phase.COLLECTING)
        if collects and 0 < len(late) < len(served):
            for rank, lane in late:
                owed = "has sent no request (teacher.collect=lockstep needs one of every rank)"
                sentence = f"{_standing([rank])} and {owed}{_waiting(snapshot, rank)}"
                action = "Make the same requests in every rank between two collectives, or set teacher.collect=greedy."
                at = snapshot.generation, lane.requested
                if rank.attached:  # else it is missing
                    yield _finding("lockstep", [rank], sentence, action, *at, waits=[rank])
        elif asked:
            rank, lane = max(asked, key=lambda pair: pair[1].oldest_s or 0.0)
            age_s = lane.oldest_s or 0.0
            notes = ", all slots in use" if lane.full else ""
            notes += ", given up" if lane.replied < lane.abandoned else ""
            request = f"{rank.who}'s request (sequence {lane.replied}{notes})"
            sentence = f"{request} has waited for {seconds(age_s)}: {_standing([teacher])}{_waiting(snapshot, teacher)}"
            action = "A teacher that collects should have taken it: keep this report, and end the run."
            if teacher.phase == str(Phase.FORWARD):
                action = "Wait, or lower teacher.max_batch_tokens; the first forwards of a compiled model take long."
            key = rank.rank, snapshot.generation, lane.replied, lane.streamed
            after = "report_s" if teacher.ready else "startup_s"
            yield _finding("reply", [teacher], sentence, action, *key, still_s=age_s, report_after=after)


# Nobody owes anything on the bridge


def _standstill(snapshot: Snapshot) -> Iterator[Finding]:
    """The training's own collectives, and ranks that do something else. Not timed while a request is waited for.

    Where ranks are at different collectives, or some at none, the smallest group is the suspect. Of groups of the same
    size the suspect is the group at no collective; without such a group all ranks are suspects.
    """
    ranks = [rank for rank in snapshot.ranks if rank.open and rank.alive]
    if not ranks or not snapshot.ready:
        return
    groups: dict[str, list[Participant]] = {}
    for rank in ranks:
        kind, text = rank.stacks.place
        groups.setdefault(text if kind == COLLECTIVE else "", []).append(rank)
    smallest = min(map(len, groups.values()))
    fewest = [group for group in groups.values() if len(group) == smallest]
    if set(groups) == {""}:
        waiting = [rank for rank in ranks if rank.stacks.place.kind == WAIT]
        suspects = waiting or ranks
        sentence = f"no rank waits on the bridge: {_standing(suspects)}"
        action = 'The stacks tell more. If this is an evaluation, say so: `with bridge.phase("eval", timeout=900):`.'
        if waiting:
            action = "Look at what it waits for: the DataLoader's workers (see the processes below it), or the GPU."
    elif len(groups) == 1 and len(ranks) == len(snapshot.ranks):
        suspects = ranks
        sentence = f"the collective does not end: {_standing(ranks)}"
        action = (
            "No rank is missing: look at the network, the GPUs (nvidia-smi, dmesg), NCCL_DEBUG=INFO, other machines."
        )
    else:
        suspects = fewest[0] if len(fewest) == 1 else groups[""] if groups.get("") in fewest else ranks
        others = [rank for rank in ranks if rank not in suspects]
        sentence = "; ".join(map(_standing, filter(None, (suspects, others))))
        action = (
            "Every rank must call a collective: look for `if rank == 0:`, uneven batches, an error that was caught."
        )
    at = snapshot.generation, snapshot.progress
    after = "" if any(lane.unanswered for lane in snapshot.lanes) else "report_s"
    yield _finding("standstill", suspects, sentence, action, *at, waits=ranks, report_after=after)


def _healthy(snapshot: Snapshot) -> Finding:
    moved = [rank for rank in snapshot.ranks if rank.open] or [teacher for teacher in snapshot.teachers if teacher.open]
    if snapshot.over or not moved:
        sentence = "no rank is at work: all have closed the bridge, or none has attached"
        return _finding("closed", [], sentence, "Nothing to do.")
    latest_s = max(participant.still_s for participant in moved)
    sentence = f"nothing hangs: {names(moved)} moved within the last {seconds(latest_s)}"
    action = f"Nothing to do: nobody has been waited for longer than {seconds(snapshot.patience_s)}."
    return _finding("moving", [], sentence, action)


RULES = (_garbled, _dead, _stopped, _stalled, _unready, _missing, _unread, _owed, _standstill)


# What several rules use


def _finding(
    kind: str, suspects: Who, sentence: str, action: str, *at: str | int, waits: Who = (), **more: Any
) -> Finding:
    """A finding whose key has its kind, its suspects and `at`, which changes when something moves.

    `waits`: the participants whose standing still it is. Their times tell how long it has stood. While one of them has declared a
    phase, the finding is excused, and there is nothing to do.
    """
    excused = [one for one in waits if one.excused]
    if excused:
        action = f"Nothing, while the phase lasts that {names(excused)} declared."
    if waits:
        more |= {"still_s": max(one.still_s for one in waits), "excused": bool(excused)}
    who = tuple(one.who for one in suspects)
    key = (kind, *who, *(one.pid for one in suspects), *at)
    return Finding(kind=kind, suspects=who, sentence=sentence, action=action, key=key, **more)


def _is_unread(rank: Participant, lane: LaneState) -> bool:
    """No chunk is free for the reply that the rank's teacher streams, and the rank does something else."""
    full = 0 < lane.chunks <= lane.streamed - lane.consumed
    return full and bool(lane.unanswered) and rank.phase != str(Phase.WAITING)


def _at(participant: Participant) -> str:
    text = participant.stacks.place.text
    return f", {text}" if text else ""


def _where(one: Participant) -> str:
    """`in phase forward, in attend (model.py:8)`. A rank that has declared no phase is described by its place alone, if it is known."""
    if not one.attached:
        return one.activity
    phase = f", in phase {one.activity}" if one.role == TEACHER or one.declared or not _at(one) else ""
    return f"{phase}{_at(one)}"[2:]


def _standing(who: Who) -> str:
    """`ranks 0-1 are at all_reduce() in step (train.py:8) for 41.0 s; rank 2 is in phase training for 41.0 s`."""
    groups: dict[str, list[Participant]] = {}
    for one in who:
        groups.setdefault(_where(one), []).append(one)
    parts = []
    for where, group in groups.items():
        still = seconds(min(one.still_s for one in group))
        parts.append(f"{names(group)} {'is' if len(group) == 1 else 'are'} {where} for {still}")
    return "; ".join(parts)


def _waiting(snapshot: Snapshot, besides: Participant) -> str:
    """The ranks that wait for a teacher, or in a collective."""
    waiting = [rank for rank in snapshot.ranks if rank.waits and rank is not besides]
    return f"; waiting: {names(waiting)}" if waiting else ""
