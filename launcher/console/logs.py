"""Follows the jobs' log files and shows their lines. The jobs write to files, so nothing here can block them."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

from launcher.console.terminal import Console
from shmbridge.errors import PeerLost

KEPT_LINES = 20
_CHUNK = 2**20
_LONGEST_LINE = 64 * 1024
_LONGEST_TRACEBACK = 200
# Unfinished lines: how often a progress bar is drawn again on a terminal, and printed elsewhere; how long a line without a
# carriage return must stand still to be a prompt, and a traceback that has no end yet to be shown without one.
_REDRAW_S, _REPRINT_S, _STILL_S = 1.0, 10.0, 0.5
_TRACEBACK = "Traceback (most recent call last):"
# What Python writes between the tracebacks of chained exceptions, with an empty line before and after it.
_CHAIN = re.compile(
    r"(The above exception was the direct cause of the following|During handling of the above) exception"
)
# In the traceback of an exception group: each line after the first, the exception, the end.
_GROUP_LINE, _GROUP, _GROUP_END = re.compile(r" +[|+]"), re.compile(r" +\| (\S.*)"), re.compile(r" +\+-+$")
# An exception that follows from what the report of the run tells.
_CONSEQUENCE = re.compile(rf"shmbridge\.errors\.({'|'.join(kind.__name__ for kind in PeerLost.__subclasses__())}):")
# What torchrun says of the ends of its ranks.
_ENDS = re.compile(r"[EW]\d{4} \S+ +\d+ torch/distributed/elastic/")
# Colours; the prefix of torchrun's --tee; torch's prefix on a rank's traceback.
_COLOUR = re.compile(r"\033\[[0-9;]*m")
# A nested tqdm bar goes down a line, draws itself and goes up again: a state like any other.
_NESTED_BAR = re.compile(rb"\n([^\n]*?)\033\[A")
_PREFIX = re.compile(r"^(?:\[(?!rank\d)\w+\d\]:)?(?:\[rank\d+\]: ?)?")


class Tail:
    """Reads a growing file by complete lines. A line with carriage returns, such as a progress bar, is reduced to its
    last state.

    `unfinished` is the last state of the line that has no end yet, and `changed_at` the monotonic time in seconds at
    which it changed; `is_bar` is True if it has carriage returns. `shown` is what is shown of it, since `shown_at`; None: it is new.
    """

    def __init__(self, source: str, path: Path, *, from_end: bool = False) -> None:
        """`from_end`: only what is written from now on."""
        self.source = source
        self.path = path
        self.unfinished, self.is_bar, self.changed_at = "", False, 0.0
        self.shown = ""
        self.shown_at: float | None = None
        self._file: int | None = None
        self._rest = b""
        self._begin = path.stat().st_size if from_end and path.exists() else 0

    def read(self) -> list[str]:
        """Lines that were completed since the last call. Reads at most 1 MiB."""
        return self._split(self._chunk())

    def finish(self) -> list[str]:
        """The rest of the file, including an incomplete last line."""
        lines: list[str] = []
        while chunk := self._chunk():
            lines += self._split(chunk)
        if self._rest:
            lines += self._split(b"\n")
        if self._file is not None:
            os.close(self._file)
            self._file = None
        return lines

    def _chunk(self) -> bytes:
        if self._file is None:
            try:
                self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return b""
            os.lseek(self._file, self._begin, os.SEEK_SET)
        return os.read(self._file, _CHUNK)

    def _split(self, chunk: bytes) -> list[str]:
        """The lines that `chunk` completes."""
        *lines, rest = _NESTED_BAR.sub(rb"\r\1\r", self._rest + chunk).split(b"\n")
        is_bar = b"\r" in rest
        if is_bar:  # what came before the last state is overwritten
            rest = b"\r" + _last_state(rest) + (b"\r" if rest.endswith(b"\r") else b"")
        self._rest = rest[-_LONGEST_LINE:]
        text = _last_state(self._rest).decode(errors="replace")
        if lines or text != self.unfinished:
            self.unfinished, self.is_bar, self.changed_at = text if text.strip() else "", is_bar, time.monotonic()
        return [_last_state(line).decode(errors="replace") for line in lines]


def _last_state(line: bytes) -> bytes:
    """What a terminal would show of a line with carriage returns."""
    return next((state for state in reversed(line.split(b"\r")) if state), b"")


class Logs:
    """The log files of a run, by source: teacher (or teacher 0, teacher 1, ...), torchrun, rank 0, rank 1, ...

    A traceback is shown a moment later than it is read. If the run has failed by then, or if it follows from the failure of another
    process, only its last line is shown: the launcher's report tells the cause, once, and the log file has the whole.
    """

    def __init__(self, console: Console, ranks_below: Path, ranks: int) -> None:
        """`ranks_below` is torchrun's --log-dir, in which the logs of `ranks` ranks will appear."""
        self.failed = False  # the run; the launcher will report it
        self._console = console
        self._ranks_below = ranks_below
        self._missing = 2 * ranks
        self._found: set[Path] = set()
        self._tails: list[Tail] = []
        self._last: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT_LINES))  # by source
        self._tracebacks: dict[str, list[str]] = {}  # the last one of each source
        self._held: dict[Tail, list[str]] = defaultdict(list)  # lines from the beginning of a traceback on

    def follow(self, source: str, path: Path, *, from_end: bool = False) -> None:
        """`from_end`: only what is written from now on."""
        self._tails.append(Tail(source, path, from_end=from_end))

    def expect(self, ranks: int) -> None:
        """The logs of `ranks` more ranks will appear."""
        self._missing += 2 * ranks

    def pump(self) -> bool:
        """Show what was written since the last call. Returns whether anything was."""
        self._discover()
        came = [self._show(tail, tail.read()) for tail in self._tails]
        for tail in self._tails:
            self._show_unfinished(tail, time.monotonic())
        self._flush()
        return any(came)

    def finish(self) -> None:
        """Show the rest of all files."""
        self._discover()
        for tail in self._tails:
            self._show(tail, tail.finish(), last=True)
        self._flush()

    def last_lines(self, source: str) -> list[str]:
        """The last traceback of the source, and its last lines where these came later."""
        traceback, last = self._tracebacks.get(source, []), list(self._last[source])
        if not traceback or self._ends_in_traceback(source):
            return traceback or last
        return [*traceback, "...", *last]

    def raised(self, source: str) -> str:
        """The exception of the traceback that is among the last lines of the source; empty where none is, or a group's."""
        error = self._tracebacks[source][-1] if self._ends_in_traceback(source) else ""
        return "" if error.startswith(" ") else error

    def _ends_in_traceback(self, source: str) -> bool:
        traceback = self._tracebacks.get(source, [])
        return bool(traceback) and traceback[-1] in map(_bare, self._last[source])

    def paths(self, source: str) -> list[Path]:
        """Its files that are not empty."""
        paths = [tail.path for tail in self._tails if tail.source == source]
        return [path for path in paths if path.exists() and path.stat().st_size]

    def _flush(self) -> None:
        if self._console.redraws:
            self._console.draw_below([(tail.source, tail.shown) for tail in self._tails if tail.shown])
        self._console.flush()

    def _show(self, tail: Tail, came: list[str], last: bool = False) -> bool:
        """Show lines but for those that are held until the next call, unless it is the `last`. Whether there were any."""
        self._last[tail.source].extend(came)
        held = self._held.pop(tail, [])
        lines = [*held, *came]
        if not lines:
            return False
        shown, tail.shown, tail.shown_at = tail.shown, "", None
        if lines[0] == shown and not self._console.redraws:  # it is printed already
            del lines[0]
        at = 0
        while at < len(lines):
            traceback, error = _traceback(lines, at)
            folds = error and (self.failed or _CONSEQUENCE.match(error))
            grows = at + len(traceback) > len(held)
            grows = grows or (not error and time.monotonic() - tail.changed_at < _STILL_S)
            if traceback and grows and not folds and not last and len(traceback) < _LONGEST_TRACEBACK:
                self._held[tail] = lines[at:]
                break
            if traceback:
                self._tracebacks[tail.source] = [_bare(line) for line in traceback]
            told = f"{error} [traceback: {tail.path}]"
            for line in [told] if folds else traceback or [lines[at]]:
                if not (self.failed and _ENDS.match(line)):
                    self._console.line(tail.source, line)
            at += len(traceback) or 1
        return True

    def _show_unfinished(self, tail: Tail, now: float) -> None:
        """Draw or print a progress bar from time to time, and a prompt once it has not changed for a while."""
        redraws = self._console.redraws
        every_s = _REDRAW_S if redraws else _REPRINT_S
        if tail.shown_at is None and tail.unfinished:
            tail.shown_at = now - _REDRAW_S if redraws else now
        if tail.shown_at is None or tail.unfinished == tail.shown:
            return
        if now - tail.shown_at >= every_s if tail.is_bar else now - tail.changed_at >= _STILL_S:
            tail.shown, tail.shown_at = tail.unfinished, now
            if tail.shown and not redraws:
                self._console.line(tail.source, tail.shown)

    def _discover(self) -> None:
        """torchrun makes LOG_DIR/RUN_ID/attempt_0/LOCAL_RANK/{stdout,stderr}.log. They get short names, LOG_DIR/rank0.stderr.log."""
        if not self._missing:
            return
        for path in sorted(self._ranks_below.glob("*/attempt_*/*/std*.log")):
            if path not in self._found:
                self._found.add(path)
                self.follow(f"rank {path.parent.name}", self._linked(path))
                self._missing -= 1

    def _linked(self, path: Path) -> Path:
        """A link to `path` with a short name, such as rank0-2.stderr.log for the second generation; `path` where there are no links."""
        for nth in itertools.count(1):
            link = self._ranks_below / f"rank{path.parent.name}{f'-{nth}' if nth > 1 else ''}.{path.name}"
            try:
                link.symlink_to(path.relative_to(self._ranks_below))
            except FileExistsError:
                continue
            except OSError:
                return path
            return link
        raise AssertionError


