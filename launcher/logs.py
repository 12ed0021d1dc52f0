"""Follows the jobs' log files and shows their lines. The jobs write to files, so nothing here can block them."""

from __future__ import annotations

import os
import re
from collections import deque
from pathlib import Path

from launcher.console import Console

KEPT_LINES = 20
_CHUNK = 2**20
_LONGEST_LINE = 64 * 1024
_LONGEST_TRACEBACK = 200
_TRACEBACK = "Traceback (most recent call last):"
# Colours; the prefix of torchrun's --tee; torch's prefix on a rank's traceback.
_COLOUR = re.compile(r"\033\[[0-9;]*m")
_PREFIX = re.compile(r"^(?:\[(?!rank\d)\w+\d\]:)?(?:\[rank\d+\]: ?)?")


class Tail:
    """One growing file. Complete lines come out; of a line with carriage returns, only its last state."""

    def __init__(self, source: str, path: Path, *, from_end: bool = False) -> None:
        """`from_end`: only what is written from now on."""
        self.source = source
        self.path = path
        self.traceback: list[str] = []  # the last one that went by
        self._file: int | None = None
        self._rest = b""
        self._in_traceback = False
        self._begin = path.stat().st_size if from_end and path.exists() else 0

    def read(self) -> list[str]:
        """Lines that were completed since the last call, of at most 1 MiB."""
        return self._split(self._chunk())

    def _split(self, chunk: bytes) -> list[str]:
        """The lines that `chunk` completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            after = self._rest.rpartition(b"\r")[2]  # a progress bar: what came before is overwritten
            self._rest = after[-_LONGEST_LINE:]
        return [self._decode(line) for line in lines]

    def finish(self) -> list[str]:
        """What is left in the file, its last line complete or not."""
        lines: list[str] = []
        while chunk := self._chunk():
            lines += self._split(chunk)
        if self._rest:
            lines.append(self._decode(self._rest))
            self._rest = b""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        return lines

    def _chunk(self) -> bytes:
        if self._file is None:
            try:
                self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                os.lseek(self._file, self._begin, os.SEEK_SET)
            except FileNotFoundError:
                return b""
        return os.read(self._file, _CHUNK)

    def _decode(self, line: bytes) -> str:
        states = [state for state in line.split(b"\r") if state]
        text = states[-1].decode(errors="replace") if states else ""
        self._remember(_PREFIX.sub("", _COLOUR.sub("", text)))
        return text

    def _remember(self, line: str) -> None:
        """Keep the last traceback: a chatty log pushes it out of its last lines."""
        if line.endswith(_TRACEBACK):
            self.traceback, self._in_traceback = [], True
        if self._in_traceback and len(self.traceback) < _LONGEST_TRACEBACK:
            self.traceback.append(line)
            if line and not line.startswith(" ") and not line.endswith(_TRACEBACK):
                self._in_traceback = False


class Logs:
    """The log files of a run, by source: teacher (or teacher 0, teacher 1, ...), torchrun, rank 0, rank 1, ..."""

    def __init__(self, console: Console, ranks_below: Path, ranks: int) -> None:
        """`ranks_below` is torchrun's --log-dir, in which the logs of `ranks` ranks will appear."""
        self._console = console
        self._ranks_below = ranks_below
        self._missing = 2 * ranks
        self._tails: list[Tail] = []
        self._last: dict[str, deque[str]] = {}

    def follow(self, source: str, path: Path, *, from_end: bool = False) -> None:
        """`from_end`: only what is written from now on."""
        self._tails.append(Tail(source, path, from_end=from_end))
        self._last.setdefault(source, deque(maxlen=KEPT_LINES))

    def expect(self, ranks: int) -> None:
        """The logs of `ranks` more ranks will appear."""
        self._missing += 2 * ranks

    def pump(self) -> bool:
        """Show what was written since the last call. Returns whether there was anything."""
        self._discover()
        shown = 0
        for tail in self._tails:
            lines = tail.read()
            self._show(tail.source, lines)
            shown += len(lines)
        self._console.flush()
        return shown > 0

    def finish(self) -> None:
        """Show all that is left."""
        self._discover()
        for tail in self._tails:
            self._show(tail.source, tail.finish())
        self._console.flush()

    def last_lines(self, source: str) -> list[str]:
        """The last traceback of the source, else its last lines."""
        traces = [tail.traceback for tail in self._tails if tail.source == source and tail.traceback]
        return traces[-1] if traces else list(self._last.get(source, ()))

    def paths(self, source: str) -> list[Path]:
        return [tail.path for tail in self._tails if tail.source == source]

    def _show(self, source: str, lines: list[str]) -> None:
        self._last[source].extend(lines)
        for line in lines:
            self._console.line(source, line)

    def _discover(self) -> None:
        """torchrun makes LOG_DIR/RUN_ID/attempt_0/LOCAL_RANK/{stdout,stderr}.log."""
        if not self._missing:
            return
        known = {tail.path for tail in self._tails}
        for path in sorted(self._ranks_below.glob("*/attempt_*/*/std*.log")):
            if path not in known:
                self.follow(f"rank {path.parent.name}", path)
                self._missing -= 1
