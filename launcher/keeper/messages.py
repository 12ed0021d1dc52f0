"""What a keeper and those who come to it say to each other: fixed structs, one JSON line each.

    anybody             Hello         Welcome           who keeps what
                        Look          Standing
                        Stop          Leaving           or Refused
    a training group    Begin         Begun             a generation, or Refused; Waiting: ask again, the teachers finish with another one
                        End, Save, Fail                 of this generation

From its first generation on a group holds the session, until its connection is closed: then the generation ends, and the next
group may begin. Of its own accord a keeper says only Leaving: it ends.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shmbridge.config import Config
from shmbridge.errors import ConfigError, PlanError, SessionInUse, ShmbridgeError
from shmbridge.shm.participant_record import Failure


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, tag_field="kind"):
    """One line."""


# To the keeper


class Hello(Message, frozen=True):
    """The first message of a connection."""


class Look(Message, frozen=True):
    """How is it going?"""


class Stop(Message, frozen=True):
    """End, although a group may hold the session where `force` is."""

    force: bool


class Begin(Message, frozen=True):
    """A training group asks for its first generation, or for another one; every rank reads these settings."""

    settings: Config
    ranks: int
    tokenizer: str  # SHA-256 of the model's tokenizer, as the group finds it; empty where it is not known


class End(Message, frozen=True):
    """The holder's training has ended; the teacher drains."""


class Save(Message, frozen=True):
    """The holder is to stop: its ranks save."""


class Fail(Message, frozen=True):
    """The holder's training has failed; the waits of its ranks end with that."""

    failure: Failure


# From the keeper


class Welcome(Message, frozen=True):
    versions: dict[str, str]  # by what has them
    settings: msgspec.Raw  # a Config, to be decoded where the versions are the same


class Standing(Message, frozen=True):
    """How it is going, as rows of a table."""

    rows: tuple[tuple[str, str], ...]


class Waiting(Message, frozen=True):
    """Why no generation can begin yet."""

    text: str


class Begun(Message, frozen=True):
    session: str
    generation: int
    logs: tuple[str, ...]  # of the teachers


class Refused(Message, frozen=True):
    why: Literal["settings", "held", "memory"]
    text: str

    def error(self) -> ShmbridgeError:
        kinds = {"settings": ConfigError, "held": SessionInUse, "memory": PlanError}
        return kinds[self.why](self.text)


class Leaving(Message, frozen=True):
    """The keeper ends, `within_s` at the latest, once what it waits for has ended."""

    reason: str
    waits_for: str
    within_s: float


ToKeeper = Hello | Look | Stop | Begin | End | Save | Fail
FromKeeper = Welcome | Standing | Waiting | Begun | Refused | Leaving
AT_KEEPER = msgspec.json.Decoder(ToKeeper)
AT_CLIENT = msgspec.json.Decoder(FromKeeper)
