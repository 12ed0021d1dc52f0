"""The terminal: one aligned, coloured prefix per source. A terminal that went away ends nothing."""

from __future__ import annotations

import os
import sys
from typing import TextIO

LAUNCHER = "launcher"
_PREFIX_WIDTH = len("[launcher]")
_DIM, _TEACHER, _RANKS = "2", "35", ("36", "32", "33", "34", "96", "92", "93", "94")


class Console:
    """Writes whole lines. Colours where the stream is a terminal and NO_COLOR is not set."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._coloured = self._stream.isatty() and not os.environ.get("NO_COLOR")
        self._open = True

    def say(self, text: str) -> None:
        """A line of the launcher's own."""
        self.line(LAUNCHER, text)

    def line(self, source: str, text: str) -> None:
        """`[source] text`, once per line of `text`."""
        prefix = f"[{source}]".ljust(_PREFIX_WIDTH)
        if self._coloured:
            prefix = f"\033[{_colour(source)}m{prefix}\033[0m"
        self.write("".join(f"{prefix} {line}".rstrip() + "\n" for line in text.split("\n")))

    def write(self, text: str) -> None:
        """`text` as it is."""
        if not self._open:
            return
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self._stream.write(text.encode("ascii", "backslashreplace").decode())
        except OSError:
            self._lose()

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """Whoever read the output has gone (`| head`, a closed terminal): the run goes on, its logs are in files."""
        self._open = False
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, self._stream.fileno())
        os.close(void)


def _colour(source: str) -> str:
    kind, _, number = source.partition(" ")
    if kind == "rank":
        return _RANKS[int(number) % len(_RANKS)]
    return _TEACHER if kind == "teacher" else _DIM
