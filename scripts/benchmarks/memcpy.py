"""A bare memcpy of the reply, in the rank's process and with no teacher: the limit of whatever copies the reply once.

numpy.copyto between the warm memory of two tensors: the C library's memcpy, on pages of the ordinary size, as those of
shared memory are. No IDs, no wake-up, no other process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.cell import Ask, Cell, Check, Model


class Memcpy:
    """See the module."""

    name = "bare memcpy"
    ranked = False

    def prepare(self, cell: Cell, model: Model, scratch: Path) -> None:
        self._model = model

    def teach(self) -> None:
        pass

    @contextmanager
    def rank(self, index: int) -> Iterator[Ask]:
        source = self._model.answers().numpy()
        target = self._model.answers().zero_().numpy()

        def ask(check: Check) -> None:
            np.copyto(target, source)
            if check:
                check(target)

        yield ask

    def close(self) -> None:
        pass
