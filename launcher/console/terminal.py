"""Prints lines to the terminal, with an aligned, coloured prefix for each source. The run goes on when the terminal is
closed.

Unfinished lines, such as progress bars and prompts, are drawn below all others and redrawn in place. If the output is
not a terminal, `redraws` is False, and the source prints such a line from time to time.
"""

from __future__ import annotations

import os
import re
import select
import sys
import textwrap
import time
from typing import TextIO

LAUNCHER = "launcher"
_PREFIX_WIDTH = len("[launcher]")
_DIM, _TEACHER, _RANKS = "2", "35", ("36", "32", "33", "34", "96", "92", "93", "94")
_MOST_PENDING = 8 * 2**20
_CODES = re.compile(r"\033\[[0-9;?]*[A-Za-z]")  # colours and cursor movements


class Console:
    """Writes whole lines, in colour if the stream is a terminal and NO_COLOR is not set.

    Bytes are written to the file descriptor directly. Another program that shares it may have made it non-blocking; it
    then takes a part of the bytes or none, and Python's text streams would lose the rest.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        terminal = self._stream.isatty()
        self._coloured = terminal and not os.environ.get("NO_COLOR")
        self.redraws = terminal and os.environ.get("TERM") != "dumb"
        self._below: list[tuple[str, str]] = []  # unfinished lines: source and text
        self._drawn = 0  # how many of them the terminal shows
        try:
            self._stream.flush()
            self._fd: int | None = self._stream.fileno()
        except OSError:  # a stream in memory
            self._fd = None
        self._prefix_width = _PREFIX_WIDTH
        self._pending = bytearray()
        self._skipped = 0  # bytes, since the stream was last behind

    def expect(self, source: str) -> None:
        """Leave room for a longer name in front of every line."""
        self._prefix_width = max(self._prefix_width, len(f"[{source}]"))

    def say(self, text: str) -> None:
        """Print lines of the launcher at once; on a terminal, long ones are wrapped."""
        self.line(LAUNCHER, self._wrapped(text, self._size[0] - self._prefix_width - 1))
        self.flush()

    def page(self, text: str) -> None:
        """Lines without a prefix; on a terminal, long ones are wrapped."""
        self.write(self._wrapped(text, self._size[0]) + "\n")

    def _wrapped(self, text: str, columns: int) -> str:
        """A long line goes on below the second column, where it is a table's row. What is quoted, by four spaces, is left as it is."""
        lines = text.split("\n")
        if self.redraws:
            whole = textwrap.TextWrapper(max(40, columns), break_long_words=False, break_on_hyphens=False)
            for i, line in enumerate(lines):
                row = re.match(r" *\w+  +", line)
                whole.subsequent_indent = " " * row.end() if row else "  "
                lines[i] = line if line.startswith("    ") else whole.fill(line)
        return "\n".join(lines)

    @property
    def _size(self) -> tuple[int, int]:
        """Columns and rows; a terminal may not know them, as over a serial line."""
        try:
            columns, rows = os.get_terminal_size(self._fd if self._fd is not None else -1)
        except OSError:
            columns, rows = 0, 0
        return columns or 80, rows or 24

    def line(self, source: str, text: str) -> None:
        """`[source] text`, once per line of `text`."""
        prefix = self._prefix(source)
        self.write("".join(f"{prefix} {line}".rstrip() + "\n" for line in text.split("\n")))

    def draw_below(self, lines: list[tuple[str, str]]) -> None:
        """From the next flush on draw `[source] text` for each (source, text) below all lines, in place of those before."""
        if lines != self._below:
            self._erase()
            self._below = lines

    def _prefix(self, source: str) -> str:
        prefix = f"[{source}]".ljust(self._prefix_width)
        if not self._coloured:
            return prefix
        kind, _, number = source.partition(" ")
        colour = _RANKS[int(number) % len(_RANKS)] if kind == "rank" else _TEACHER if kind == "teacher" else _DIM
        return f"\033[{colour}m{prefix}\033[0m"

    def write(self, text: str) -> None:
        """`text` as it is."""
        self._erase()
        self._append(text)

    def _erase(self) -> None:
        if self._drawn:
            up = f"\033[{self._drawn - 1}A" if self._drawn > 1 else ""
            self._drawn = 0
            self._append(f"\r{up}\033[J")

    def _draw(self) -> None:
        """Draw the unfinished lines. The cursor stays behind the last one, where a user answers a prompt."""
        if self._drawn or not self._below:
            return
        columns, rows = self._size
        room = columns - self._prefix_width - 2
        in_order = sorted(self._below, key=lambda line: (len(line[0]), line[0]))
        shown = in_order[: max(1, rows // 2)]
        self._append("\n".join(f"{self._prefix(source)} {_CODES.sub('', text)[:room]}" for source, text in shown))
        self._drawn = len(shown)

    def _append(self, text: str) -> None:
        data = text.encode(self._stream.encoding or "utf-8", "backslashreplace")
        if len(self._pending) + len(data) > _MOST_PENDING:
            self._give()
        if len(self._pending) + len(data) > _MOST_PENDING:
            self._skipped += len(data)
        else:
            self._pending += data

    @property
    def behind(self) -> bool:
        """Whether the stream has not taken everything yet."""
        return bool(self._pending)

    def flush(self, patience_s: float = 0.0) -> None:
        """Write what the stream takes at once, or within `patience_s` if it is slow."""
        self._draw()
        self._give(patience_s)
        if self._skipped and not self._pending:
            skipped, self._skipped = self._skipped, 0
            self.say(f"{skipped} bytes are not shown here, where nobody read them; they are in the log files")

    def _give(self, patience_s: float = 0.0) -> None:
        if self._fd is None:
            self._stream.write(self._pending.decode(self._stream.encoding or "utf-8"))
            self._pending.clear()
            return
        deadline = time.monotonic() + patience_s
        try:
            while self._pending:
                try:
                    del self._pending[: os.write(self._fd, self._pending)]
                except BlockingIOError:
                    left_s = deadline - time.monotonic()
                    poll = select.poll()
                    poll.register(self._fd, select.POLLOUT)
                    if left_s <= 0 or not poll.poll(left_s * 1000):
                        return
        except OSError:  # the reader of the output is gone (`| head`, a closed terminal); the run goes on
            self._pending.clear()
            void = os.open(os.devnull, os.O_WRONLY)
            os.dup2(void, self._fd)
            os.close(void)
