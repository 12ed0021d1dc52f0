"""Names of live sessions, and what dead ones leave."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher import registry, sessions
from shmbridge import config
from shmbridge.errors import ConfigError, SessionInUse
from shmbridge.shm import owner
from shmbridge.shm.owner import Owner


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_a_name_is_held_once():
    with registry.claim("exp") as held:
        held.describe("ab" * 16, "/runs/exp")
        with pytest.raises(SessionInUse, match=f"pid {os.getpid()}, run directory /runs/exp"), registry.claim("exp"):
            pass
        with registry.claim("other"):
            pass
    with registry.claim("exp"):
        pass
    assert list(registry.directory().iterdir()) == []


def test_the_name_of_a_killed_launcher_is_free():
    child = os.fork()
    if child == 0:
        with registry.claim("exp"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [path.name for path in registry.directory().iterdir()] == ["exp.json"]
    with registry.claim("exp"):
        pass


def test_a_directory_that_others_may_write_is_refused(runtime):
    (runtime / "shmbridge").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        registry.directory()


@pytest.mark.parametrize("runtime_is", ["missing", "a file", "somebody else's"])
def test_without_a_usable_runtime_directory_names_are_in_tmp(tmp_path, monkeypatch, runtime_is):
    """After su or sudo -E it is the other user's."""
    path = tmp_path / "runtime"
    if runtime_is == "a file":
        path.touch()
    if runtime_is == "somebody else's":
        if os.geteuid() == 0:
            path.mkdir()
            os.chown(path, 65534, 65534)
        else:
            path = Path("/usr")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    assert registry.directory() == Path(f"/tmp/shmbridge-{os.geteuid()}")


def test_a_directory_that_cannot_be_made_is_a_message(runtime):
    (runtime / "shmbridge").touch()
    with pytest.raises(ConfigError, match="shmbridge"):
        registry.directory()


def test_a_session_that_its_owner_removes_meanwhile_is_not_told(monkeypatch):
    dying = "ab" * 16
    listing = {dying: []}
    monkeypatch.setattr(owner, "objects", lambda session_id=None: {} if session_id else listing)
    assert list(sessions.reclaim()) == []


def test_dead_sessions_are_reclaimed_and_live_ones_are_not():
    settings = config.load(overrides=["ring.max_tokens=64"])
    dead = dead_session(settings)
    with Owner(settings, lanes=1) as live:
        live.start_generation()
        removed = dict(sessions.reclaim())
        assert live.session_id not in removed
        assert live.session_id in owner.objects()
        assert dead not in owner.objects()


def dead_session(settings) -> str:
    """The id of a session whose owner was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        dead = Owner(settings, lanes=1)
        dead.start_generation()
        os.write(write, dead.session_id.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(write)
    with open(read, "rb") as file:
        return file.read().decode()
