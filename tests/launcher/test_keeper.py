"""A teacher kept across runs: real keepers and launchers as processes, over teachers and ranks without torch."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading

import msgspec
import pytest

from launcher import registry
from launcher.cli import teacher as teacher_commands
from launcher.cli.main import main
from launcher.console.terminal import Console
from launcher.keeper import agreement, messages, transport
from launcher.keeper.client import Connection, RemoteSession
from shmbridge import config
from shmbridge.errors import ConfigError, LauncherDied, SessionInUse
from shmbridge.shm import owner, process
from tests.harness import PATIENCE_S, until
from tests.launcher.kept import Kept, ended, keeping, objects
from tests.launcher.running import HERE, launch


def test_start_status_stop(kept):
    run = kept.start()
    assert "teacher ready in" in run.text
    short, directory = kept.status["session"][:8], kept.status["run"]
    assert re.search(rf"^{short} .* {re.escape(directory)}$", seen(kept, "ls"), re.M)  # also before its first group
    assert "shmbridge-launch --attach big" in run.text
    status = kept.status
    assert status["state"] == "idle"
    assert status["held by"] == "nobody"
    assert status["answered"] == "0 requests"
    assert f"pid {kept.keeper}" in status["keeper"]
    assert registry.directory().joinpath("big.sock").stat().st_mode & 0o777 == 0o600
    assert os.getsid(kept.keeper) == kept.keeper
    kept.stop()


def test_ls_and_status_tell_a_keeper_from_a_launcher_and_find_a_rank_that_has_not_connected(kept):
    kept.start()
    keeper = kept.keeper
    short = kept.status["session"][:8]
    assert re.search(rf"^{short}  big +live +keeper {keeper} +no group +idle", seen(kept, "ls"), re.M)
    page = seen(kept, "status", "big")
    assert f"session big ({short}), keeper pid {keeper}," in page
    assert "rank" not in page.replace(str(kept.directory), "")
    with kept.attach("absent", ranks=1) as run:
        run.says("here without a connection")
        rank = re.search(r"rank 0, pid (\d+), is here", run.text)[1]
        assert re.search(rf"^  rank 0 +{rank} +- +not attached", seen(kept, "status", "big"), re.M)
        assert re.search(rf"^{short}  big +live +keeper {keeper} +0 of 1", seen(kept, "ls"), re.M)
        run.signal(signal.SIGINT)
        assert ended(run) == 130
    until(lambda: "no group" in seen(kept, "ls"), "a teacher without a group")
    kept.stop()


def seen(kept: Kept, *words: str) -> str:
    """What a command prints."""
    with launch(kept.directory, *words) as run:
        assert run.process.wait(60) == 0, run.text
        return run.text


def test_groups_follow_each_other_under_one_loaded_teacher(kept):
    """Also with another number of ranks."""
    kept.start()
    teacher = kept.teacher
    for ranks, answered in ((2, 2), (3, 5), (1, 6)):
        with kept.attach("asks", ranks=ranks) as run:
            assert ended(run) == 0, run.text
            assert run.text.count(" is up.") == ranks
        assert kept.status["answered"] == f"{answered} request{'s' if answered > 1 else ''}"
    assert (kept.teacher, kept.loaded) == (teacher, 1)
    until(lambda: kept.status["state"] == "idle", "an idle teacher")
    until(lambda: not any("-reply" in name for name in objects(kept)), "the reply memory's return")
    kept.stop()


def test_the_second_group_is_told_who_holds_it(kept):
    kept.start()
    with kept.attach("wait") as first:
        first.says(" is up.", times=2)
        with kept.attach("ok") as second:
            assert second.process.wait(60) == 2
            assert re.search(
                rf"held by pid {first.process.pid} \(run directory {kept.directory}/runs/\S+\) since 20", second.text
            )
        status = kept.status
        assert (status["state"], f"pid {first.process.pid}" in status["held by"]) == ("held", True)
        code, text = kept.command("stop")
        assert code == 2
        assert f"held by pid {first.process.pid}" in text
        assert "--force" in text
        first.signal(signal.SIGINT)
        assert ended(first) == 130
        assert "SIGKILL" not in first.text
    with kept.attach("ok") as third:
        assert ended(third) == 0
    kept.stop()


def test_the_first_to_come_holds_a_session_that_loads(kept, gate):
    """Its ranks start meanwhile."""
    start = kept.begin(FAKE_TEACHER="gated", FAKE_GATE=str(gate))
    start.says("loads the model")
    with kept.attach("wait") as first:
        until(lambda: first.ranks_signed_in, "ranks at the barrier")
        assert kept.status["state"] == "loading (loading, 1 of 4)"
        assert f"pid {first.process.pid}" in kept.status["held by"]
        with kept.attach("wait") as second:
            assert second.process.wait(60) == 2
            assert f"held by pid {first.process.pid}" in second.text
        assert " is up." not in first.text
        gate.write_bytes(b"")
        assert start.process.wait(60) == 0
        first.says(" is up.", times=2)
        code, text = kept.command("stop", "--force")
        assert code == 0, text
        assert ended(first) == 143
        assert "the kept teacher big is stopped (by pid" in first.text
    kept.is_gone()


def test_other_settings_are_refused_by_name_with_both_values(kept):
    kept.start()
    with kept.attach("ok", "payload.topk.k=16", "ring.depth=4", "--teacher", "other:build") as run:
        assert run.process.wait(60) == 2
        rows = [line.split() for line in run.text.splitlines()]
        assert ["payload.topk.k", "8", "16"] in rows
        assert ["ring.depth", "2", "4"] in rows
        assert ["teacher.model", "fake:build", "other:build"] in rows
        assert "Leave these out" in run.text
        assert not list(kept.directory.glob("runs/*/torchrun.log"))
    with kept.attach("ok", "payload.topk.k=8", "--teacher", "fake:build", "log.stats_every=7") as run:
        assert ended(run) == 0, run.text
    kept.stop()


def test_an_installation_of_another_version_is_refused():
    kept, here = ({"shmbridge": f"0.{i}.0", "segment layout": str(i)} for i in (1, 2))
    with pytest.raises(ConfigError, match=r"shmbridge +0\.1\.0 +0\.2\.0\n +segment layout +1 +2"):
        agreement.check_versions("big", kept, here)


def test_a_tokenizer_that_changed_on_the_disk_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    before = agreement.tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{ }")
    after = agreement.tokenizer(str(tmp_path))
    settings = config.load(overrides=["teacher.model=x:y"])
    with pytest.raises(ConfigError, match="tokenizer"):
        agreement.check_settings("big", settings, settings, (before, after))


def test_the_death_of_the_launcher_ends_its_group_and_not_the_teacher(kept):
    kept.start()
    with kept.attach("wait") as run:
        run.says(" is up.", times=2)
        run.signal(signal.SIGKILL)
        run.process.wait(60)
        until(lambda: not run.processes(), "the end of the ranks")
    kept.serves()
    assert "is gone without a word; its generation is ended" in kept.log
    kept.stop()


def test_a_group_for_which_dev_shm_has_no_room_is_refused_and_the_next_one_is_served(kept):
    """Without room for its lanes, and without room for its replies."""
    full = kept.directory / "full"
    kept.start(FAKE_FULL=str(full))
    before = objects(kept)
    for room in (2, 4):
        full.write_text(str(room))
        with kept.attach("ok") as run:
            assert run.process.wait(60) == 2
            assert re.search(r"/dev/shm has .* MiB free, segment .*Lower ring\.max_tokens", run.text)
            assert "Fewer ranks need less" in run.text
        full.unlink()
        assert [name for name in objects(kept) if "-reply" in name] == []
        assert room > 2 or objects(kept) == before
    kept.serves(ranks=3)
    kept.stop()


@pytest.mark.parametrize(
    ("training", "code"),
    [
        ("killed", 137),
        pytest.param("exit7", 7, marks=pytest.mark.matrix),
        pytest.param("raise", 1, marks=pytest.mark.matrix),
    ],
)
def test_a_crash_of_training_leaves_the_teacher_loaded(kept, training, code):
    kept.start()
    with kept.attach(training) as run:
        assert ended(run) == code
        assert "The run failed" in run.text
        assert "rank 1" in run.text
    kept.serves()
    kept.stop()


def test_a_teacher_that_died_for_good_is_the_cause_in_both_reports(kept):
    start = kept.start()
    with kept.attach("wait") as run:
        run.says(" is up.", times=2)
        os.kill(kept.teacher, signal.SIGKILL)
        assert ended(run) == 137
        assert re.search(r"The run failed after [\d.]+ s: teacher was killed by SIGKILL", run.text)
        assert "TeacherDied" in next(kept.directory.glob("runs/*/torchrun.log")).read_text()
    until(lambda: not start.processes(), "the end of the keeper")
    assert "teacher was killed by SIGKILL" in kept.log
    kept.is_gone()


def test_a_teacher_that_dies_between_groups_is_started_again(kept):
    kept.start("--teacher-restarts", "1")
    first = kept.teacher
    os.kill(first, signal.SIGKILL)
    kept.serves(loaded=2)
    assert kept.teacher != first
    kept.stop()


def test_a_stopped_group_is_served_until_its_ranks_have_saved_and_the_teacher_stays(kept):
    kept.start()
    gate = kept.directory / "gate"
    with kept.attach("notes", FAKE_GATE=str(gate)) as run:
        run.says(" is up.", times=2)
        run.signal(signal.SIGINT)
        run.says("takes note of 2", times=2)
        gate.with_name("gate0").touch()
        run.says("rank 0 saves beside sleeping teacher")
        assert kept.status["state"] == "held"
        gate.with_name("gate1").touch()
        assert ended(run) == 130, run.text
        assert "rank 1 saves beside sleeping teacher" in run.text
        assert run.text.count("takes note") == 2
    kept.serves()
    kept.stop()


def test_the_death_of_the_keeper_ends_everything_and_the_next_start_reclaims(kept):
    start = kept.start()
    session = kept.status["session"]
    with kept.attach("wait") as run:
        run.says(" is up.", times=2)
        os.kill(kept.keeper, signal.SIGKILL)
        assert ended(run) == 1
        assert "the keeper of the teacher big (pid" in run.text
        assert "is gone without a word: killed?" in run.text
    until(lambda: not start.processes(), "the end of the teacher")
    code, text = kept.command("status")
    assert code == 2
    assert "was killed. Start it with" in text
    kept.start()
    assert session not in owner.objects()  # whoever started first has reclaimed it
    kept.stop()


def test_a_signal_to_the_keeper_ends_everything(kept):
    start = kept.start()
    with kept.attach("wait") as run:
        run.says(" is up.", times=2)
        os.kill(kept.keeper, signal.SIGINT)
        assert ended(run) == 143
        assert "is stopped by SIGINT" in run.text
    until(lambda: not start.processes(), "the end of the keeper")
    kept.is_gone()


def test_a_keeper_reports_a_teacher_that_is_stopped_while_no_group_is_there(kept):
    kept.start("timeouts.report_s=1")
    teacher = kept.teacher
    os.kill(teacher, signal.SIGSTOP)
    until(lambda: f"teacher (pid {teacher}) is stopped" in kept.log and "hang report" in kept.log, "a hang report")
    os.kill(teacher, signal.SIGCONT)
    assert next(kept.directory.glob("runs/*/hang-1.json")).exists()
    kept.stop()


def test_a_teacher_that_never_finishes_with_crashed_training_fails_the_group(kept, gate):
    """Before the next generation of training could begin."""
    kept.start(FAKE_DRAINED=str(gate))
    with kept.attach("crashes once", "--train-restarts", "1", "timeouts.request_s=2") as run:
        assert ended(run) == 2
        assert "has not finished what the crashed training has left after 2.0 s" in run.text
    assert kept.status["state"] == "finishing what the last training group left"
    gate.write_bytes(b"")
    until(lambda: kept.status["state"] == "idle", "an idle teacher")
    kept.stop()


def test_in_the_foreground_ctrl_c_ends_it(kept):
    run = kept.begin("--foreground", "--cpu", "3")
    run.says("ready; train with: shmbridge-launch --attach big --cpu 3 -- train.py\n")
    run.signal(signal.SIGINT)
    assert run.process.wait(60) == 130
    kept.is_gone()


def test_names_that_are_taken_or_no_kept_teacher(kept):
    with registry.claim("run") as run:
        run.describe("ab" * 16, "/runs/run")
        with keeping(kept.directory, "run") as other:
            code, text = other.command("status")
        assert code == 2
        assert "'run' is a run (pid" in text
        assert "not a kept teacher; there is none" in text
    kept.start()
    second = kept.begin()
    assert second.process.wait(60) == 2
    assert re.search(
        r"'big' is held by a kept teacher \(pid \d+, run directory /.*--attach big.*teacher stop big", second.text
    )
    assert "--name" not in second.text
    with keeping(kept.directory, "small") as other:
        code, text = other.command("stop")
        assert code == 2
        assert "no teacher is kept under the name 'small'; there are: big" in text
        assert "teacher start" not in text
    registry.directory().joinpath("big.sock").unlink()
    code, text = kept.command("status")
    assert code == 2
    assert f"End it with `kill {kept.keeper}`" in text
    os.kill(kept.keeper, signal.SIGTERM)
    until(lambda: not kept.runs[0].processes(), "the end of the keeper")
    kept.is_gone()


@pytest.mark.parametrize(
    ("name", "message"),
    [("../big model", "`name` is '../big model'; use at most"), ("ring.depth=2", "the first word after")],
)
def test_a_name_that_cannot_be_one_is_refused(name, message, capsys):
    assert main(["teacher", "start", name, "--teacher", "toy:build", "--cpu", "1"]) == 2
    assert message in capsys.readouterr().err


class Mute:
    """A keeper that says what it is given, one message for each that it hears, and nothing else."""

    def __init__(self, *answers: messages.Message) -> None:
        self._answers = answers

    def __enter__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(registry.claim("big", kept=True))
        listener = self._stack.enter_context(transport.listening("big"))
        listener.setblocking(True)
        self._thread = threading.Thread(target=self._talk, args=(listener,), daemon=True)
        self._thread.start()

    def _talk(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for answer in self._answers:
                connection.recv(65536)
                connection.send(msgspec.json.encode(answer) + b"\n")
            while connection.recv(65536):  # until the other side has closed
                pass

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE_S)
        self._stack.close()


@pytest.fixture
def welcome(tmp_path, monkeypatch) -> messages.Welcome:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    settings = config.load(overrides=["teacher.model=fake:build"])
    return messages.Welcome(agreement.versions(), msgspec.Raw(config.to_json(settings)))


def test_a_keeper_that_says_nothing_is_given_up(welcome):
    with Mute(welcome), contextlib.closing(Connection("big")) as line:
        line.send(messages.Look())
        with pytest.raises(LauncherDied, match=r"has said nothing for 0\.0 s; it is (running|sleeping)"):
            line.answer(0.0, messages.Standing)


def test_asking_for_a_generation_holds_up_no_loop(welcome):
    """Neither before the keeper answers, nor while it says that none can begin: then it is asked again."""
    settings, printed = config.from_json(bytes(welcome.settings)), io.StringIO()
    answers = messages.Waiting("big is busy"), messages.Refused("held", "big is held")
    with Mute(welcome, *answers), contextlib.closing(Connection("big")) as line:
        session = RemoteSession(line, settings, Console(printed))
        assert session.begin(settings, 2) is None
        with pytest.raises(SessionInUse, match="big is held"):
            until(lambda: session.begin(settings, 2), "the second answer")
        assert printed.getvalue() == "[launcher] big is busy; waiting\n"


def test_a_group_does_not_wait_for_ever_for_a_teacher_that_drains(kept, gate):
    kept.start(FAKE_DRAINED=str(gate))
    with kept.attach("ok") as run:
        assert ended(run) == 0
    with kept.attach("ok", "timeouts.startup_s=1") as run:
        assert ended(run) == 2
        assert "big is finishing what the last training group left after 1.0 s (timeouts.startup_s)" in run.text
    gate.write_bytes(b"")
    kept.stop()


def test_a_stop_says_what_it_waits_for_and_gives_up(welcome, capsys, monkeypatch):
    monkeypatch.setattr(teacher_commands, "_QUIET_S", 0.05)
    with Mute(welcome, messages.Leaving("stopped", "the training group of pid 7 and the teacher", 0.2)):
        assert main(["teacher", "stop", "big"]) == 2
    out, err = capsys.readouterr()
    assert out == "waiting for the training group of pid 7 and the teacher to end, at most 0.2 s\n"
    assert re.search(
        rf"\(pid {os.getpid()}\) has not ended within 0\.2 s; it is running. `kill -KILL {os.getpid()}`", err
    )


@pytest.mark.parametrize(("stopped_by", "code"), [("a signal", 130), ("a command", 1)])
def test_a_start_fails_where_it_is_stopped_before_the_teacher_is_ready(kept, gate, stopped_by, code):
    run = kept.begin(FAKE_TEACHER="gated", FAKE_GATE=str(gate))
    run.says("loads the model")
    if stopped_by == "a signal":
        run.signal(signal.SIGINT)
    else:
        kept.command("stop")
    assert run.process.wait(60) == code
    assert "the kept teacher big is stopped" in run.text
    kept.is_gone()


def test_a_keeper_tells_the_traceback_of_its_teacher_once(kept):
    run = kept.begin(FAKE_TEACHER="raises")
    assert run.process.wait(60) == 1
    assert kept.log.count("Traceback (most recent call last)") == 1
    assert "ValueError: no such weights" in kept.log
    assert "Traceback" in next(kept.directory.glob("runs/*/teacher.log")).read_text()
    kept.is_gone()


def connected() -> socket.socket:
    visitor = socket.socket(socket.AF_UNIX)
    with registry.socket_path("big") as path:
        visitor.connect(path)
    visitor.settimeout(PATIENCE_S)
    return visitor


def test_what_a_peer_said_before_it_went_is_heard_after_a_send_that_failed():
    mine, other = socket.socketpair()
    lines = transport.Lines(mine, messages.AT_CLIENT)
    other.sendall(msgspec.json.encode(messages.Refused("held", "too many")) + b"\n")
    other.close()
    lines.send(messages.Hello())
    assert lines.receive() == [messages.Refused("held", "too many")]
    lines.receive()
    assert not lines.open


_STARTS = """
import os, signal
from shmbridge.launch import load_launcher
load_launcher()
from launcher.cli import teacher
from launcher.console.terminal import Console
from launcher.process.signals import exit_on_interrupt
exit_on_interrupt()
def keep(told):
    print(os.getpid(), flush=True)
    os.write(told, f"{os.getcwd()}\\nready".encode())
    signal.pause()
