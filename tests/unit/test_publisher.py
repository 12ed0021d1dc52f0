"""Publisher: order, failure, end. What is waited for is a gate that the test opens."""

from __future__ import annotations

import threading

import pytest

from shmbridge.teacher.replies import Publisher
from tests.harness import until

PATIENCE_S = 60


class Gate:
    """An arrival that comes when the test says so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.error = error

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(PATIENCE_S)
        if self.error:
            raise self.error


def test_without_anything_to_wait_for_it_publishes_at_once_and_starts_no_thread():
    publisher, told = Publisher(), []
    for number in range(3):
        publisher.after(None, lambda number=number: told.append(number))
        assert told == list(range(number + 1))
    assert publisher._thread is None
    publisher.close()


def test_what_need_not_be_waited_for_does_not_pass_what_must():
    """An error or a skip between two replies: its head is written, but its sequence comes after."""
    publisher, told = Publisher(), []
    gates = [Gate(), None, None, Gate(), None]
    for number, gate in enumerate(gates):
        publisher.after(gate, lambda number=number: told.append(number))
    assert gates[0].entered.wait(PATIENCE_S)
    assert told == []
    gates[0].opened.set()
    assert gates[3].entered.wait(PATIENCE_S)
    assert told == [0, 1, 2]
    gates[3].opened.set()
    publisher.close()
    assert told == [0, 1, 2, 3, 4]
    assert publisher._thread is None


def test_close_publishes_what_is_left():
    publisher, told = Publisher(), []
    gate = Gate()
    for number in range(5):
        publisher.after(gate, lambda number=number: told.append(number))
    gate.opened.set()
    publisher.close()
    assert told == [0, 1, 2, 3, 4]
    publisher.close()


def test_all_is_published_by_one_thread():
    publisher, by = Publisher(), set()
    gate = Gate()
    gate.opened.set()
    for number in range(50):
        publisher.after(
            gate if number % 3 else None, lambda number=number: by.add((number > 0) and threading.get_ident())
        )
    publisher.close()
    assert len(by - {False}) == 1


@pytest.mark.parametrize("raises", ["waiting", "publishing"])
def test_a_failure_reaches_the_server_and_nothing_is_published_after_it(raises):
    publisher, told = Publisher(), []
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    gate = Gate(error if raises == "waiting" else None)

    def publish() -> None:
        told.append("first")
        if raises == "publishing":
            raise error

    publisher.after(gate, publish)
    publisher.after(None, lambda: told.append("second"))
    publisher.check()
    gate.opened.set()
    until(lambda: publisher._error, "the failure")
    for tell in (publisher.check, publisher.check, publisher.close):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            tell()
    assert told == (["first"] if raises == "publishing" else [])
