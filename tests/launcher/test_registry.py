"""Names of live sessions, and where they are kept."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher import registry
from shmbridge.errors import ConfigError, SessionInUse


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


def test_a_directory_that_others_may_write_or_that_cannot_be_made_is_refused(runtime):
    (runtime / "shmbridge").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        registry.directory()
    (runtime / "shmbridge").rmdir()
    (runtime / "shmbridge").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
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
