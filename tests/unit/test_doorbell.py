"""The one wait: woken by a ring, by a peer that is lost, by the deadline; never by a clock that is set."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import posix_ipc
import pytest

from shmbridge.errors import AttachError, TeacherDied
from shmbridge.shm import doorbell
from shmbridge.shm.doorbell import Doorbell
from tests.harness import Child


@pytest.fixture
def bell() -> Iterator[Doorbell]:
    made = Doorbell(f"/shmbridge-test-{secrets.token_hex(8)}", create=True)
    yield made
    posix_ipc.unlink_semaphore(made.name)


@pytest.fixture(params=[True, False], ids=["sem_clockwait", "sem_timedwait"])
def libc(request, monkeypatch) -> None:
    if not request.param:
        monkeypatch.setattr(doorbell, "_sem_clockwait", None)


def nothing() -> None:
    """A check that finds everyone alive."""


def test_a_ring_wakes_and_a_stray_one_does_not_answer(bell, libc):
    bell.ring()
    bell.ring()
    looks = iter([None, None, None, "ready"])
    bell.ring()
    assert bell.wait(lambda: next(looks), nothing, None) == "ready"


def test_a_ring_of_another_process_wakes(bell, libc):
    child = Child(lambda: Doorbell(bell.name).ring())
    assert bell.wait(child.poll, nothing, time.monotonic() + 60) == 0


def test_the_deadline_is_kept(bell, libc):
    before = time.monotonic()
    assert bell.wait(lambda: None, nothing, before + 0.05) is None
    assert time.monotonic() >= before + 0.05


def test_a_wait_without_a_ring_finds_what_is_there_a_slice_later(bell, libc):
    looks = iter([None, None, "ready"])
    assert bell.wait(lambda: next(looks), nothing, None) == "ready"


def test_a_lost_peer_ends_the_wait_unless_it_had_answered(bell):
    def lost() -> None:
        raise TeacherDied("gone")

    with pytest.raises(TeacherDied):
        bell.wait(lambda: None, lost, None)
    looks = iter([None, None, "answered before it died"])
    assert bell.wait(lambda: next(looks), lost, None) == "answered before it died"
    with pytest.raises(TeacherDied):
        bell.wait(lambda: None, lost, time.monotonic())


def test_spinning_finds_it_without_a_ring(bell):
    looks = iter([None] * 50 + ["ready"])
    assert bell.wait(lambda: next(looks), nothing, None, spin_s=60) == "ready"


def test_rings_that_were_not_needed_are_taken_back(bell):
    for _ in range(5):
        bell.ring()
    assert bell.wait(lambda: "ready", nothing, None) == "ready"
    assert bell._semaphore.value == 0


def test_a_missing_doorbell_is_named():
    with pytest.raises(AttachError, match="doorbell /shmbridge-nowhere does not exist"):
        Doorbell("/shmbridge-nowhere")
