"""Which sessions there are, and which one is meant."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher import registry, sessions
from shmbridge import config
from shmbridge.errors import ConfigError
from shmbridge.shm import layout, owner
from shmbridge.shm.layout import ControlWord, Header
from shmbridge.shm.owner import Owner
from shmbridge.shm.rank_session import RankSession

SETTINGS = config.load(overrides=["teacher.model=a:b", "ring.max_tokens=64", "run_dir=/runs/one"])


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    """Only what the test makes: other tests have sessions of their own meanwhile."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before, every = set(owner.objects()), owner.objects
    monkeypatch.setattr(
        owner, "objects", lambda only=None: {key: names for key, names in every(only).items() if key in mine}
    )
    mine: set[str] = set()
    make = owner._create_control

    def remember(*arguments):
        session_id, segment = make(*arguments)
        mine.add(session_id)
        return session_id, segment

    monkeypatch.setattr(owner, "_create_control", remember)
    yield mine
    for session_id in mine - before:
        with owner.lock_if_dead(session_id) as dead:
            if dead:
                owner.unlink_session(session_id)


@pytest.fixture
def session():
    with Owner(SETTINGS, 2) as made:
        made.start_generation()
        yield made


def dead_session(mine: set[str]) -> str:
    """What a killed launcher leaves."""
    read, write = os.pipe()
    if os.fork() == 0:
        made = Owner(SETTINGS, 1)
        made.start_generation()
        os.write(write, made.session_id.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    session_id = os.read(read, 32).decode()
    os.wait()
    os.close(read)
    os.close(write)
    mine.add(session_id)
    return session_id


def test_a_live_session_is_told_with_its_name_run_and_ranks(session):
    rank = RankSession(session.start_generation(), 1)
    with registry.claim("exp") as name:
        name.describe(f"{session.session_id}@2", "/runs/one")
        (found,) = sessions.every()
    assert (found.name, found.state, found.run) == ("exp", "live", "/runs/one")
    assert (found.snapshot.generation, found.snapshot.launcher_pid) == (2, os.getpid())
    assert [one.attached for one in found.snapshot.ranks] == [False, True]
    assert found.snapshot.ranks[1].pid == rank.record.identity.pid


def test_a_dead_session_is_stale_until_it_is_reclaimed(own_world, session):
    session_id = dead_session(own_world)
    assert [(one.session_id, one.state) for one in sessions.every()][1:] == [(session_id, "stale")]
    with pytest.raises(ConfigError, match=r"is dead: its launcher was killed. `shmbridge-launch clean`"):
        sessions.find(session_id[:10])
    assert [found for found, _ in sessions.reclaim()] == [session_id]
    assert list(owner.objects()) == [session.session_id]


def test_a_session_that_its_owner_removes_meanwhile_is_not_told_as_reclaimed(monkeypatch):
    monkeypatch.setattr(owner, "objects", lambda session_id=None: {} if session_id else {"ab" * 16: ["gone"]})
    assert list(sessions.reclaim()) == []


def test_a_session_is_found_by_name_by_id_by_its_beginning_and_alone(session):
    with registry.claim("exp") as name:
        name.describe(f"{session.session_id}@1", "/runs/one")
        for asked in ("exp", session.session_id, session.session_id[:5], ""):
            assert sessions.find(asked).session_id == session.session_id


def test_what_is_not_there_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match="no session of this user is live"):
        sessions.find("")
    with Owner(SETTINGS, 1) as one:
        with pytest.raises(ConfigError, match=f"there is no session 'nope'; live: {one.session_id[:8]}"):
            sessions.find("nope")
        with Owner(SETTINGS, 1) as other:
            with pytest.raises(ConfigError, match="there are 2 live sessions, name one: ") as told:
                sessions.find("")
            assert all(made.session_id[:8] in str(told.value) for made in (one, other))
            assert sessions.find(other.session_id).session_id == other.session_id


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (Header.VERSION, "layout version 99"),
        (Header.MAGIC, "foreign, garbled or half-made"),
        (ControlWord.LANES, "lane2 does not exist"),
    ],
)
def test_a_garbled_session_is_told_as_such(session, word, told):
    words, before = session.control.segment.words, session.control.segment.words[word]
    words[word] = 99 if word is not ControlWord.LANES else 2**40
    (found,) = sessions.every()
    assert found.state == "unreadable"
    assert told in found.problem
    with pytest.raises(ConfigError, match="is not readable"):
        sessions.find(session.session_id)
    words[word] = before


def test_garbled_settings_and_a_lane_that_is_gone_are_told_as_such(session):
    Path(f"/dev/shm{session.names.lane(1, 0)}").unlink()
    assert "does not exist" in sessions.every()[0].problem
    session.control.words[ControlWord.SETTINGS_NBYTES] = layout.SETTINGS_CAPACITY + 1
    assert "bytes of settings: garbled" in sessions.every()[0].problem


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_session_is_told_as_such_and_is_never_reclaimed(own_world):
    session_id = dead_session(own_world)
    os.chown(owner.SHM_DIRECTORY / owner.objects()[session_id][0], 12345, -1)
    (found,) = sessions.every()
    assert (found.state, found.problem) == ("unreadable", "it belongs to uid 12345")
    assert list(sessions.reclaim()) == []
    assert session_id in owner.objects()


def test_a_session_before_its_first_generation_has_no_ranks():
    with Owner(SETTINGS, 2):
        assert sessions.every()[0].snapshot.ranks == []
