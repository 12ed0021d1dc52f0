"""Ways to break the protocol: what does not notice them proves nothing.

Each takes `set(object, name, value)`: setattr, or pytest's monkeypatch.setattr.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shmbridge.shm.ring import Ring
from shmbridge.shm.teacher_session import TeacherSession

Set = Callable[[Any, str, Any], None]


def _nothing(*_: Any, **__: Any) -> None:
    """What was done before."""


def publish_before_write_request(set_: Set) -> None:
    """The cursor moves before the request is in its slot."""
    write, publish = Ring.write_request, Ring.publish_request

    def mutant(self: Ring, sequence: int, *rest: Any, **named: Any) -> None:
        publish(self, sequence)
        write(self, sequence, *rest, **named)

    set_(Ring, "write_request", mutant)
    set_(Ring, "publish_request", _nothing)


def publish_before_write_reply(set_: Set) -> None:
    """The cursor moves before the reply's head is written."""
    publish = Ring.publish_reply

    def early(write: Callable[..., None]) -> Callable[..., None]:
        def mutant(self: Ring, sequence: int, *rest: Any, **named: Any) -> None:
            publish(self, sequence)
            write(self, sequence, *rest, **named)

        return mutant

    set_(Ring, "write_reply", early(Ring.write_reply))
    set_(Ring, "skip_reply", early(Ring.skip_reply))
    set_(Ring, "publish_reply", _nothing)


def publish_before_write_chunk(set_: Set) -> None:
    """The cursor moves before the chunk's head is written."""
    write, publish = Ring.write_chunk, Ring.publish_chunk

    def mutant(self: Ring, sequence: int, start: int, count: int) -> None:
        publish(self)
        write(self, sequence, start, count)

    set_(Ring, "write_chunk", mutant)
    set_(Ring, "publish_chunk", _nothing)


def release_before_read(set_: Set) -> None:
    """The slot is given back as soon as its head is looked at, while the payload is still being read."""
    read = Ring.read_reply

    def mutant(self: Ring, sequence: int) -> Any:
        self.release(sequence)
        return read(self, sequence)

    set_(Ring, "read_reply", mutant)


def publish_without_a_ring(set_: Set) -> None:
    """The teacher opens the barrier and answers, and wakes nobody."""
    set_(TeacherSession, "ring_members", _nothing)


def hand_over_what_is_not_published(set_: Set) -> None:
    """A teacher hands its lane over while a reply of its own is written and not yet published."""
    set_(Ring, "settled", property(lambda self: True))


MUTANTS: dict[str, Callable[[Set], None]] = {
    "publish_before_write_request": publish_before_write_request,
    "publish_before_write_reply": publish_before_write_reply,
    "publish_before_write_chunk": publish_before_write_chunk,
    "release_before_read": release_before_read,
    "publish_without_a_ring": publish_without_a_ring,
    "hand_over_what_is_not_published": hand_over_what_is_not_published,
}
