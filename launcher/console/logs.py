"""Follows the jobs' log files and shows their lines. The jobs write to files, so nothing here can block them."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict, deque
from pathlib import Path

from launcher.console.terminal import Console

KEPT_LINES = 20
_CHUNK = 2**20
_LONGEST_LINE = 64 * 1024
_LONGEST_TRACEBACK = 200
# Unfinished lines: how often a progress bar is drawn again on a terminal, and printed elsewhere; how long a line without a
# carriage return must stand still to be a prompt.
_REDRAW_S, _REPRINT_S, _PROMPT_S = 1.0, 10.0, 0.5
_TRACEBACK = "Traceback (most recent call last):"
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
        self.traceback: list[str] = []  # the last one that went by
        self.unfinished, self.is_bar, self.changed_at = "", False, 0.0
        self.shown = ""
        self.shown_at: float | None = None
        self._file: int | None = None
        self._rest = b""
        self._in_traceback = False
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
        return [self._decode(line) for line in lines]

    def _decode(self, line: bytes) -> str:
        """The line as text. A traceback is kept, since later lines would push it out of the last lines."""
        text = _last_state(line).decode(errors="replace")
        bare = _PREFIX.sub("", _COLOUR.sub("", text))
        if bare.endswith(_TRACEBACK):
            self.traceback, self._in_traceback = [], True
        if self._in_traceback and len(self.traceback) < _LONGEST_TRACEBACK:
            self.traceback.append(bare)
            if bare and not bare.startswith(" ") and not bare.endswith(_TRACEBACK):
                self._in_traceback = False
        return text


def _last_state(line: bytes) -> bytes:
    """What a terminal would show of a line with carriage returns."""
    return next((state for state in reversed(line.split(b"\r")) if state), b"")


class Logs:
    """The log files of a run, by source: teacher (or teacher 0, teacher 1, ...), torchrun, rank 0, rank 1, ..."""

    def __init__(self, console: Console, ranks_below: Path, ranks: int) -> None:
        """`ranks_below` is torchrun's --log-dir, in which the logs of `ranks` ranks will appear."""
        self._console = console
        self._ranks_below = ranks_below
        self._missing = 2 * ranks
        self._tails: list[Tail] = []
        self._last: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT_LINES))  # by source

    def follow(self, source: str, path: Path, *, from_end: bool = False) -> None:
        """`from_end`: only what is written from now on."""
        self._tails.append(Tail(source, path, from_end=from_end))

    def expect(self, ranks: int) -> None:
        """The logs of `ranks` more ranks will appear."""
        self._missing += 2 * ranks

    def pump(self) -> bool:
        """Show what was written since the last call. Returns whether anything was."""
        self._discover()
        shown = [self._show(tail, tail.read()) for tail in self._tails]
        for tail in self._tails:
            self._show_unfinished(tail, time.monotonic())
        self._flush()
        return any(shown)

    def finish(self) -> None:
        """Show the rest of all files."""
        self._discover()
        for tail in self._tails:
            self._show(tail, tail.finish())
        self._flush()

    def last_lines(self, source: str) -> list[str]:
        """The last traceback of the source, else its last lines."""
        traces = [tail.traceback for tail in self._tails if tail.source == source and tail.traceback]
        return traces[-1] if traces else list(self._last[source])

    def paths(self, source: str) -> list[Path]:
        return [tail.path for tail in self._tails if tail.source == source]

    def _flush(self) -> None:
        if self._console.redraws:
            self._console.draw_below([(tail.source, tail.shown) for tail in self._tails if tail.shown])
        self._console.flush()

    def _show(self, tail: Tail, lines: list[str]) -> bool:
        """Whether there were any."""
        self._last[tail.source].extend(lines)
        if not lines:
            return False
        shown, tail.shown, tail.shown_at = tail.shown, "", None
        if lines[0] == shown and not self._console.redraws:  # it is printed already
            del lines[0]
        for line in lines:
            self._console.line(tail.source, line)
        return True

    def _show_unfinished(self, tail: Tail, now: float) -> None:
        """Draw or print a progress bar from time to time, and a prompt once it has not changed for a while."""
        redraws = self._console.redraws
        every_s = _REDRAW_S if redraws else _REPRINT_S
        if tail.shown_at is None and tail.unfinished:
            tail.shown_at = now - _REDRAW_S if redraws else now
        if tail.shown_at is None or tail.unfinished == tail.shown:
            return
        if now - tail.shown_at >= every_s if tail.is_bar else now - tail.changed_at >= _PROMPT_S:
            tail.shown, tail.shown_at = tail.unfinished, now
            if tail.shown and not redraws:
                self._console.line(tail.source, tail.shown)

    def _discover(self) -> None:
        """torchrun makes LOG_DIR/RUN_ID/attempt_0/LOCAL_RANK/{stdout,stderr}.log."""
        if not self._missing:
            return
        known = {tail.path for tail in self._tails}
        for path in sorted(self._ranks_below.glob("*/attempt_*/*/std*.log")):
            if path not in known:
                self.follow(f"rank {path.parent.name}", path)
                self._missing -= 1
