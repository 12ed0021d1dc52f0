"""What a session is doing, as tables: its participants, and the cursors of its lanes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from launcher.console.text import seconds, table
from launcher.hang.snapshot import CHUNK_CURSORS, CURSORS, Snapshot

_HEAD: tuple[str, ...] = ("", "who", "pid", "GPU", "phase", "for", "step", "seq", "beat", "process")


def head(snapshot: Snapshot, name: str, run: str) -> str:
    """One line: which session this is."""
    called = f"{name} ({snapshot.session_id[:8]})" if name else snapshot.session_id[:8]
    again = f", generation {snapshot.generation}" if snapshot.generation > 1 else ""
    return (
        f"session {called}{again}, {'keeper' if snapshot.kept else 'launcher'} pid {snapshot.launcher_pid}, run {run}"
    )


def participants(snapshot: Snapshot, suspects: Collection[str] = ()) -> str:
    """A row for each teacher and rank; suspects are marked."""
    rows = [_HEAD]
    for one in snapshot.participants:
        mark = ">" if one.who in suspects else ""
        phase_s = seconds(one.phase_s) if one.attached else ""
        numbers = ("" if number is None else str(number) for number in (one.step, one.sequence))
        beat = "" if one.heartbeat_s is None or not one.open else seconds(one.heartbeat_s)
        state = one.process if one.open or one.alive else "ended"
        rows.append((mark, one.who, str(one.pid or "-"), one.gpu or "-", one.activity, phase_s, *numbers, beat, state))
    return _aligned(rows, right={2, 3, 5, 6, 7, 8})


def rings(snapshot: Snapshot) -> str:
    """A row for each lane: its cursors, the age of the oldest request that is not answered, and its state."""
    columns = ["depth", *CURSORS]
    if any(lane.chunks for lane in snapshot.lanes):
        columns += ["chunks", *CHUNK_CURSORS]
    rows = [("", "lane", *columns, "oldest unanswered", "state")]
    for lane in snapshot.lanes:
        age = "" if lane.oldest_s is None else seconds(lane.oldest_s)
        state = "garbled" if lane.garbled else "closed" if lane.closed else "full" if lane.full else "open"
        rows.append(("", f"rank {lane.rank}", *(str(getattr(lane, name)) for name in columns), age, state))
    return _aligned(rows, right=range(2, len(columns) + 3)) if snapshot.lanes else ""


def page(snapshot: Snapshot, name: str, run: str) -> str:
    """All of it, as `shmbridge-launch status` shows it."""
    return "\n\n".join(part for part in (head(snapshot, name, run), participants(snapshot), rings(snapshot)) if part)


def _aligned(rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """A table whose first column is a mark, with numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.rjust(widths[i]) if i in right else cell for i, cell in enumerate(row)] for row in rows]
    return table([[f"{row[0]:1} {row[1]}", *row[2:]] for row in cells], indent="")
