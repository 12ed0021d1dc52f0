"""What a session is doing, as tables: its participants, and the cursors of its lanes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from launcher.console.text import seconds, table
from launcher.hang.snapshot import Facts, LaneState, Participant

_HEAD = ("", "who", "pid", "GPU", "phase", "for", "step", "seq", "beat", "process")


def head(facts: Facts, name: str, run: str) -> str:
    """One line: which session this is."""
    called = f"{name} ({facts.session_id[:8]})" if name else facts.session_id[:8]
    again = f", generation {facts.generation}" if facts.generation > 1 else ""
    return f"session {called}{again}, {'keeper' if facts.kept else 'launcher'} pid {facts.launcher_pid}, run {run}"


def participants(facts: Facts, suspects: Collection[str] = ()) -> str:
    """A row for each teacher and rank; suspects are marked."""
    rows = [_row(one, ">" if one.who in suspects else "") for one in facts.participants]
    return _aligned([_HEAD, *rows], right={2, 3, 5, 6, 7, 8})


def rings(facts: Facts) -> str:
    """A row for each lane: its cursors, and the age of the oldest request that is not answered."""
    streamed = any(lane.chunks for lane in facts.lanes)
    head = ["", "lane", "depth", "requested", "replied", "released", "abandoned"]
    head += ["chunks", "streamed", "consumed"] if streamed else []
    rows = [_lane(lane, streamed) for lane in facts.lanes]
    return _aligned([[*head, "oldest unanswered"], *rows], right=set(range(2, len(head) + 1))) if rows else ""


def page(facts: Facts, name: str, run: str) -> str:
    """All of it, as `shmbridge-launch status` shows it."""
    return "\n\n".join(part for part in (head(facts, name, run), participants(facts), rings(facts)) if part)


def _row(one: Participant, mark: str) -> tuple[str, ...]:
    return (
        mark,
        one.who,
        str(one.pid or "-"),
        one.gpu or "-",
        phase(one),
        seconds(one.phase_s) if one.attached else "",
        "" if one.step is None else str(one.step),
        "" if one.sequence is None else str(one.sequence),
        "" if one.heartbeat_s is None or not one.open else seconds(one.heartbeat_s),
        one.process if one.open or one.process not in ("gone", "zombie") else "ended",
    )


def phase(one: Participant) -> str:
    """`training`, `loading 3/4`, `training: eval (12.0 s left)`."""
    if not one.attached:
        return "not attached"
    if one.total and not one.ready:
        return f"{one.phase} {one.done}/{one.total}"
    if not one.declared:
        return one.phase
    name = one.declared if len(one.declared) <= 20 else f"{one.declared[:17]}..."
    left = f"{seconds(abs(one.declared_left_s))} {'over' if one.declared_left_s < 0 else 'left'}"
    return f"{one.phase}: {name} ({left})"


def _lane(lane: LaneState, streamed: bool) -> tuple[str, ...]:
    cursors = [lane.depth, lane.requested, lane.replied, lane.released, lane.abandoned]
    cursors += [lane.chunks, lane.streamed, lane.consumed] if streamed else []
    age = "" if lane.oldest_s is None else seconds(lane.oldest_s)
    note = " garbled" if lane.garbled else " closed" if lane.closed else " full" if lane.full else ""
    return ("", f"rank {lane.rank}{note}", *map(str, cursors), age)


def _aligned(rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """A table whose first column is a mark, with numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.rjust(widths[i]) if i in right else cell for i, cell in enumerate(row)] for row in rows]
    return table([[f"{row[0]:1} {row[1]}", *row[2:]] for row in cells], indent="")
