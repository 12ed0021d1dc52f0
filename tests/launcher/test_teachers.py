"""What becomes of a run whose teacher died, and whether training starts again: over a real session, with fake jobs and time."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from launcher.supervisor.cause import Cause
from launcher.supervisor.teachers import Teachers
from launcher.supervisor.training import Restarts
from shmbridge import config
from shmbridge.errors import PlanError
from shmbridge.output_spec import Offer, OutputSpec
from shmbridge.shm.owner import Owner
from shmbridge.shm.participant_record import Phase

OFFER = Offer((OutputSpec("logits", "float32", ("seq", 4)),), "fake", vocab_size=4)
FOREVER = "on_teacher_lost=wait"


class Job:
    """Ends when it is killed, unless it is `slow` to."""

    def __init__(self, spec) -> None:
        self.spec = spec
        self.exit = None
        self.slow = False

    def kill(self) -> None:
        self.exit = None if self.slow else "killed"


class Scene:
    def __init__(self, owner: Owner, settings, clock) -> None:
        self.owner, self.clock = owner, clock
        self.told: list[str] = []
        self.started: list[tuple[float, int]] = []
        specs = [SimpleNamespace(replica=i) for i in range(len(owner.control.teachers))]
        loop = SimpleNamespace(start=self.start, console=SimpleNamespace(say=self.told.append))
        self.teachers = Teachers(settings, owner, specs, loop)
        self.tick()
        self.started.clear()
        for index in range(len(specs)):
            self.load(index)
        owner.create_replies(OFFER)
        self.tick()

    def start(self, spec) -> Job:
        self.started.append((self.clock.now, spec.replica))
        return Job(spec)

    def load(self, index: int, offer: Offer = OFFER) -> None:
        record = self.owner.control.teachers[index]
        record.sign_in()
        record.write_offer(offer.encode())
        record.ready = self.owner.generation

    def die(self, index: int, slow: bool = False) -> bool:
        """Whether the run survives it."""
        job = self.job(index)
        job.slow = slow
        job.exit = None if slow else "killed"
        cause = Cause(role="teacher", rank=index, who=f"teacher {index}", pid=1, reason="killed by SIGKILL")
        return self.teachers.survives(cause, self.clock.now)

    def job(self, index: int) -> Job:
        return self.teachers.replicas[index].job

    @property
    def excused(self) -> set[int]:
        return {replica.index for replica in self.teachers.replicas if replica.excused}

    def tick(self, seconds: float = 0.0) -> None:
        self.clock.now += seconds
        self.teachers.step(self.clock.now)

    @property
    def lanes(self) -> list[int]:
        return [lane.teacher for lane in self.owner.lanes]

    @property
    def wanted(self) -> list[int]:
        return [lane.wanted_teacher for lane in self.owner.lanes]


@pytest.fixture
def scene():
    """scene(teachers, *overrides); two lanes for each teacher."""
    owners: list[Owner] = []
    clock = SimpleNamespace(now=1000.0)

    def make(teachers: int, *overrides: str) -> Scene:
        settings = config.load(overrides=["teacher.model=fake:build", "ring.max_tokens=16", *overrides])
        owner = Owner(settings, 2 * teachers, teachers)
        owners.append(owner)
        owner.start_generation()
        return Scene(owner, settings, clock)

    yield make
    for owner in owners:
        owner.close()


def test_without_restarts_a_death_ends_the_run(scene):
    it = scene(1)
    assert not it.die(0)
    assert it.started == []


def test_one_that_was_never_ready_is_not_started_again(scene):
    it = scene(1, "teacher.restarts=5")
    it.teachers.replicas[0].was_ready = False
    assert not it.die(0)


def test_the_first_restart_is_at_once_and_the_next_ones_wait_longer(scene):
    it = scene(1, "teacher.restarts=4")
    for nth, pause in enumerate((0, 1, 2, 4)):
        assert it.die(0)
        if pause:
            it.tick(pause - 0.01)
        assert len(it.started) == nth
        it.tick(0.02)
        assert len(it.started) == nth + 1
    assert not it.die(0)
    assert "restart 4 of 4" in it.told[-1]


def test_wait_tries_until_the_request_times_out_with_growing_pauses(scene):
    it = scene(1, "teacher.restarts=1", FOREVER, "timeouts.request_s=200")
    began, times = it.clock.now, []
    while it.die(0):
        while len(it.started) == len(times):
            it.tick(0.25)
        times.append(it.started[-1][0])
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert it.clock.now - began >= 200


def test_none_is_started_while_a_process_of_the_last_one_may_be_there(scene):
    it = scene(2, "teacher.restarts=1")
    assert it.die(0, slow=True)
    it.tick(5)
    assert (it.started, it.lanes) == ([], [0, 1, 0, 1])
    it.job(0).exit = "killed"
    it.tick()
    assert [replica for _, replica in it.started] == [0]
    assert it.lanes == [1, 1, 1, 1]


def test_lanes_go_to_the_living_and_are_asked_back(scene):
    it = scene(3, "teacher.restarts=1")
    assert it.die(1)
    it.tick()
    assert sorted(it.lanes) == [0, 0, 0, 2, 2, 2]
    it.tick(1)
    assert 1 not in it.wanted
    it.load(1)
    it.tick(1)
    assert it.wanted == [0, 1, 2, 0, 1, 2]
    assert sum("is back after" in line for line in it.told) == 1


def test_one_that_dies_again_while_it_loads_is_a_new_death(scene):
    it = scene(2, "teacher.restarts=2")
    assert it.die(0)
    it.tick()
    assert it.excused == set()
    assert it.die(0)
    assert it.excused == {0}
    it.tick(1.5)
    assert len(it.started) == 2
    assert it.lanes == [1, 1, 1, 1]


def test_lanes_on_their_way_back_to_one_that_dies_again_stay(scene):
    it = scene(2, "teacher.restarts=2")
    assert it.die(0)
    it.tick()
    it.load(0)
    it.tick()
    assert it.wanted == [0, 1, 0, 1]
    assert it.die(0)
    it.owner.lanes[0].teacher = 0  # teacher 1 had not heard of it
    it.tick()
    assert (it.lanes, it.wanted) == ([1, 1, 1, 1], [1, 1, 1, 1])


def test_lanes_are_not_given_to_one_that_has_ended(scene):
    it = scene(2, "teacher.restarts=1")
    it.owner.control.teachers[1].enter(Phase.CLOSED)
    assert it.die(0)
    it.tick()
    assert it.lanes == [0, 1, 0, 1]


def test_lanes_that_were_left_with_one_that_has_ended_come_home(scene):
    it = scene(2, "teacher.restarts=1")
    assert it.die(0)
    it.tick()
    it.job(1).exit = "well"
    it.load(0)
    it.tick()
    it.tick()
    assert [it.lanes[0], it.lanes[2]] == [0, 0]


def test_a_lost_teacher_stays_lost(scene):
    it = scene(1, "on_teacher_lost=continue")
    assert it.die(0)
    for _ in range(3):
        it.tick(1)
    assert it.owner.control.teachers[0].lost
    assert not any("is back" in line for line in it.told)
    assert it.started == []
    assert it.excused == {0}


def test_lanes_of_a_lost_replica_are_served_by_the_living(scene):
    it = scene(2, "on_teacher_lost=continue")
    assert it.die(0)
    it.tick()
    assert it.lanes == [1, 1, 1, 1]
    it.owner.start_generation()
    assert it.lanes == [1, 1, 1, 1]
    assert it.die(1)
    it.tick()
    assert it.owner.control.teachers[1].lost


def test_another_offer_is_told_before_it_is_ready(scene):
    it = scene(1, "teacher.restarts=1")
    assert it.die(0)
    it.tick()
    record = it.owner.control.teachers[0]
    record.write_offer(Offer(OFFER.outputs, "fake", vocab_size=5).encode())
    with pytest.raises(PlanError, match=r"vocab_size 5, not 4\. Did the model change on the disk\?"):
        it.tick()


# Training


def lanes(*of: tuple[int | None, int]):
    """(step, replied) of each rank."""
    return [
        SimpleNamespace(records=[SimpleNamespace(step=step)], ring=SimpleNamespace(replied=replied))
        for step, replied in of
    ]


def test_training_is_started_again_while_it_gets_on():
    restarts = Restarts(3)
    assert restarts.refused(lanes((4, 5), (3, 4))) == ""
    assert restarts.refused(lanes((9, 5), (None, 0))) == ""
    assert restarts.refused(lanes((9, 5), (8, 5))) == "it came no further than step 9 again"
    assert restarts.refused(lanes((10, 2))) == ""
    assert "used up" in restarts.refused(lanes((11, 2)))


def test_a_generation_that_came_to_no_step_has_not_got_on():
    """Though the parity check has replies."""
    restarts = Restarts(9)
    assert restarts.refused(lanes((4, 5))) == ""
    assert restarts.refused(lanes((None, 2))) == "it came no further than step 4 again"


def test_a_script_without_steps_gets_on_by_replies():
    restarts = Restarts(2)
    assert restarts.refused(lanes((None, 0), (None, 0))) == "it got no reply before it crashed"
    assert restarts.refused(lanes((None, 1), (None, 0))) == ""
    assert restarts.refused(lanes((None, 1), (None, 0))) == ""
    assert "used up" in restarts.refused(lanes((None, 7)))


def test_no_restarts_are_no_restarts():
    assert Restarts(0).refused(lanes((4, 5))) == "train.restarts is 0"
