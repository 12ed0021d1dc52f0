"""The fault campaign of campaign.py, in processes without torch, whose children are cheap to fork and to kill."""

from __future__ import annotations

import pytest

from tests.protocol.running import module


def campaign(*arguments: str) -> tuple[int, str]:
    """Run it; its exit status and what it printed."""
    return module("campaign", *arguments)


# Where each side writes shared memory, or sleeps. A campaign that does not pass through all of it has lost a part of the protocol.
RANK = """Record.enter Record.at Ring.write_request Ring.publish_request Ring.abandon Ring.release RankSession.ring_teacher
Doorbell.wait RankSession.close Word.__set__"""
TEACHER = "Record.enter Ring.write_reply Ring.publish_reply TeacherSession.ring_members Doorbell.wait"
WRITES = {
    "rank whole": f"{RANK} Record.sign_in",
    "rank streamed": f"{RANK} Ring.consume",
    "teacher whole": f"{TEACHER} Record.sign_in Record.write_offer TeacherSession.open_barrier Ring.skip_reply Word.__set__",
    "teacher streamed": f"{TEACHER} Ring.write_chunk Ring.publish_chunk",
}
EVERY_VICTIM = pytest.mark.parametrize("victim", ["teacher", "rank"])
EVERY_SCENARIO = pytest.mark.parametrize("scenario", ["whole", "streamed"])


@EVERY_SCENARIO
@EVERY_VICTIM
@pytest.mark.parametrize(
    "stride", [pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.promise(5))]
)
def test_a_kill_at_every_line_leaves_what_the_others_can_read(victim, scenario, stride, promise):
    """Every line, or every fifth one."""
    status, text = campaign("--victim", victim, "--scenario", scenario, "--stride", str(stride))
    assert status == 0, text
    *_, passed, counted = text.splitlines()
    assert set(WRITES[f"{victim} {scenario}"].split()) <= set(passed.split()), text
    points = int(counted.split(": ")[1].split()[0])
    assert points > 100 // stride, text
    promise.kept(f"{victim} killed at {points} points of the protocol: nothing half-written was read")


@EVERY_SCENARIO
@pytest.mark.parametrize("paused", ["teacher", "rank"])
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 11])
def test_a_pause_at_any_line_changes_nothing(paused, scenario, stride):
    """The other side moves as far as it can while one stands still at every line, or at every eleventh one."""
    status, text = campaign("--victim", paused, "--scenario", scenario, "--pause", "--stride", str(stride))
    assert status == 0, text


@pytest.mark.parametrize(
    ("mutant", "victim", "stride", "what"),
    [
        ("publish_before_write_request", "rank", 1, "the request slot"),
        ("publish_before_write_reply", "teacher", 3, "the reply slot"),
        ("publish_before_write_chunk", "teacher", 1, "chunk 0 of generation 1, sequence 0 holds generation 0"),
        ("publish_without_a_ring", "teacher", 9, "a ring was lost"),
    ],
)
def test_a_protocol_that_is_broken_on_purpose_is_found(mutant, victim, stride, what):
    status, text = campaign("--victim", victim, "--scenario", "streamed", "--mutant", mutant, "--stride", str(stride))
    assert status == 1, text
    assert what in text, text
