"""report, status, ls and clean, as they are typed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys

import msgspec
import pytest

from launcher import registry
from launcher.cli import commands
from launcher.cli.main import main
from launcher.keeper import transport
from shmbridge.errors import SessionInUse
from shmbridge.shm import owner
from shmbridge.shm.owner import Owner
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.teacher_session import TeacherSession
from tests.harness import until
from tests.launcher.test_sessions import SETTINGS, dead_session, own_world

__all__ = ["own_world"]


@pytest.fixture
def session(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    settings = msgspec.structs.replace(SETTINGS, run_dir=str(run))
    with Owner(settings, 2) as made:
        token = made.start_generation()
        with registry.claim("exp") as name:
            name.describe(str(token), str(run))
            teacher = TeacherSession(token)
            teacher.attach(token.generation)
            teacher.open_barrier()
            for rank in (0, 1):
                RankSession(token, rank)
            yield made


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    return code, *capsys.readouterr()


def test_status_is_a_table_of_participants_and_lanes(session, capsys):
    code, out, _ = run(capsys, "status", "exp")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"session exp ({session.session_id[:8]}), launcher pid {os.getpid()}, run ")
    assert re.search(rf"^  teacher +{os.getpid()} +- +starting", out, re.M)
    assert re.search(rf"^  rank 1 +{os.getpid()} +- +starting", out, re.M)
    assert re.search(r"^  rank 0 +2 +0 +0 +0 +0 +open$", out, re.M)
    assert max(map(len, lines[1:])) <= 120


def test_status_watch_shows_it_again_until_the_session_ends(tmp_path, monkeypatch):
    with Owner(SETTINGS, 1) as made:
        made.start_generation()
        file = tmp_path / "out"
        with file.open("wb") as out:
            shown = subprocess.Popen(
                [sys.executable, "-m", "shmbridge.launch", "status", made.session_id, "--watch"], stdout=out
            )
        until(lambda: file.read_text().count("launcher pid") >= 2, "a second page")
    assert shown.wait(60) == 0
    assert file.read_text().endswith(f"session {made.session_id[:8]} has ended\n")
    assert "\033" not in file.read_text()


def test_status_watch_draws_over_itself_on_a_terminal_and_ends_with_ctrl_c():
    with Owner(SETTINGS, 1) as made:
        made.start_generation()
        terminal, other = pty.openpty()
        command = [sys.executable, "-m", "shmbridge.launch", "status", made.session_id, "--watch"]
        shown = subprocess.Popen(command, stdout=other)
        os.close(other)
        text = b""
        while text.count(b"\033[H\033[J") < 2:
            text += os.read(terminal, 4096)
        shown.send_signal(signal.SIGINT)
        assert shown.wait(60) == 0
        os.close(terminal)


def test_report_is_printed_and_written(session, capsys, tmp_path):
    code, out, _ = run(capsys, "report")
    assert code == 0
    assert re.match(r"report, [\d:]+: asked for by shmbridge-launch report\n", out), "nothing hangs"
    assert (tmp_path / "run" / "hang-1.txt").read_text() == out
    told = json.loads(run(capsys, "report", "exp", "--json")[1])
    assert [one["who"] for one in told["facts"]["participants"]] == ["teacher", "rank 0", "rank 1"]
    assert told["verdict"]["sentence"]
    assert json.loads((tmp_path / "run" / "hang-2.json").read_text()) == told


def test_a_report_that_cannot_be_written_is_printed_all_the_same(session, capsys, tmp_path):
    (tmp_path / "run").rmdir()
    code, out, err = run(capsys, "report")
    assert code == 0
    assert "report, " in out
    assert "not written to" in err


def test_ls_has_a_line_for_each_session(session, own_world, capsys):
    dead = dead_session(own_world)
    _, out, _ = run(capsys, "ls")
    assert re.search(
        rf"^{session.session_id[:8]}  exp +live +launcher {os.getpid()} +2: starting +starting +/", out, re.M
    )
    assert re.search(rf"^{dead[:8]} +stale +\d+ objects in /dev/shm$", out, re.M)
    assert "shmbridge-launch clean" in out


def test_ls_without_sessions(capsys):
    assert run(capsys, "ls")[1] == "no sessions\n"


def test_clean_removes_what_is_dead_and_nothing_else(session, own_world, capsys):
    dead = dead_session(own_world)
    left = registry.directory() / "left.json"
    left.write_text(json.dumps({"pid": 2**22 + 1, "session": "", "run": ""}))
    count = len(owner.objects(dead)[dead])
    code, out, _ = run(capsys, "clean", "--dry-run")
    assert code == 0
    assert f"would remove {count} objects" in out
    assert dead in owner.objects()
    assert left.exists()
    _, out, _ = run(capsys, "clean")
    assert re.search(rf"^removed {count} objects \(.*iB\) of the dead session {dead[:8]}$", out, re.M)
    assert "removed the name 'left', which no live launcher holds" in out
    assert "1 live session untouched" in out
    assert list(owner.objects()) == [session.session_id]
    assert [path.name for path in registry.directory().iterdir()] == ["exp.json"]
    assert run(capsys, "clean")[1].startswith("nothing to remove\n")


def test_clean_leaves_a_name_alone_that_was_given_up_and_claimed_again_under_its_eyes(own_world, capsys, monkeypatch):
    """Between the moment it opens the file and the moment it has the lock; the second holder is a keeper with a socket."""
    flock, holders = fcntl.flock, contextlib.ExitStack()
    first = contextlib.ExitStack()
    first.enter_context(registry.claim("exp"))

    def claimed_anew(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.close()
        holders.enter_context(registry.claim("exp", kept=True))
        holders.enter_context(transport.listening("exp"))
        flock(file, how)

    with holders:
        monkeypatch.setattr(fcntl, "flock", claimed_anew)
        assert run(capsys, "clean")[1] == "nothing to remove\n"
        assert sorted(path.name for path in registry.directory().iterdir()) == ["exp.json", "exp.sock"]
        with pytest.raises(SessionInUse), registry.claim("exp"):
            pass


@pytest.mark.parametrize("name", ["report", "status"])
def test_a_session_that_is_not_there_is_an_error(name, capsys):
    code, _, err = run(capsys, name, "nope")
    assert code == 2
    assert err == f"shmbridge-launch {name}: there is no session 'nope'; no session of this user is live.\n"


@pytest.mark.parametrize("name", list(commands.COMMANDS))
def test_each_command_has_help_and_the_main_help_names_it(name, capsys):
    for argv in ([name, "--help"], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        assert name in capsys.readouterr().out
