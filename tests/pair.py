"""A teacher and a rank, both in the test's process, which take turns."""

from __future__ import annotations

from contextlib import suppress

import torch

from shmbridge import config
from shmbridge.errors import TornReply
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.owner import Owner
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher import output_discovery
from shmbridge.teacher.batch import Batch
from shmbridge.teacher.server import Server

CPU = torch.device("cpu")
RAISES = 66  # an ID for which `forward` raises


class Pair:
    """`forward` is the test's. Of several lanes the teacher serves all, and the rank has the first."""

    def __init__(self, *overrides: str, lanes: int = 1) -> None:
        fixed = ["teacher.model=tests:teacher", "parity=false", "ring.max_tokens=64"]
        self.settings = config.load(overrides=[*fixed, *overrides])
        self.owner = Owner(self.settings, lanes)
        self.token = self.owner.start_generation()
        self.bridge: Bridge | None = None

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def open_teacher(self) -> None:
        """The teacher, up to the barrier."""
        self.session = TeacherSession(self.token)
        self.agreed, encoder = output_discovery.make(self.forward, self.settings, CPU)
        self.owner.create_replies(self.agreed)
        self.session.publish(self.agreed)
        self.session.next_generation()
        self.server = Server(self.session, self.forward, encoder, self.agreed, CPU)
        self.session.open_barrier()

    def open_rank(self) -> None:
        """The rank, past the barrier."""
        self.bridge = Bridge(RankSession(self.token, 0))
        self.bridge.wait_ready()

    def teach(self) -> None:
        """Answer what is there, as far as there is room."""
        with torch.inference_mode():
            while answers := self.server._collector._take_or_end():
                self.server._answer(answers)
            while self.server._replies.advance():
                pass

    def close(self) -> None:
        if self.bridge is not None:
            for side in (self.server._replies.publisher, self.bridge):
                with suppress(RuntimeError, TornReply):  # what the test has made
                    side.close()
        self.owner.close()
