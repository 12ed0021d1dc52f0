"""A process is its pid and its start time."""

from __future__ import annotations

import os
import signal

import pytest

from shmbridge.shm import process
from shmbridge.shm.process import Identity, Peer
from tests.harness import Child, until


@pytest.fixture
def child():
    made = Child(lambda: signal.pause())
    yield made
    made.end()


@pytest.mark.parametrize("forbidden", [False, True])
def test_a_peer_is_alive_until_its_process_ends(child, forbidden, monkeypatch):
    def refuse(pid: int) -> int:
        raise PermissionError(pid)

    if forbidden:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    who = process.identity(child.pid)
    peer = Peer(who)
    assert peer.alive()
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: not peer.alive(), "the end of the process, which nobody has reaped")
    assert process.state_of(who) == "zombie"


def test_a_later_process_of_the_same_pid_is_another_one(child):
    who = process.identity(child.pid)
    earlier = Identity(who.pid, who.start - 1)
    assert not Peer(earlier).alive()
    assert process.state_of(earlier) == "gone"
    assert process.open_pidfd(earlier) is None
    assert not process.send(earlier, signal.SIGKILL)
    assert Peer(who).alive()
    assert process.send(who, signal.SIGKILL)
    assert child.join() == -signal.SIGKILL


@pytest.mark.parametrize("pid", [2**22 + 1, 2**63])
def test_a_number_that_no_process_has_is_no_process(pid):
    assert not Peer(Identity(pid, 1)).alive()
    assert process.state_of(Identity(pid, 1)) == "gone"