def _bare(line: str) -> str:
    """Without colours, and without what torchrun and torch put in front."""
    return _PREFIX.sub("", _COLOUR.sub("", line))


def _traceback(lines: Sequence[str], at: int) -> tuple[Sequence[str], str]:
    """The lines of the traceback that begins at `at`, with those that are chained to it, and its exception.

    Without lines none begins there; without an exception its end has not come.
    """
    if not _bare(lines[at]).endswith(_TRACEBACK):
        return [], ""
    of_group, error, end = "Exception Group" in lines[at], "", at + 1
    while end < len(lines):
        bare = _bare(lines[end])
        if of_group:
            found = _GROUP.match(bare)
            error = error or (found[1] if found else "")
            goes_on = end + 1 < len(lines) and _GROUP_LINE.match(_bare(lines[end + 1]))
            is_last = bool(_GROUP_END.match(bare) and not goes_on)
        else:
            error = bare
            is_last = not bare.startswith(" ") and bare != "" and not bare.endswith(_TRACEBACK)
        end += 1
        if not is_last:
            continue
        if end + 1 < len(lines) and _CHAIN.match(_bare(lines[end + 1])):
            later, error = _traceback(lines, end + 3) if end + 3 < len(lines) else ([], "")
            return [*lines[at : end + 3], *later], error
        return lines[at:end], error
    return lines[at:], ""
