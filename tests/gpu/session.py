"""A session of a test's own, whose teacher and ranks are processes of their own: started afresh, never forked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shmbridge import config
from shmbridge.output_spec import Offer
from shmbridge.shm.owner import Owner
from shmbridge.shm.session import SESSION_VARIABLE
from tests.harness import until

ROOT = Path(__file__).parents[2]
END_S = 150
_NONE: Mapping[str, str] = MappingProxyType({})


class Actor:
    """A process that runs one function of tests/gpu/actors.py."""

    def __init__(self, log: Path, role: str, arguments: dict[str, Any], **variables: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "tests.gpu.actors", role, json.dumps(arguments)]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def line(self) -> Any:
        """The next thing that it tells."""
        assert self.process.stdout
        text = self.process.stdout.readline()
        assert text, f"the actor told nothing more:\n{self.log.read_text()}"
        return json.loads(text)

    def join(self, code: int = 0) -> None:
        """Its end, with this exit code."""
        found = self.process.wait(END_S)
        assert found == code, f"exit code {found}, expected {code}:\n{self.log.read_text()}"

    def result(self) -> Any:
        """What it told last, once it has ended well."""
        told, _ = self.process.communicate(timeout=END_S)
        self.join()
        return json.loads(told.splitlines()[-1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()


class Session:
    """The owner is the test's process; cards are torch's numbers, the teacher's and the ranks' by themselves cuda:0."""

    def __init__(self, lanes: int, *overrides: str, log: Path) -> None:
        fixed = ["teacher.model=tests:teacher", "ring.max_tokens=1024", "timeouts.request_s=120", "parity=false"]
        self.settings = config.load(overrides=[*fixed, *overrides])
        self.owner = Owner(self.settings, lanes)
        self.token = str(self.owner.start_generation())
        self.actors: list[Actor] = []
        self._log = log

    def teacher(
        self, role: str, *, device: str = "cuda:0", variables: Mapping[str, str] = _NONE, **arguments: Any
    ) -> Actor:
        """A teacher, up to its offer."""
        actor = self._start(role, {"device": device, **arguments}, variables)
        record = self.owner.control.teachers[0]
        until(lambda: record.offer or actor.process.poll() is not None, "the teacher's offer")
        assert record.offer, f"the teacher ended before its offer:\n{actor.log.read_text()}"
        self.owner.create_replies(Offer.decode(record.offer))
        return actor

    def rank(
        self, lane: int, role: str, *, device: str = "cuda:0", variables: Mapping[str, str] = _NONE, **arguments: Any
    ) -> Actor:
        return self._start(role, {"device": device, "lane": lane, **arguments}, variables)

    def _start(self, role: str, arguments: dict[str, Any], variables: Mapping[str, str]) -> Actor:
        log = self._log / f"{len(self.actors)}-{role}.log"
        actor = Actor(log, role, arguments, **{SESSION_VARIABLE: self.token, **variables})
        self.actors.append(actor)
        return actor

    def close(self) -> None:
        for actor in self.actors:
            actor.end()
        self.owner.close()
