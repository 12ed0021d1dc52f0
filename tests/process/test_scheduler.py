"""Which requests meet in one forward when ranks come a little apart."""

from __future__ import annotations

import os
import signal
import time

import torch

from shmbridge.teacher.batch import Batch
from tests.harness import Echo, bench

LONG_S = 2.0  # a forward; the teacher waits up to half of it for who was in it


class LongFirst(Echo):
    """Takes long for the ID 7."""

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        if (batch.input_ids == 7).any():
            time.sleep(LONG_S)
        return super().__call__(batch)


def test_a_rank_of_the_last_forward_that_is_late_is_waited_for():
    ids = torch.ones(1, 4, dtype=torch.int64)
    with bench(2, "teacher.linger_ms=1") as b:
        teacher = b.teacher(LongFirst())
        with b.bridge(0) as first, b.bridge(1) as second:
            first.wait_ready()
            second.wait_ready()
            os.kill(teacher.pid, signal.SIGSTOP)
            together = [first.submit(ids * 7), second.submit(ids * 7)]
            os.kill(teacher.pid, signal.SIGCONT)
            assert [pending.copy().composition.rows for pending in together] == [2, 2]
            early = first.submit(ids)
            time.sleep(0.05)  # long after the linger
            assert not early.done
            late = second.submit(ids)
            assert [early.copy().composition[:3], late.copy().composition[:3]] == [(2, 0, 2), (2, 1, 2)]
            alone = [first.exchange(ids).composition for _ in range(3)]
            assert [(found.forward, found.rows) for found in alone] == [(3, 1), (4, 1), (5, 1)]
