"""What a rank does before it stops, and what does not belong to the rank: save hooks, phases, forked children."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

from shmbridge.errors import RingFull, RunStopped, TeacherDied
from shmbridge.rank.bridge import Bridge
from shmbridge.shm.heartbeat import Heartbeat
from shmbridge.shm.participant_record import Failure, Phase
from tests.harness import Child, Echo, bench, switches, until

IDS = torch.ones((1, 4), dtype=torch.int64)


class Gated(Echo):
    """Answers token 7 once a file is there."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def __call__(self, batch):
        if (batch.input_ids == 7).any():
            until(self.gate.exists)
        return super().__call__(batch)


def sleeps_on(pid: int, times: int = 5) -> None:
    """It has looked at the board again."""
    before = switches(pid)
    until(lambda: switches(pid) >= before + times)


def saved(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def training(path: Path, waits_for_ever: bool):
    """A rank with a hook that writes a line, in a run that stops."""

    def train(bridge: Bridge) -> None:
        def save() -> None:
            with path.open("a") as file:
                file.write("saved\n")

        bridge.on_stop(save)
        bridge.exchange(IDS)
        with pytest.raises(RunStopped):
            while True:
                bridge.exchange(IDS * 7 if waits_for_ever else IDS)

    return train


@pytest.mark.parametrize("waiting", [True, False], ids=["waiting", "computing"])
@pytest.mark.parametrize("how", ["launcher", "signal"])
def test_a_hook_runs_once_when_the_run_stops(tmp_path, how, waiting):
    path = tmp_path / "saved"
    with bench() as it:
        it.teacher(Gated(tmp_path / "never"))
        rank = it.rank(0, training(path, waiting))
        record = it.owner.lanes[0].records[0]
        until(lambda: (record.sequence or 0) > 0 and (record.phase is Phase.WAITING or not waiting))
        assert record.saves
        if how == "launcher":
            it.owner.ask_to_stop()
        else:
            rank.kill(signal.SIGTERM)
        assert rank.join() == 0
        assert saved(path) == 1


def test_what_a_hook_raises_is_raised(tmp_path):
    with bench() as it:
        it.teacher(Echo())

        def train(bridge: Bridge) -> None:
            bridge.on_stop(lambda: 1 / 0)
            bridge.wait_ready()
            it.owner.ask_to_stop()
            bridge.exchange(IDS)

        assert it.rank(0, train).join() == 1
        failure = it.owner.lanes[0].records[0].failure
        assert "ZeroDivisionError" in failure.reason and not failure.consequence


def test_a_hook_may_use_the_bridge_as_long_as_the_teacher_lives(tmp_path):
    """An evaluation before the last checkpoint; the stop must not cut it off."""
    gate, done = tmp_path / "gate", tmp_path / "done"
    with bench() as it:
        it.teacher(Gated(gate))

        def train(bridge: Bridge) -> None:
            def save() -> None:
                assert not bridge.exchange(IDS * 7).missing
                done.touch()

            bridge.on_stop(save)
            bridge.wait_ready()
            it.owner.ask_to_stop()
            with pytest.raises(RunStopped):
                bridge.exchange(IDS)

        rank = it.rank(0, train)
        until(lambda: it.owner.lanes[0].records[0].phase is Phase.WAITING)
        sleeps_on(rank.pid)
        gate.touch()
        assert rank.join() == 0
        assert done.exists()


def test_a_hook_runs_when_the_teacher_is_lost_and_does_not_hang_where_it_uses_the_bridge(tmp_path):
    with bench() as it:
        teacher = it.teacher(Gated(tmp_path / "never"))

        def train(bridge: Bridge) -> None:
            def save() -> None:
                with pytest.raises(TeacherDied):
                    bridge.exchange(IDS)
                (tmp_path / "saved").touch()

            bridge.on_stop(save)
            bridge.exchange(IDS)
            with pytest.raises(TeacherDied):
                bridge.exchange(IDS * 7)

        rank = it.rank(0, train)
        until(lambda: it.owner.control.teachers[0].sequence == 1)
        teacher.kill()
        assert rank.join() == 0
        assert (tmp_path / "saved").exists()


def test_after_close_sigterm_ends_the_process_again(tmp_path):
    with bench() as it:
        it.teacher(Echo())

        def train(bridge: Bridge) -> None:
            bridge.on_stop(lambda: None)
            bridge.exchange(IDS)
            bridge.close()
            os.kill(os.getpid(), signal.SIGTERM)

        assert it.rank(0, train).join() == -signal.SIGTERM


def test_a_handler_of_the_scripts_own_is_kept(tmp_path):
    with bench() as it:
        it.teacher(Echo())

        def train(bridge: Bridge) -> None:
            taken = []
            signal.signal(signal.SIGTERM, lambda *_: taken.append(1))
            bridge.on_stop(lambda: None)
            os.kill(os.getpid(), signal.SIGTERM)
            assert taken == [1]
            assert not bridge.exchange(IDS).missing

        assert it.rank(0, train).join() == 0


def test_a_teacher_that_ends_in_a_run_that_stops_is_no_death(tmp_path):
    """Between the end of the last teacher and the launcher's word a rank may look at the board."""
    with bench() as it:
        teacher = it.teacher(Echo())

        def train(bridge: Bridge) -> None:
            bridge.exchange(IDS)
            (tmp_path / "up").touch()
            with pytest.raises(RunStopped, match="stopped by SIGTERM"):
                bridge._life.session.wait(lambda: None, None)

        rank = it.rank(0, train)
        until((tmp_path / "up").exists)
        it.owner.ask_to_stop()
        teacher.kill()
        assert teacher.join() == -signal.SIGKILL
        sleeps_on(rank.pid, 2)
        assert rank.poll() is None
        it.owner.fail(Failure("launcher", 0, 1, "unknown", None, None, "stopped by SIGTERM"))
        assert rank.join() == 0


# Phases and heartbeats


def test_a_phase_within_a_phase_gives_way_to_the_outer_one():
    with bench() as it:
        it.teacher(Echo())
        with it.bridge() as bridge:
            record = it.owner.lanes[0].records[0]
            assert record.declared is None
            with bridge.phase("epoch", timeout=1000):
                with pytest.raises(ZeroDivisionError), bridge.phase("eval", timeout=10):
                    assert record.declared[0] == "eval" and record.declared[1] <= 10
                    1 / 0  # noqa: B018
                assert record.declared[0] == "epoch" and 900 < record.declared[1] <= 1000
            assert record.declared is None


def test_a_forked_child_is_not_the_rank(tmp_path):
    """As a DataLoader's worker with persistent_workers: it neither beats for a dead parent, nor gives back, nor closes."""
    with bench(1, "ring.depth=2") as it:
        it.teacher(Echo())
        beat = 3  # see heartbeat.EVERY_S
        worker = tmp_path / "worker"

        def train(bridge: Bridge) -> None:
            bridge.on_stop(lambda: None)
            Heartbeat(bridge._life.session.record)
            lease = bridge.submit(IDS).wait()
            pending = bridge.submit(IDS)
            child = os.fork()
            if child == 0:
                lease.release()
                pending.cancel()
                bridge.close()
                worker.write_text(str(os.getpid()))
                while True:
                    signal.pause()
            until(lambda: worker.exists() and worker.read_text())
            assert lease.reply["ids"].tolist() == IDS.tolist()
            os.kill(os.getpid(), signal.SIGKILL)

        assert it.rank(0, train).join() == -signal.SIGKILL
        lane = it.owner.lanes[0]
        pid = int(worker.read_text())
        try:
            assert (lane.ring.released, lane.ring.abandoned, lane.ring.closed) == (0, 0, False)
            age = until(lambda: (lane.records[0].heartbeat_age_s or 0) > beat and lane.records[0].heartbeat_age_s)
            assert age > beat
            os.kill(pid, signal.SIGTERM)
            until(lambda: ended(pid), "the end of a child that was told to")
        finally:
            if not ended(pid):
                os.kill(pid, signal.SIGKILL)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(("code", "failed"), [(0, False), (3, True)])
def test_sys_exit_within_a_lease(code, failed):
    with bench() as it:
        it.teacher(Echo())

        def train(bridge: Bridge) -> None:
            with bridge.submit(IDS).wait():
                sys.exit(code)

        it.rank(0, train).join()
        lane = it.owner.lanes[0]
        assert lane.ring.closed and lane.ring.released == 1
        assert (lane.records[0].failure is not None) == failed


def test_a_keyboard_interrupt_during_a_wait_leaves_the_request_as_it_was(tmp_path):
    gate = tmp_path / "gate"
    with bench() as it:
        it.teacher(Gated(gate))

        def train(bridge: Bridge) -> None:
            pending = bridge.submit(IDS * 7)
            with pytest.raises(KeyboardInterrupt):
                pending.wait()
            gate.touch()
            assert pending.copy()["ids"].tolist() == (IDS * 7).tolist()

        rank: Child = it.rank(0, train)
        until(lambda: it.owner.lanes[0].records[0].phase is Phase.WAITING)
        rank.kill(signal.SIGINT)
        assert rank.join() == 0


def test_an_interrupted_exchange_gives_its_slot_back(tmp_path):
    """Within the handler, too, where the exception still refers to all of its frames."""
    gate = tmp_path / "gate"
    with bench(1, "ring.depth=2") as it:
        it.teacher(Gated(gate))

        def train(bridge: Bridge) -> None:
            try:
                bridge.exchange(IDS * 7)
            except KeyboardInterrupt:
                gate.touch()
                for _ in range(4):
                    assert bridge.exchange(IDS)["ids"].tolist() == IDS.tolist()
                (tmp_path / "saved").touch()

        rank: Child = it.rank(0, train)
        until(lambda: it.owner.lanes[0].records[0].phase is Phase.WAITING)
        rank.kill(signal.SIGINT)
        assert rank.join() == 0
        assert (tmp_path / "saved").exists()


def test_the_end_of_a_lease_sends_the_next_request_and_does_not_save_and_stop():
    """The loop may have counted half of its step there. It saves in the next call."""
    with bench(1, "ring.depth=1") as it:
        it.teacher(Echo())

        def train(bridge: Bridge) -> None:
            saved: list[int] = []
            step = 0
            bridge.on_stop(lambda: saved.append(step))
            batches = bridge.prefetch([IDS] * 5, ahead=2)
            _, pending = next(batches)
            with pending.wait():
                it.owner.ask_to_stop()
            assert it.owner.lanes[0].ring.requested == 2
            step = 1
            with pytest.raises(RunStopped):
                next(batches)
            assert saved == [1]

        assert it.rank(0, train).join() == 0


def exchange(bridge: Bridge) -> None:
    bridge.exchange(IDS)


def draw_and_exchange(bridge: Bridge) -> None:
    """What was sent is withdrawn for the exchange, and sent again."""
    batches = bridge.prefetch([IDS] * 4, ahead=1)
    try:
        drawn = [next(batches), next(batches)]
        bridge.exchange(IDS)
        drawn.append(next(batches))
    finally:
        batches.close()
        drawn = []


@pytest.mark.parametrize("calls", [exchange, draw_and_exchange])
def test_calls_that_are_interrupted_anywhere_give_their_slots_back(calls):
    """A KeyboardInterrupt at the n-th line for n = 1, 2, 3, ... until the calls run through. The handler, in which the exception
    still refers to all frames, asks for more replies than the ring has slots."""
    with bench(1, "ring.depth=2", "log.stats_every=0") as it:
        it.teacher(Echo())
        with it.bridge() as bridge:
            bridge.wait_ready()
            bridge.exchange(IDS)
            at, left = 0, [0]
            while left[0] == 0:
                at += 1
                left[0] = at

                def trace(frame, *_):
                    if f"{os.sep}shmbridge{os.sep}" not in frame.f_code.co_filename:
                        return None
                    left[0] -= 1
                    if left[0] == 0:
                        sys.settrace(None)
                        raise KeyboardInterrupt
                    return trace

                sys.settrace(trace)
                try:
                    calls(bridge)
                    sys.settrace(None)
                except KeyboardInterrupt as error:
                    where = "".join(traceback.format_exception(error))
                    for _ in range(3):
                        try:
                            assert bridge.exchange(IDS)["ids"].tolist() == IDS.tolist()
                        except RingFull as full:
                            raise AssertionError(f"interrupted at line {at}:\n{where}") from full
            assert at > 50
