"""The bridge of a run without a teacher: the same calls, replies without tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Unpack

import torch

from shmbridge.config import Config
from shmbridge.errors import Closed
from shmbridge.head import Head
from shmbridge.output_spec import Extent, Offer
from shmbridge.rank.bridge import Bridge
from shmbridge.rank.pending import Pending, SendQueue
from shmbridge.rank.requests import Sent
from shmbridge.rank.stats import Stats
from shmbridge.rank.validate import Extras, IntArray


class DisabledBridge(Bridge):
    """`enabled` is False, and every reply is `missing`."""

    enabled = False

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._closed = False
        self._submitted = 0
        self._requests = None

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def settings(self) -> Config:
        """Defaults: the run's config lives in a session, and there is none."""
        return Config(enabled=False)

    @property
    def teacher(self) -> Offer:
        raise Closed("the bridge is off; there is no teacher.")

    @property
    def head(self) -> Head:
        raise Closed("the bridge is off; there is no teacher.")

    @property
    def free_slots(self) -> int:
        return 1

    def wait_ready(self, timeout: float | None = None, **_: Any) -> None:
        """Returns at once."""

    def submit(
        self,
        input_ids: torch.Tensor | IntArray,
        attention_mask: torch.Tensor | IntArray | None = None,
        **extras: Unpack[Extras],
    ) -> Pending:
        self._submitted += 1
        return Pending(None, Sent(self._submitted - 1, extras.get("step"), Extent(0, 0), False, missing=True))

    def _prepare(
        self,
        queue: SendQueue,
        /,
        input_ids: torch.Tensor | IntArray,
        attention_mask: torch.Tensor | IntArray | None = None,
        **extras: Unpack[Extras],
    ) -> Pending:
        return self.submit(input_ids, attention_mask, **extras)

    def on_stop(self, save: Callable[[], object]) -> None:
        """Signals end this rank as they always did."""

    @property
    def stop_requested(self) -> bool:
        """False: signals reach the script."""
        return False

    @contextmanager
    def defer_stop(self) -> Iterator[None]:
        yield

    @contextmanager
    def phase(self, name: str, timeout: float) -> Iterator[None]:
        yield

    def stats(self) -> Stats:
        return Stats()

    def close(self) -> None:
        self._closed = True

    def _fail(self, error: BaseException) -> bool:
        return True
