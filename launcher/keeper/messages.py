"""What a keeper and those who come to it say to each other: fixed structs, one JSON line each.

    anybody             Hello         Welcome           who keeps what
                        Look          Standing
                        Stop          Leaving           or Refused
    a training group    Begin         Begun             a generation, or Refused; Waiting before, while another one drains
                        End, Save, Fail                 of this generation

From its first generation on a group holds the session, until its connection is closed: then the generation ends, and the next
group may begin. Of its own accord a keeper says only Leaving to the group that holds the session: it is to stop.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shmbridge.config import Config
from shmbridge.errors import ConfigError, PlanError, SessionInUse, ShmbridgeError
from shmbridge.shm.record import Failure


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, tag_field="kind"):
    pass


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must be the same on both sides beside the settings."""

    shmbridge: str  # version
    layout: int  # version of the shared segments
    tokenizer: str  # SHA-256 of its files; empty where they are not known


# To the keeper


class Hello(_Message, frozen=True):
    """The first message of a connection."""


class Look(_Message, frozen=True):
    """How is it going?"""


class Stop(_Message, frozen=True):
    """End, although a group may hold the session where `force` is."""

    force: bool


class Begin(_Message, frozen=True):
    """A training group asks for its first generation, or for another one; every rank reads these settings."""

    fingerprint: Fingerprint
    settings: Config
    ranks: int


class End(_Message, frozen=True):
    """The holder's training has ended; the teacher drains."""


class Save(_Message, frozen=True):
    """The holder is to stop: its ranks save."""


class Fail(_Message, frozen=True):
    """The holder's training has failed; the waits of its ranks end with that."""

    failure: Failure


# From the keeper


class Welcome(_Message, frozen=True):
    name: str
    fingerprint: Fingerprint
    settings: msgspec.Raw  # a Config, to be decoded where the versions are the same


class Holder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The training group that holds the session."""

    pid: int
    since: float  # seconds since the epoch
    run: str  # directory
    generation: int
    ranks: int


class Standing(_Message, frozen=True):
    """How it is going."""

    name: str
    pid: int
    session: str
    run: str
    model: str
    gpus: str
    plane: str
    since: float  # seconds since the epoch
    state: str
    teachers: tuple[int, ...]  # pids; 0 where there is none
    answered: int  # requests
    holder: Holder | None


class Waiting(_Message, frozen=True):
    """Why no generation has begun yet."""

    text: str


class Begun(_Message, frozen=True):
    session: str
    generation: int
    logs: tuple[str, ...]  # of the teachers


class Refused(_Message, frozen=True):
    why: Literal["settings", "held", "memory"]
    text: str

    def error(self) -> ShmbridgeError:
        kinds = {"settings": ConfigError, "held": SessionInUse, "memory": PlanError}
        return kinds[self.why](self.text)


class Leaving(_Message, frozen=True):
    """The keeper ends."""

    reason: str
    waits_for: str = "its teacher"  # what has to end before
    within_s: float = 120.0


ToKeeper = Hello | Look | Stop | Begin | End | Save | Fail
FromKeeper = Welcome | Standing | Waiting | Begun | Refused | Leaving
AT_KEEPER = msgspec.json.Decoder(ToKeeper)
AT_CLIENT = msgspec.json.Decoder(FromKeeper)
