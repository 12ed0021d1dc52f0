"""What a transport implements to take part.

The bench's process calls `prepare` and `close`; between them it forks one process that calls `teach` and one for each
rank that enters `rank`. A rank that leaves the `with` block tells the teacher, and `teach` returns when all have.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from benchmarks.cell import Ask, Cell, Model


class Contestant(Protocol):
    """One transport in one cell."""

    @property
    def name(self) -> str:
        """As the tables call it."""

    @property
    def ranked(self) -> bool:
        """False for a reference that only shows a limit."""

    def prepare(self, cell: Cell, model: Model, scratch: Path) -> None:
        """Create what must exist before the fork. `scratch` is an empty directory, removed by the bench."""

    def teach(self) -> None:
        """Answer every rank until all have left."""

    def rank(self, index: int) -> AbstractContextManager[Ask]:
        """Connect, and give what one request is made with."""

    def close(self) -> None:
        """Remove what `prepare` made; also after a failure, with the processes gone."""
