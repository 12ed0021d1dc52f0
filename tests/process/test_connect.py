"""connect() in a process that had connected before."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from shmbridge import connect
from shmbridge.errors import AttachError, Closed
from shmbridge.shm.participant_record import Phase
from shmbridge.teacher import server
from tests.harness import Bench, Child, Echo, bench, until


def ids(value: int) -> torch.Tensor:
    return torch.full((1, 4), value)


def process(it: Bench, body) -> Child:
    """A process of rank 0 as the launcher starts it."""

    def run() -> None:
        os.environ["SHMBRIDGE_SESSION"] = str(it.token)
        os.environ["LOCAL_RANK"] = "0"
        body()

    return it.start(run)


def heartbeats() -> int:
    return sum(thread.name == "shmbridge-heartbeat" for thread in threading.enumerate())


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "still open"])
def test_a_process_that_connects_again_has_its_whole_lane_and_nothing_of_the_last_bridge(closes):
    def body() -> None:
        first = connect()
        first.on_stop(lambda: None)
        read = first.submit(ids(1)).wait()
        unread = first.submit(ids(2))
        if closes:
            first.close()
        second = connect()
        record = it.owner.lanes[0].records[0]
        assert (record.phase, record.saves, record.step) == (Phase.STARTING, False, None)
        for value in (3, 4):
            pendings = [second.submit(ids(value + i)) for i in range(3)]
            for i, pending in enumerate(pendings):
                with pending.wait() as reply:
                    read.release()  # the last bridge's: it moves nothing
                    assert torch.equal(reply["ids"], ids(value + i))
        with pytest.raises(Closed, match="closed" if closes else r"connect\(\) was called again"):
            unread.wait() if closes else first.submit(ids(1))

    with bench(1, "teacher.serve_until=exited", "ring.depth=3") as it:
        teacher = it.teacher(Echo())
        assert process(it, body).join() == 0
        assert teacher.join() == 0


@pytest.mark.one_plane
def test_a_stream_that_the_last_bridge_left_is_over():
    def body() -> None:
        left = connect().submit(ids(1).repeat(1, 5)).chunks()
        next(left)
        second = connect()
        assert torch.equal(second.exchange(ids(2).repeat(1, 5))["ids"], ids(2).repeat(1, 5))
        left.close()
        assert torch.equal(second.exchange(ids(3).repeat(1, 5))["ids"], ids(3).repeat(1, 5))

    settings = ("teacher.serve_until=exited", "payload.stream={chunk_positions: 3, chunks: 2}")
    with bench(1, *settings) as it:
        it.teacher(lambda batch: {"ids": batch.input_ids.clone()})
        assert process(it, body).join() == 0


@pytest.mark.one_plane
def test_connecting_again_and_again_piles_nothing_up(tmp_path):
    def body() -> None:
        def held() -> tuple[object, ...]:
            until(lambda: heartbeats() == 1)
            files = len(os.listdir("/proc/self/fd"))
            return files, Path("/proc/self/maps").read_text().count("/dev/shm/"), sys.excepthook

        found = []
        for _ in range(6):
            with connect() as bridge:
                bridge.exchange(ids(1))
                found.append(held())
        assert len(set(found[1:])) == 1, found  # the second connect() looks after the teacher, with a pidfd
        until(lambda: heartbeats() == 0)

    with bench(1, "teacher.serve_until=exited", f"run_dir={tmp_path}") as it:
        it.teacher(Echo())
        assert process(it, body).join() == 0


@pytest.mark.one_plane
@pytest.mark.parametrize("stays", [False, True], ids=["exited", "idle"])
def test_a_process_that_connects_again_after_its_teacher_has_ended_is_told(stays, monkeypatch, tmp_path):
    """At connect(), or at the first reply where the teacher was about to end."""
    ending, gate, settle = tmp_path / "ending", tmp_path / "gate", server.Server._settle

    def held(self: server.Server) -> None:
        ending.touch()
        until(gate.exists)
        settle(self)

    monkeypatch.setattr(server.Server, "_settle", held)

    def body() -> None:
        connect().close()
        until(ending.exists)
        with connect() as bridge:
            gate.touch()
            with pytest.raises(AttachError, match=r"teacher 0 .* has ended.*teacher\.serve_until=exited"):
                for _ in range(9):
                    bridge.exchange(ids(1))
        until(lambda: it.owner.control.teachers[0].phase is (Phase.IDLE if stays else Phase.CLOSED))
        with pytest.raises(AttachError, match=r"teacher 0 .* has ended.*teacher\.serve_until=exited"):
            connect()

    with bench(1, "train.restarts=1") if stays else bench(1) as it:
        it.teacher(Echo())
        assert process(it, body).join() == 0


@pytest.mark.one_plane
def test_another_process_never_gets_the_lane():
    """Neither a forked child of the rank, nor one that comes after it."""

    def refused() -> None:
        with pytest.raises(AttachError, match="two processes have the same LOCAL_RANK"):
            connect()

    def body() -> None:
        connect().close()
        assert Child(refused).join() == 0

    with bench(1, "teacher.serve_until=exited") as it:
        it.teacher(Echo())
        assert process(it, body).join() == 0
        assert process(it, refused).join() == 0
