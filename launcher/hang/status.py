"""What a session is doing, as tables: its participants, and the cursors of its lanes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from launcher.console.text import seconds, table
from launcher.hang.snapshot import LaneState, Participant, Snapshot

_HEAD = ("", "who", "pid", "GPU", "phase", "for", "step", "seq", "beat", "process")


def head(snapshot: Snapshot, name: str, run: str) -> str:
    """One line: which session this is."""
    called = f"{name} ({snapshot.session_id[:8]})" if name else snapshot.session_id[:8]
    again = f", generation {snapshot.generation}" if snapshot.generation > 1 else ""
    return (
        f"session {called}{again}, {'keeper' if snapshot.kept else 'launcher'} pid {snapshot.launcher_pid}, run {run}"
    )


def participants(snapshot: Snapshot, suspects: Collection[str] = ()) -> str:
    """A row for each teacher and rank; suspects are marked."""
    rows = [_row(participant, ">" if participant.who in suspects else "") for participant in snapshot.participants]
    return _aligned([_HEAD, *rows], right={2, 3, 5, 6, 7, 8})


def rings(snapshot: Snapshot) -> str:
    """A row for each lane: its cursors, the age of the oldest request that is not answered, and its state."""
    streamed = any(lane.chunks for lane in snapshot.lanes)
    head = ["", "lane", "depth", "requested", "replied", "released", "abandoned"]
    head += ["chunks", "streamed", "consumed"] if streamed else []
    rows = [_lane(lane, streamed) for lane in snapshot.lanes]
    return _aligned([[*head, "oldest unanswered", "state"], *rows], right=set(range(2, len(head) + 1))) if rows else ""


def page(snapshot: Snapshot, name: str, run: str) -> str:
    """All of it, as `shmbridge-launch status` shows it."""
    return "\n\n".join(part for part in (head(snapshot, name, run), participants(snapshot), rings(snapshot)) if part)


def _row(participant: Participant, mark: str) -> tuple[str, ...]:
    return (
        mark,
        participant.who,
        str(participant.pid or "-"),
        participant.gpu or "-",
        participant.activity,
        seconds(participant.phase_s) if participant.attached else "",
        "" if participant.step is None else str(participant.step),
        "" if participant.sequence is None else str(participant.sequence),
        "" if participant.heartbeat_s is None or not participant.open else seconds(participant.heartbeat_s),
        participant.process if participant.open or participant.alive else "ended",
    )


def _lane(lane: LaneState, streamed: bool) -> tuple[str, ...]:
    cursors = [lane.depth, lane.requested, lane.replied, lane.released, lane.abandoned]
    cursors += [lane.chunks, lane.streamed, lane.consumed] if streamed else []
    age = "" if lane.oldest_s is None else seconds(lane.oldest_s)
    state = "garbled" if lane.garbled else "closed" if lane.closed else "full" if lane.full else "open"
    return ("", f"rank {lane.rank}", *map(str, cursors), age, state)


def _aligned(rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """A table whose first column is a mark, with numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.rjust(widths[i]) if i in right else cell for i, cell in enumerate(row)] for row in rows]
    return table([[f"{row[0]:1} {row[1]}", *row[2:]] for row in cells], indent="")