assert teacher._in_background(keep, Console()) == 0
os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_once_the_teacher_is_ready_leaves_the_keeper(tmp_path):
    with subprocess.Popen([sys.executable, "-c", _STARTS], cwd=tmp_path, stdout=subprocess.PIPE) as starter:
        assert starter.stdout
        keeper = int(starter.stdout.readline())
        try:
            assert starter.wait(60) == -signal.SIGINT
            assert process.state(keeper) not in ("gone", "zombie")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(keeper, signal.SIGKILL)


def test_garbage_on_the_socket_ends_that_connection_alone(kept):
    kept.start()
    with kept.attach("wait") as run:
        run.says(" is up.", times=2)
        for said in (
            b"\0\xff\n",
            b"{}\n",
            b'{"kind":"End"}\n',
            b'{"kind":"Attach"}\n',
            b"[" * 10**5 + b"\n",
            b"x" * 10**6,
        ):
            with (
                connected() as visitor,
                contextlib.suppress(ConnectionError),
            ):  # put out while it sends, or with its words unread
                visitor.sendall(said)
                assert visitor.recv(65536) == b""
        with connected() as visitor, contextlib.suppress(ConnectionError):
            visitor.sendall(b'{"kind":"Look"}\n' * 20000)  # and never reads
        assert kept.status["state"] == "held"
        run.signal(signal.SIGTERM)
        assert ended(run) == 143
    kept.stop()


