"""Who is waited for: from the facts of a session to one sentence and what to do next. Pure.

The rules stand in their order: what is the matter with a process comes before what is the matter with a loop, and who owes
something on the bridge before who stands in a collective of the training's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from launcher.console.text import listed, seconds
from launcher.hang import places
from launcher.hang.places import Place
from launcher.hang.snapshot import GONE, Facts, LaneState, Participant, called
from shmbridge.shm.status import Phase

HEALTHY = ("closed", "moving")  # the kinds of verdict of a session in which nothing hangs
STALE_S = 5.0  # a heartbeat comes every second
STILL_S = 5.0  # who has moved within so many seconds does not hang; less where timeouts.report_s is short

_DECLARE = 'If this is an evaluation or a save, say so: `with bridge.phase("eval", timeout=900):`.'


class Verdict(msgspec.Struct, frozen=True):
    """What a hang report says first."""

    kind: str
    sentence: str
    action: str
    suspects: tuple[str, ...] = ()  # whose stacks come first


def of(facts: Facts) -> Verdict:
    """The first rule that fits."""
    return next(verdict for rule in _RULES if (verdict := rule(facts)))


# What is the matter with a process


def _garbled(facts: Facts) -> Verdict | None:
    for lane in facts.lanes:
        if lane.garbled:
            action = "Something wrote into shared memory that is not its own; end the run and keep its logs."
            return Verdict(
                "garbled", f"rank {lane.rank}'s lane is garbled: {lane.garbled}", action, (f"rank {lane.rank}",)
            )
    return None


def _gone(facts: Facts) -> Verdict | None:
    those = [one for one in facts.participants if one.open and one.process in GONE]
    if not those:
        return None
    sentence = (
        f"{called(those)} {_is(those)} dead: {_pids(those)} ended without closing the bridge, in phase {_phases(those)}"
    )
    return _verdict(
        "dead",
        sentence,
        "Its log tells why it ended; the launcher ends the run, or restarts what may be restarted.",
        those,
    )


def _stopped(facts: Facts) -> Verdict | None:
    those = [one for one in facts.participants if one.process == "stopped" and _matters(one)]
    if not those:
        return None
    pids = " ".join(str(one.pid) for one in those)
    sentence = f"{called(those)} ({_pids(those)}) {_is(those)} stopped, not dead (SIGSTOP, Ctrl-Z or a debugger)"
    action = f"Resume with `kill -CONT {pids}`, and the run goes on; or end it with `kill -KILL {pids}`."
    return _verdict("stopped", sentence + _who_waits(facts, those), action, those)


def _stalled(facts: Facts) -> Verdict | None:
    those = [one for one in facts.participants if _matters(one) and (one.heartbeat_s or 0.0) > STALE_S]
    those = [one for one in those if not one.excused]
    if not those:
        return None
    first = those[0]
    assert first.heartbeat_s is not None
    told = (
        "native code holds the GIL" if first.process == "running" else "native code holds the GIL, or the process swaps"
    )
    sentence = f"{called(those)} {_verb(those, 'have')} not run Python for {seconds(first.heartbeat_s)}{_comma_at(first)}: {told}"
    action = "Look at the native call on top of its stack; in a loop of your own, release the GIL or leave it out. `vmstat 1` shows swapping."
    return _verdict("stalled", sentence + _who_waits(facts, those), action, those)


# Startup


def _loading(facts: Facts) -> Verdict | None:
    late = [one for one in facts.teachers if not one.ready]
    if not late or (not any(one.open for one in facts.ranks) and not any(one.attached for one in late)):
        return None
    parts = [_loads(one) for one in late]
    waiting = [one for one in facts.ranks if one.phase in (str(Phase.BARRIER), str(Phase.WAITING))]
    waits = f"; {called(waiting)} {_verb(waiting, 'wait')} for it" if waiting else ""
    action = "Its log tells how far it is. timeouts.startup_s bounds the wait."
    return _verdict("loading", "; ".join(parts) + waits, action, late)


def _loads(one: Participant) -> str:
    if not one.attached:
        return f"{called([one])} has not attached yet"
    share = f" ({one.done} of {one.total})" if one.total else ""
    return f"{called([one])} is not ready: in phase {one.phase}{share} for {seconds(one.phase_s)}{_comma_at(one)}"


def _moving(facts: Facts) -> Verdict | None:
    those = [one for one in facts.participants if one.open]
    if not those:
        return Verdict(
            "closed", "No participant is at work: all have closed, or none has attached.", "Nothing to do here."
        )
    ranks = [one for one in those if one in facts.ranks] or those
    if any(one.still_s >= facts.patience_s for one in ranks):
        return None
    latest = max(one.still_s for one in ranks)
    sentence = f"nothing hangs: {_every(ranks)} moved within the last {seconds(latest)}"
    return Verdict("moving", sentence, "Nothing to do; ask again while it stands still.")


# Who owes something on the bridge


def _slow(facts: Facts) -> Verdict | None:
    waiting = _lanes_in(facts, Phase.FORWARD)
    if not waiting:
        return None
    slow = _teachers_of(facts, waiting)
    told = f"for {seconds(slow[0].phase_s)}{_comma_at(slow[0])}"
    sentence = f"{called(slow)} {_is(slow)} alive and in {_its(slow)} forward {told}"
    action = "Wait, or lower teacher.max_batch_tokens; the first forwards of a compiled model take this long once."
    return _verdict("slow", f"{sentence}; {_wait_for(facts, waiting)}", action, slow)


def _missing(facts: Facts) -> Verdict | None:
    those = [one for one in facts.ranks if not one.attached]
    if not those:
        return None
    there = f" ({_pids(those)}{_comma_at(those[0])})" if all(one.pid for one in those) else ""
    others = [one for one in facts.ranks if one.open]
    sentence = f"{called(those)}{there} {_verb(those, 'have')} not attached to the session"
    if not others:
        action = "It has not come to shmbridge.connect(): its stack, or its log, tells where it is."
        return _verdict("missing", f"{sentence}; nobody waits for it on the bridge yet", action, those)
    action = "Every rank calls shmbridge.connect(); where one does not come to it, its stack or its log tells why."
    return _verdict("missing", f"{sentence}; {_standing(others)}", action, those)


def _lockstep(facts: Facts) -> Verdict | None:
    """The teacher waits for a request of every lane before it answers any."""
    waiting = _lanes_in(facts, Phase.COLLECTING)
    teachers = {lane.teacher for lane in waiting}
    owing = {
        lane.rank
        for lane in facts.lanes
        if lane.teacher in teachers and not lane.unanswered and not lane.closed and not lane.garbled
    }
    late = [one for one in facts.ranks if one.rank in owing and one.process not in GONE]
    if not facts.lockstep or not late:
        return None
    request = "request" if len(late) == 1 else "requests"
    owed = f"the teacher waits for {called(late)}'s {request} (teacher.collect is lockstep)"
    ranks = [one for one in facts.ranks if one.rank in {lane.rank for lane in waiting}]
    sentence = f"{_standing(late)}; {called(ranks)} {_verb(ranks, 'wait')} for the teacher, {owed}"
    if any(one.excused for one in late):
        action = f"Nothing, while {called(late)} keeps to what it has declared."
    else:
        action = "Make the same requests in every rank between two collectives, or set teacher.collect=greedy."
    return _verdict("lockstep", sentence, action, late)


def _unread(facts: Facts) -> Verdict | None:
    """A streamed reply that its rank does not read: the teacher has no chunk left for it."""
    lanes = [lane for lane in facts.lanes if lane.unanswered and lane.chunks_full and not lane.closed]
    late = [one for one in facts.ranks if one.rank in {lane.rank for lane in lanes} and one.phase != str(Phase.WAITING)]
    if not late:
        return None
    sentence = (
        f"{called(late)} {_verb(late, 'do')} not read what the teacher streams (all chunks are full): {_standing(late)}"
    )
    action = "Read the chunks, or cancel the request (pending.cancel); the reply goes on as they are given back."
    return _verdict("unread", sentence, action, late)


def _unserved(facts: Facts) -> Verdict | None:
    waiting = [lane for lane in facts.lanes if _is_late(lane, facts.patience_s)]
    ranks = [one for one in facts.ranks if one.rank in {lane.rank for lane in waiting}]
    if not waiting or not ranks:
        return None
    teachers = _teachers_of(facts, waiting)
    state = (
        f"{called(teachers)} {_is(teachers)} in phase {_phases(teachers)}{_comma_at(teachers[0]) if teachers else ''}"
    )
    action = "A teacher that collects should have taken it: keep this report, and end the run."
    return _verdict("unserved", f"{_wait_for(facts, waiting)}, and {state}", action, teachers)


# Nobody owes anything on the bridge: the training's own collectives


def _apart(facts: Facts) -> Verdict | None:
    """Ranks at different places, some of them in a collective."""
    ranks = [one for one in facts.ranks if one.open]
    groups = _by_collective(ranks)
    if len(groups) < 2:
        return None
    smallest = min(len(group) for group in groups.values())
    few = [key for key, group in groups.items() if len(group) == smallest]
    elsewhere = "" in few and smallest * 2 <= len(ranks)
    suspects = groups[""] if elsewhere else groups[few[0]] if len(few) == 1 else ranks
    others = [one for one in ranks if one not in suspects]
    if not others:
        sentence = f"the ranks wait for each other: {_standing(ranks)}"
    elif elsewhere:
        sentence = f"{_standing(suspects)}; {_standing(others, with_time=False)} and {_verb(others, 'wait')} for {_it(suspects)}"
    else:
        sentence = f"{_standing(suspects)}, alone; {_standing(others)}"
    if any(one.excused for one in suspects):
        action = f"Nothing, while {called(suspects)} keeps to what it has declared."
    else:
        action = "A collective needs every rank: look for one that only some ranks come to (`if rank == 0:`, uneven batches, an error that was caught)."
    return _verdict("collective", sentence, action, suspects)


def _together(facts: Facts) -> Verdict | None:
    """All ranks at one collective."""
    ranks = [one for one in facts.ranks if one.open]
    groups = _by_collective(ranks)
    if len(ranks) < 2 or set(groups) in (set(), {""}):
        return None
    action = "No rank is missing here: look at the network and the GPUs (`nvidia-smi`, dmesg), at NCCL_DEBUG=INFO, and at ranks on other machines."
    return _verdict("collective", f"the collective does not end: {_standing(ranks)}", action, ranks)


def _still(facts: Facts) -> Verdict:
    """What is left: ranks at work of their own."""
    ranks = [one for one in facts.ranks if one.open] or [one for one in facts.participants if one.open]
    waiting = [one for one in ranks if (place := places.of(one.stacks)) and place.kind in (places.DATA, places.GPU)]
    those = waiting or [one for one in ranks if one.still_s >= facts.patience_s] or ranks
    sentence = f"nobody waits for the bridge: {_standing(those)}"
    if all(one.excused for one in those):
        return _verdict("declared", sentence, "Nothing, while they keep to what they have declared.", those)
    if waiting:
        action = "Look at what it waits for: the DataLoader's workers (see the processes below it), or the GPU."
        return _verdict("waits", sentence, action, those)
    return _verdict("still", sentence, f"The stacks tell what they do. {_DECLARE}", those)


_RULES: tuple[Callable[[Facts], Verdict | None], ...] = (
    *(_garbled, _gone, _stopped, _stalled),
    *(_loading, _moving),
    *(_slow, _lockstep, _missing, _unread, _unserved),
    *(_apart, _together, _still),
)


# Words


def _verdict(kind: str, sentence: str, action: str, suspects: Sequence[Participant]) -> Verdict:
    return Verdict(kind, sentence, action, tuple(one.who for one in suspects))


def _matters(one: Participant) -> bool:
    return one.open or (not one.attached and one.pid != 0)


def standing(one: Participant) -> str:
    """`at barrier() in save (checkpoint.py:41)`, after the phase that the script has declared."""
    place = places.of(one.stacks)
    parts = []
    if one.declared:
        over = one.declared_left_s < 0
        parts.append(
            f"in its declared phase {one.declared} ({seconds(abs(one.declared_left_s))} {'over' if over else 'left'})"
        )
    if place and place.kind != places.BRIDGE:
        parts.append(str(place))
    return ", ".join(parts) or f"in phase {one.phase}"


def _standing(those: Sequence[Participant], with_time: bool = True) -> str:
    """Those at one place together: `ranks 0 and 1 are at all_reduce() in step (train.py:8) for 41 s; rank 2 ...`."""
    groups: dict[str, list[Participant]] = {}
    for one in those:
        groups.setdefault(standing(one), []).append(one)
    parts = []
    for where, group in groups.items():
        still_s = min(one.still_s for one in group)
        time = f" for {seconds(still_s)}" if with_time and still_s != float("inf") else ""
        parts.append(f"{called(group)} {_is(group)} {where}{time}")
    return "; ".join(parts)


def _comma_at(one: Participant) -> str:
    place = places.of(one.stacks)
    return f", {place}" if place and place.kind != places.BRIDGE else ""


def _by_collective(ranks: Sequence[Participant]) -> dict[str, list[Participant]]:
    """Ranks by the collective that they are at, those elsewhere under an empty name; empty where none is at one."""
    groups: dict[str, list[Participant]] = {}
    for one in ranks:
        place = places.of(one.stacks)
        groups.setdefault(_key(place), []).append(one)
    return groups if set(groups) != {""} else {}


def _key(place: Place | None) -> str:
    return str(place) if place and place.kind in (places.COLLECTIVE, places.BACKWARD) else ""


def _lanes_in(facts: Facts, phase: Phase) -> list[LaneState]:
    """Lanes whose rank waits for a reply, and whose teacher is in `phase`."""
    there = {one.rank for one in facts.teachers if one.phase == str(phase)}
    return [lane for lane in facts.lanes if lane.unanswered and not lane.closed and lane.teacher in there]


def _is_late(lane: LaneState, patience_s: float) -> bool:
    return bool(lane.unanswered) and not lane.closed and (lane.oldest_s or 0.0) >= patience_s


def _teachers_of(facts: Facts, lanes: Sequence[LaneState]) -> list[Participant]:
    return [one for one in facts.teachers if one.rank in {lane.teacher for lane in lanes}]


def _who_waits(facts: Facts, those: Sequence[Participant]) -> str:
    """`; ranks 0 and 1 wait for it`, where that can be told."""
    served = {one.rank for one in those if one in facts.teachers}
    lanes = [lane for lane in facts.lanes if lane.unanswered and (facts.lockstep or lane.teacher in served)]
    ranks = {lane.rank for lane in lanes if f"rank {lane.rank}" not in {one.who for one in those}}
    waiting = [one for one in facts.ranks if one.rank in ranks]
    at = [one for one in facts.ranks if one not in those and one not in waiting and _key(places.of(one.stacks))]
    waiting += at
    return f"; {called(waiting)} {_verb(waiting, 'wait')} for {_it(those)}" if waiting else ""


def _wait_for(facts: Facts, lanes: Sequence[LaneState]) -> str:
    """`rank 0 waits for its reply for 41 s (sequence 7)`."""
    ranks = [one for one in facts.ranks if one.rank in {lane.rank for lane in lanes}]
    oldest = max(lanes, key=lambda lane: lane.oldest_s or 0.0)
    since = f" for {seconds(oldest.oldest_s)}" if oldest.oldest_s is not None else ""
    full = listed([f"rank {lane.rank}" for lane in lanes if lane.full])
    more = f", ring full of {full}" if full else ""
    gone = [f"rank {lane.rank}" for lane in lanes if lane.replied < lane.abandoned]
    more += f", abandoned by {listed(gone)}" if gone else ""
    return f"{called(ranks)} {_verb(ranks, 'wait')} for a reply{since} (sequence {oldest.replied}{more})"


def _every(ranks: Sequence[Participant]) -> str:
    return "every rank has" if len(ranks) > 1 else f"{called(ranks)} has"


def _phases(those: Sequence[Participant]) -> str:
    return listed(list(dict.fromkeys(one.phase for one in those)))


def _pids(those: Sequence[Participant]) -> str:
    return f"pid{'s' if len(those) > 1 else ''} {listed([str(one.pid) for one in those])}"


def _is(those: Sequence[Participant]) -> str:
    return "is" if len(those) == 1 else "are"


def _it(those: Sequence[Participant]) -> str:
    return "it" if len(those) == 1 else "them"


def _its(those: Sequence[Participant]) -> str:
    return "its" if len(those) == 1 else "their"


def _verb(those: Sequence[Participant], verb: str) -> str:
    if len(those) > 1:
        return verb
    return {"do": "does", "have": "has"}.get(verb, f"{verb}s")
