"""The hang report: who is waited for, where everyone is, and every process's Python stacks.

What matters comes first: the findings and what to do, then the tables, then the stacks, those of the suspects on top.
The run directory gets the same as hang-1.txt, and everything that was seen as hang-1.json.
"""

from __future__ import annotations

import itertools
import os
import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from launcher.console.text import table
from launcher.hang import rules, snapshot, stacks, status
from launcher.hang.rules import Finding
from launcher.hang.snapshot import Participant, Snapshot, names
from launcher.hang.stacks import OURS, Frame, Stacks
from shmbridge.shm.session import MappedSession

_WIDTH = 118
_MOST_FINDINGS = 4
_MOST_THREADS = 6
_INSTALLED = re.compile(r"^.*/(?:(?:site|dist)-packages|lib/python3[.\d]*)/")


class Report(msgspec.Struct, frozen=True):
    """What was found at one moment."""

    at: str  # local time
    why: str  # what it was made for: who has been waited for how long, or that somebody asked
    name: str
    run: str
    verdict: Finding
    snapshot: Snapshot = msgspec.field(name="facts")
    also: list[Finding] = []  # others of the same kind
    path: str = ""  # of this report as text

    def __str__(self) -> str:
        kind = "report" if self.verdict.kind in rules.HEALTHY else "hang report"
        findings = [self.verdict, *self.also]
        rows = []
        for finding in findings[:_MOST_FINDINGS]:
            rows += [("", f"{finding.sentence}."), ("next    ", finding.action)]
        if len(findings) > _MOST_FINDINGS:
            rows.append(("", f"And {len(findings) - _MOST_FINDINGS} more, marked below."))
        rows += [("report  ", self.path)] if self.path else []
        suspects = {who for finding in findings for who in finding.suspects}
        groups: dict[object, list[Participant]] = {}  # those whose main threads are at the same place
        for one in sorted(self.snapshot.participants, key=lambda one: one.who not in suspects):
            if one.stacks.threads or one.stacks.missing:
                where = one.stacks.frames if one.stacks.threads else one.who
                groups.setdefault((where, one.who in suspects), []).append(one)
        parts = [
            f"{kind}, {self.at}: {self.why}\n{status.head(self.snapshot, self.name, self.run)}",
            "\n".join(_wrapped(text, head) for head, text in rows),
            status.participants(self.snapshot, suspects),
            status.rings(self.snapshot),
            "stacks, the innermost call first" if groups else "",
            *map(stack, groups.values()),
        ]
        return "\n\n".join(filter(None, parts))


def make(view: MappedSession, run: Path | None, why: str, name: str = "") -> Report:
    """Look at a session with the stacks of its processes; `run` is its directory. Takes a few seconds at most."""
    collected = stacks.collect(snapshot.identities(view), run)
    seen = snapshot.look(view, collected)
    first, *also = rules.verdict(seen)
    return Report(time.strftime("%H:%M:%S"), why, name, str(run) if run else "unknown", first, seen, also)


def write(report: Report, run: Path) -> Report:
    """hang-N.txt and hang-N.json in the run directory, N the next that is free; the report with its path.

    Raises:
        OSError: the directory is gone, or not writable.
    """
    for number in itertools.count(1):
        path = run / f"hang-{number}.txt"
        try:
            path.touch(0o644, exist_ok=False)
            break
        except FileExistsError:
            pass
    report = msgspec.structs.replace(report, path=str(path))
    path.write_text(f"{report}\n")
    path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return report


def stack(participants: Sequence[Participant]) -> str:
    """The stack of processes whose main threads are at the same place, or why there is none."""
    found = participants[0].stacks
    pids = ", ".join(str(participant.pid) for participant in participants)
    lines = [f"{names(participants)}, pid {pids}{' (by py-spy)' if found.source == 'py-spy' else ''}"]
    if found.frames:
        lines.append(table(list(_frames(found.frames))))
    elif not found.threads:
        lines.append(_wrapped(f"no stack: {found.missing or 'its process was not found'}"))
    lines += [f"  {line}" for line in _other_threads(found)]
    lines += [f"  in the kernel: {found.kernel}"] if found.kernel else []
    return "\n".join(lines)


def _wrapped(text: str, head: str = "") -> str:
    rest = " " * (2 + len(head))
    return textwrap.fill(
        text, _WIDTH, initial_indent=f"  {head}", subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _frames(frames: Sequence[Frame]) -> Iterator[tuple[str, str, str]]:
    """The user's own in full, with their source lines; of library frames in a row the first and the last."""
    for library, group in itertools.groupby(frames, lambda frame: frame.library):
        run = list(group)
        rows = [(frame.function, f"{_short(frame.file)}:{frame.line}", "" if library else frame.code) for frame in run]
        if library and len(run) > 3:
            packages = list(dict.fromkeys(_short(frame.file).split("/")[0].removesuffix(".py") for frame in run[1:-1]))
            rows[1:-1] = [("...", f"{len(run) - 2} more in {', '.join(packages[:3])}", "")]
        yield from rows


def _other_threads(found: Stacks) -> Iterator[str]:
    """A line for each: where it is, and in whose code outside the standard library."""
    others = [thread for thread in found.threads[1:] if thread.frames]
    others = [t for t in others if not any(f.ours and f.file.endswith("/heartbeat.py") for f in t.frames)]
    for thread in others[:_MOST_THREADS]:
        own = [frame for frame in thread.frames if "/lib/python3" not in frame.file or "-packages/" in frame.file]
        shown = dict.fromkeys((thread.frames[0], *own[:1]))
        yield f"{thread.name}: {' < '.join(f'{f.function} ({_short(f.file)}:{f.line})' for f in shown)}"
    if len(others) > _MOST_THREADS:
        yield f"and {len(others) - _MOST_THREADS} more threads; see the .json"


def _short(file: str) -> str:
    """Without where the libraries are installed, or the working directory."""
    return _INSTALLED.sub("", file).removeprefix(f"{os.getcwd()}/").removeprefix(f"{Path(OURS).parent}/")
