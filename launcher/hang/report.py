"""The hang report: who is waited for, where everyone is, and every process's Python stacks.

On the terminal what matters comes first: the verdict, what to do, the tables, then the stacks with the suspects' on top. The
run directory gets the same as hang-1.txt, and as hang-1.json with every fact.
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

from launcher.console import status
from launcher.hang import places, rules, snapshot
from launcher.hang.rules import Verdict
from launcher.hang.snapshot import Facts, Participant, View, called
from launcher.hang.stacks import Frame, Stacks, Thread, collect

_WIDTH = 118
_MOST_THREADS = 6
_INSTALLED = re.compile(r"^.*/(?:(?:site|dist)-packages|lib/python3[.\d]*)/")


class Report(msgspec.Struct, frozen=True):
    """What was found at one moment."""

    at: str  # local time
    why: str  # what it was made for: what has been owed for how long, or that somebody asked
    name: str
    run: str
    verdict: Verdict
    facts: Facts
    path: str = ""  # of this report as text

    def __str__(self) -> str:
        parts = [self._title(), self._verdict(), status.participants(self.facts, self.verdict.suspects)]
        return "\n\n".join(part for part in (*parts, status.rings(self.facts), self._stacks()) if part)

    def _title(self) -> str:
        kind = "report" if self.verdict.kind in rules.HEALTHY else "hang report"
        return f"{kind}, {self.at}: {self.why}\n{status.head(self.facts, self.name, self.run)}"

    def _verdict(self) -> str:
        sentence = self.verdict.sentence[:1].upper() + self.verdict.sentence[1:]
        rows = [("", sentence.rstrip(".") + "."), ("next    ", self.verdict.action)]
        rows += [("report  ", self.path)] if self.path else []
        return "\n".join(_wrapped(text, head) for head, text in rows)

    def _stacks(self) -> str:
        those = sorted(self.facts.participants, key=lambda one: one.who not in self.verdict.suspects)
        groups: dict[object, list[Participant]] = {}
        for one in those:
            if one.stacks.threads:
                groups.setdefault((one.stacks.threads[0].frames, one.who in self.verdict.suspects), []).append(one)
            elif one.stacks.missing:
                groups[one.who] = [one]
        return "\n\n".join(["stacks, the innermost call first", *map(_stack, groups.values())] if groups else [])


def make(view: View, run: Path | None, why: str, name: str = "") -> Report:
    """Collect stacks and facts of a session; `run` is its directory. Takes a few seconds at most."""
    collected = collect(snapshot.identities(view), run)
    patience_s = min(rules.STILL_S, view.settings.timeouts.report_s / 2)
    seen = msgspec.structs.replace(snapshot.look(view, collected), patience_s=patience_s)
    at = time.strftime("%H:%M:%S")
    return Report(at, why, name, str(run) if run else "unknown", rules.of(seen), seen)


def write(report: Report, run: Path) -> Report:
    """hang-N.txt and hang-N.json in the run directory, N the next that is free; the report with its path.

    Raises:
        OSError: the directory is gone, or not writable.
    """
    path = _reserve(run)
    report = msgspec.structs.replace(report, path=str(path))
    path.write_text(f"{report}\n")
    path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return report


def _reserve(run: Path) -> Path:
    for number in itertools.count(1):
        path = run / f"hang-{number}.txt"
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            continue
        return path
    raise AssertionError


def _wrapped(text: str, head: str) -> str:
    rest = " " * (2 + len(head))
    return textwrap.fill(
        text, _WIDTH, initial_indent=f"  {head}", subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


# Stacks as text


def _stack(those: Sequence[Participant]) -> str:
    """Of processes whose main threads are at the same place."""
    first = those[0]
    pids = ", ".join(str(one.pid) for one in those)
    lines = [
        f"{called(those).removeprefix('the ')}, pid{'s' if len(those) > 1 else ''} {pids}"
        + (" (by py-spy)" if first.stacks.source == "py-spy" else "")
    ]
    if first.stacks.missing:
        lines += textwrap.wrap(f"no stack: {first.stacks.missing}", _WIDTH, initial_indent="  ", subsequent_indent="  ")
    for thread in first.stacks.threads[:1]:
        lines += _frames(thread.frames)
    lines += [f"  {line}" for line in _other_threads(first.stacks)]
    if first.stacks.kernel:
        lines.append(f"  in the kernel: {first.stacks.kernel}")
    return "\n".join(lines)


def _frames(frames: Sequence[Frame]) -> Iterator[str]:
    """The user's own in full, with their source lines; of library frames in a row the first and the last."""
    rows: list[tuple[str, str, str]] = []
    for library, group in itertools.groupby(frames, places.is_library):
        run = list(group)
        if library and len(run) > 3:
            rows += [_row(run[0]), ("...", f"{len(run) - 2} more in {_packages(run[1:-1])}", ""), _row(run[-1])]
        else:
            rows += [_row(frame) for frame in run]
    width, at = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
    for function, where, code in rows:
        yield f"  {function.ljust(width)}  {where.ljust(min(at, 60))}  {code}".rstrip()


def _row(frame: Frame) -> tuple[str, str, str]:
    return frame.function, f"{short(frame.file)}:{frame.line}", "" if places.is_library(frame) else frame.code


def _other_threads(stacks: Stacks) -> Iterator[str]:
    others = [thread for thread in stacks.threads[1:] if thread.frames and not _is_heartbeat(thread)]
    for thread in others[:_MOST_THREADS]:
        yield f"{thread.name}: {_in_one_line(thread)}"
    if len(others) > _MOST_THREADS:
        yield f"and {len(others) - _MOST_THREADS} more threads; see the .json"


def _is_heartbeat(thread: Thread) -> bool:
    return any(places.is_ours(frame) and frame.file.endswith("/heartbeat.py") for frame in thread.frames)


def _in_one_line(thread: Thread) -> str:
    """Where it is, and in whose code."""
    shown = thread.frames[:1]
    own = next(
        (frame for frame in thread.frames if "/lib/python3" not in frame.file or "-packages/" in frame.file), None
    )
    if own and own not in shown:
        shown += (own,)
    return " < ".join(f"{frame.function} ({short(frame.file)}:{frame.line})" for frame in shown)


def _packages(frames: Sequence[Frame]) -> str:
    names = dict.fromkeys(short(frame.file).split("/")[0].removesuffix(".py") for frame in frames)
    return ", ".join(list(names)[:3])


def short(file: str) -> str:
    """Without where the libraries are installed, or the working directory."""
    text = _INSTALLED.sub("", file)
    if text == file and places.is_ours(Frame("", file, 0)):
        return f"shmbridge/{Path(file).name}"
    here = f"{os.getcwd()}/"
    return text.removeprefix(here)