def test_a_visitor_too_many_and_a_group_too_large_are_refused_and_nobody_is_put_out(kept):
    kept.start()
    with contextlib.ExitStack() as visitors:
        early = visitors.enter_context(contextlib.closing(Connection("big")))
        for _ in range(255):
            visitors.enter_context(connected())
        with pytest.raises(SessionInUse, match="the kept teacher big has 256 connections, the most"):
            Connection("big")
        settings = config.from_json(bytes(early.welcome.settings))
        with pytest.raises(ConfigError, match=r"1000000 ranks need 3 file descriptors .* \d+ ranks at most"):
            early.ask(messages.Begin(settings, 10**6, ""), messages.Begun)
        assert early.ask(messages.Begin(settings, 2, ""), messages.Begun).generation == 1
    kept.stop()


TRAIN = """
import os, signal, sys, time, torch, shmbridge, teachers
from pathlib import Path
from torch.nn.functional import cross_entropy

def losses(answer, rank):
    student = torch.zeros(teachers.VOCAB, teachers.VOCAB, requires_grad=True)
    for step in range(3):
        ids = (torch.arange(8).reshape(2, 4) * (step + 2) + rank) % teachers.VOCAB
        loss = cross_entropy(student[ids].flatten(0, 1), answer(ids, step).softmax(-1).flatten(0, 1))
        student.data -= 10 * torch.autograd.grad(loss, student)[0]
        yield f"rank {rank}, step {step}: {loss.item().hex()}\\n"

if __name__ == "__main__":
    with shmbridge.connect() as bridge:
        bridge.wait_ready()
        for told in losses(lambda ids, step: bridge.exchange(ids, step=step).logits, bridge.rank):
            print(told, end="", flush=True)
        if sys.argv[1:] == ["crash"]:
            Path(f"trained{bridge.rank}").touch()
            while not Path("trained0").exists() or bridge.rank == 0:
                time.sleep(0.01)
            bridge.submit(torch.ones(1, 4, dtype=torch.int64), step=3)
            print(f"{time.monotonic():.6f} killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.promise(15, within="2 s")
def test_a_real_teacher_serves_a_group_that_crashes_and_the_next_one(kept, promise, monkeypatch):
    """With torchrun, torch and the teacher's own loop. Every rank has the losses of a loop that asks the teacher's table itself. A
    request is in flight at the crash; the next group has another number of ranks."""
    (kept.directory / "teachers.py").write_text((HERE.parent / "scripts" / "teachers.py").read_text())
    (kept.directory / "train.py").write_text(TRAIN)
    monkeypatch.syspath_prepend(str(kept.directory))
    plain = runpy.run_path(str(kept.directory / "train.py"))
    table = plain["teachers"].Linear().table
    kept.settings = ("teacher.model=teachers:build", "ring.max_tokens=64")
    kept.start()
    teacher = kept.teacher
    for ranks, words, code in ((2, ["crash"], 137), (1, [], 0)):
        command = ["--attach", "big", "--cpu", str(ranks), "--", "train.py", *words]
        with launch(kept.directory, *command) as run:
            if words:
                (killed,) = run.moments("killed")
                took_s = run.says("; stopping") - killed
            assert ended(run) == code, run.text
            for rank in range(ranks):
                told = list(plain["losses"](lambda ids, step: table[ids], rank))
                assert len(set(told)) == 3
                assert all(line in run.text for line in told), run.text
    assert kept.teacher == teacher
    log = next(kept.directory.glob("runs/*/teacher.log")).read_text()
    assert log.count("answered this training group in ") == 2
    assert "the teacher ends" not in log
    kept.stop()
    promise.kept("each step's loss was right; the next group was served by the teacher, loaded once", took_s, 137)
