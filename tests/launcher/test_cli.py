"""The command: flags and overrides, refusals before anything starts, and whole runs with torchrun itself."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.main import main
from shmbridge import config
from shmbridge.config import decode
from shmbridge.shm import owner
from tests.launcher.running import launch, launched

TEACHER = """
import time, torch
class Forward:
    vocab_size = 8
    def __call__(self, batch):
        return {"logits": torch.zeros(*batch.input_ids.shape, 8)}
def build(settings):
    return Forward()
"""

TRAIN = """
import os, signal, sys, time, torch, shmbridge
rank, mode = int(os.environ["LOCAL_RANK"]), sys.argv[1]
last = rank == int(os.environ["WORLD_SIZE"]) - 1
if mode == "early" and last:
    raise FileNotFoundError("no data here")
bridge = shmbridge.connect()
bridge.wait_ready()
reply = bridge.exchange(torch.ones(1, 4, dtype=torch.int64), step=0)
print(f"rank {rank} has a reply: {not reply.missing}", flush=True)
while mode == "loop":
    bridge.exchange(torch.ones(1, 4, dtype=torch.int64))
if mode == "exit7" and last:
    sys.exit(7)
if mode == "killed" and last:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "raise" and last:
    raise RuntimeError("boom")
bridge.close()
"""


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "toy.py").write_text(TEACHER)
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def flags(*more: str, teacher: str = "toy:build", ranks: int = 2) -> list[str]:
    return ["--teacher", teacher, "--cpu", str(ranks), "ring.max_tokens=64", *more]


def test_help_loads_next_to_nothing():
    code = "import sys, launcher.cli.main; from launcher.cli import parsers; parsers.launch(), parsers.whole(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "yaml", "msgspec", "rich", "gguf", "huggingface_hub"} & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        pytest.param(
            flags(teacher="/nowhere/model"),
            ["teacher.model is '/nowhere/model'"],
            marks=pytest.mark.promise(1, within="1 s"),
        ),
        pytest.param(
            flags("ring.max_tokens=1000000000000"),
            [" of /dev/shm, and ", "lanes: 2 ranks", "Lower ring.max_tokens"],
            marks=pytest.mark.promise(18, within="1 s"),
        ),
    ],
    ids=["path", "plan"],
)
def test_what_cannot_run_is_refused_before_anything_starts(directory, promise, arguments, messages):
    began = time.monotonic()
    with launch(directory, *arguments, "--", "train.py", CUDA_VISIBLE_DEVICES="") as run:
        assert run.wait() == 2
        took_s = time.monotonic() - began
        assert all(message in run.text for message in messages), run.text
        assert "Traceback" not in run.text
        assert run.session is None
    assert not (directory / "runs").exists()
    promise.kept(f"refused before anything started: {messages[-1]}", took_s, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # No `--`: what stands there, what must, and the corrected line.
        (
            ["--cpu", "2", "--teacher", "toy:build", "train.py", "--lr", "3"],
            "found 'train.py' where a flag or a setting (a.b=c) was expected. The training script and its arguments follow "
            "`--`:\n\n  shmbridge-launch --cpu 2 --teacher toy:build -- train.py --lr 3\n",
        ),
        (
            ["--cpu=2", "--no-teacher", "ring.depth=2", "-m", "package.train", "lr=3", "--name", "a b"],
            "  shmbridge-launch --cpu=2 --no-teacher ring.depth=2 -- -m package.train lr=3 --name 'a b'\n",
        ),
        (
            ["train.py", "--cpu", "2", "--teacher", "toy:build"],
            "  shmbridge-launch --cpu 2 --teacher toy:build -- train.py\n",
        ),
        (["--cpu", "2", "python", "train.py", "x"], "  shmbridge-launch --cpu 2 -- train.py x\n"),
        (["stauts"], "unknown command 'stauts'; did you mean `shmbridge-launch status`?\n"),
        (
            ["--cpu", "2", "--trian-gpus", "0", "--", "train.py"],
            "unknown flag --trian-gpus; did you mean --train-gpus?\n",
        ),
        (
            ["--cpu", "2", "--lr", "3", "--", "train.py"],
            "unknown flag --lr; `shmbridge-launch --help` lists the flags\n",
        ),
        (["--cpu", "2", "--", "train.py"], "teacher.model is not set"),
        ([*flags(), "--"], "the training command is missing"),
        ([*flags("ring.dept=4"), "--", "train.py"], "did you mean `ring.depth`?"),
        ([*flags("--teacher-gpu", ""), "--", "train.py"], "--teacher-gpu is empty"),
        ([*flags("--config", "none.yaml"), "--", "train.py"], "none.yaml"),
        ([*flags("--torchrun", "--max-restarts 3"), "--", "train.py"], "--max-restarts"),
        (["--teacher", "toy:build", "--train-gpus", "0-6", "--", "train.py"], "GPU 0, which does not exist"),
        ([*flags("--config", ""), "--", "train.py"], "--config is empty; give a file or"),
        ([*flags(teacher="train.py"), "--dry-run", "--", "train.py"], "train.py is a file, and not a .gguf file. Give"),
        ([*flags(), "--", "."], "the training script '.' is a directory; name the script in it"),
        (["teacher"], "`shmbridge-launch teacher` needs a command: start, status or stop"),
        (["completion"], "`shmbridge-launch completion` needs a shell: bash, zsh or fish"),
        (
            ["--cpu", "2", "payload.logits={dtype:", "float32}", "train.py"],
            "shell: 'payload.logits={dtype: float32}'\n",
        ),
        (["ring.depth", "--", "train.py"], "found 'ring.depth' where a setting a.b=c was expected"),
        (
            [*flags(), "--dry-run", "--", "-m", "nosuch.module"],
            "module 'nosuch.module' was not found: 'nosuch' is neither",
        ),
        ([*flags(), "--", "nowhere.py"], "'nowhere.py' does not exist"),
    ],
)
def test_a_bad_command_line_says_what_to_write(directory, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(directory)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (directory / "runs").exists()


def test_a_module_is_looked_for_where_the_ranks_will_find_it(directory, monkeypatch, capsys):
    """In the working directory too; nothing of it is imported."""
    monkeypatch.chdir(directory)
    (directory / "package").mkdir()
    (directory / "package" / "__init__.py").write_text("raise SystemExit('imported')")
    assert main([*flags(), "--dry-run", "--", "-m", "package.train"]) == 0


def test_help_is_a_command_and_no_arguments_print_it_too(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["help"])
    told = capsys.readouterr().out
    assert "--dry-run" in told
    assert "completion" in told
    assert main([]) == 2
    assert capsys.readouterr().err == told


def test_config_prints_every_setting_with_comment_unit_and_default(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    assert main(["config"]) == 0
    Path("all.yaml").write_text(capsys.readouterr().out)
    text = Path("all.yaml").read_text()
    assert "  # How many requests one rank may have in flight" in text
    assert "\n  # [an integer of at least 1 (requests); default 2]\n  depth: 2\n" in text
    uncommented = [line for line in text.splitlines() if line and ":" in line and not line.strip().startswith("#")]
    assert len(uncommented) > 50
    assert config.load("all.yaml") == config.Config()
    assert config.load("all.yaml", ["payload.hidden={}"]).payload.named == ("hidden",), "logits stay a default"
    assert main(["config", "ring.depth=4", "--config", "long-context", "--teacher-restarts", "3"]) == 0
    Path("resolved.yaml").write_text(capsys.readouterr().out)
    assert config.load("resolved.yaml") == config.load("long-context", ["ring.depth=4"], {"teacher.restarts": 3})
    assert main(["config", "ring.dept=4"]) == 2
    assert "did you mean `ring.depth`?" in capsys.readouterr().err


def test_the_flags_for_cpu_and_gpus_replace_what_the_file_places_elsewhere(capsys):
    def places(*arguments: str) -> tuple[str, str, int]:
        assert main(["config", *arguments]) == 0
        found = yaml.safe_load(capsys.readouterr().out)
        return found["teacher"]["gpus"], found["train"]["gpus"], found["train"]["cpu_ranks"]

    assert places("--config", "eight-gpus", "--cpu", "2") == ("", "", 2)
    assert places("--config", "eight-gpus", "--cpu", "2", "--teacher-gpu", "7") == ("7", "", 2)
    assert places("--config", "cpu", "--train-gpus", "0-1") == ("", "0-1", 0)
    assert places("--config", "cpu", "--train-gpus", "0", "--cpu", "1") == ("", "0", 1), "a contradiction of its own"


def test_every_setting_is_documented():
    def undocumented(section, prefix):
        said = decode.documentation(section.cls)
        for field in section.fields:
            inner = decode.section_of(field.type)
            if inner:
                assert inner.cls.__doc__, prefix + field.name
                yield from undocumented(inner, f"{prefix}{field.name}.")
            elif field.name not in said:
                yield prefix + field.name

    assert list(undocumented(decode.of(config.Config), "")) == []


def test_flags_are_settings_and_a_dry_run_starts_nothing(directory, capsys, monkeypatch):
    monkeypatch.chdir(directory)
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    Path("lab.yaml").write_text("bridge: {ring: {depth: 3}, timeouts: {shutdown_s: 4}}\nmodel: {dim: 4}\n")
    arguments = [
        *flags("--config", "lab.yaml#bridge", "--dry-run", "--name", "exp"),
        "--",
        "train.py",
        "a.b=c",
        "--",
        "x",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "shmbridge.teacher.main" in text
    assert text.count("SHMBRIDGE_SESSION=") == 2
    assert "train.py a.b=c -- x" in text
    assert "lanes: 2 ranks" in text
    assert "hush" not in text
    assert not Path("runs").exists()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [
        ("exit7", 7, "rank 1 exited with code 7"),
        ("killed", 137, "rank 1 was killed by SIGKILL"),
        ("raise", 1, "rank 1 failed: RuntimeError: boom"),
        ("early", 1, "rank 1 exited with code 1: FileNotFoundError: no data here"),
    ],
)
def test_how_a_rank_ends_is_told_past_torchrun(directory, mode, code, message):
    with launch(directory, *flags(), "--", "train.py", mode) as run:
        assert run.wait() == code
        assert f": {message}" in run.text


@pytest.mark.slow
def test_log_flags_of_the_users_own_hide_neither_the_ranks_nor_their_failure(directory):
    with launch(directory, *flags("--torchrun", "--tee 3"), "--", "train.py", "exit7") as run:
        assert run.wait() == 7
        assert ": rank 1 exited with code 7" in run.text
        assert "[torchrun] [default0]:rank 0 has a reply: True" in run.text
        report = run.text[run.text.index("The run failed") :]
        assert "the end of its log (torchrun)" in report
        assert "has a reply: True" in report
        assert "torchrun.log" in report


SIGNALLED = """
import os, signal, sys
from launcher.cli.main import main
from shmbridge.shm.owner import Owner
moment = getattr(Owner, sys.argv[1])
def signalled(self, *more):
    result = moment(self, *more)
    os.kill(os.getpid(), signal.SIGTERM)
    return result
def before(self):
    os.kill(os.getpid(), signal.SIGTERM)
    return moment(self)
setattr(Owner, sys.argv[1], before if sys.argv[1] == "close" else signalled)
sys.exit(main(sys.argv[2:]))
"""


def signalled(directory: Path, moment: str, *more: str) -> Any:
    """A run whose launcher gets SIGTERM at a moment of its session's life."""
    return launched([sys.executable, "-c", SIGNALLED, moment, *flags(*more), "--", "train.py", "ok"], directory)


def test_a_signal_while_the_session_is_made_leaves_nothing(directory):
    before = set(owner.objects())
    with signalled(directory, "start_generation") as run:
        assert run.wait() == 143
        assert "has a reply" not in run.text
    assert not {session for session in set(owner.objects()) - before if _is_dead(session)}


@pytest.mark.slow
def test_a_run_and_a_signal_while_its_session_is_removed(directory):
    """The signal comes too late to change anything."""
    before = set(owner.objects())
    with signalled(directory, "close", "--name", "exp") as run:
        assert run.wait() == 0
        for line in ("[rank 0]   rank 0 has a reply: True", "[rank 1]   rank 1 has a reply: True", "teacher ready in"):
            assert line in run.text
        (made,) = (directory / "runs").iterdir()
        assert made.name.endswith("-exp")
        assert {path.name for path in made.iterdir()} == {
            "config.yaml",
            "stacks",
            "plan.txt",
            "teacher.log",
            "torchrun.log",
            "train",
        }
    assert run.session not in owner.objects()
    assert not {session for session in set(owner.objects()) - before if _is_dead(session)}


def _is_dead(session: str) -> bool:
    """Other tests' sessions live meanwhile."""
    with owner.lock_if_dead(session) as dead:
        return dead


def test_without_a_teacher_the_same_script_runs(directory):
    with launch(directory, "--no-teacher", "--cpu", "1", "--", "train.py", "exit7") as run:
        assert run.wait() == 7
        assert "rank 0 has a reply: False" in run.text
        assert run.session is None


RENAMED = """
import os, socket, sys
socket.sethostname("nowhere-" + str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "shmbridge.launch", *sys.argv[1:]])
"""


def test_a_host_name_that_does_not_resolve_holds_up_nothing(directory):
    """As in many containers. torchrun would look for its own store under that name, for five minutes."""
    alone = ["unshare", "--map-root-user", "--uts"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no namespaces")
    (directory / "train.py").write_text("import os; print('master', os.environ['MASTER_ADDR'])")
    command = [*alone, sys.executable, "-c", RENAMED, "--no-teacher", "--cpu", "1", "--", "train.py"]
    with launched(command, directory) as run:
        assert run.wait() == 0
        assert "[rank 0]   master 127.0.0.1\n" in run.text


@contextmanager
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that has no model at all, and which files of one it was asked for."""
    asked: list[str] = []

    class Empty(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.extend([self.path] if "gpt2" in self.path else [])
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_a_model_that_the_hub_does_not_give_is_asked_for_once_and_told_once(directory):
    (directory / "gpt2-small").mkdir()
    with (
        hub() as (address, asked),
        launch(
            directory,
            *flags(teacher="gpt2-smal"),
            "--",
            "train.py",
            "none",
            HF_ENDPOINT=address,
            HF_HOME=str(directory),
            HF_HUB_OFFLINE="0",
            HF_TOKEN="",
        ) as run,
    ):
        assert run.wait() == 1
        assert asked == ["/gpt2-smal/resolve/main/config.json"]
        report = next(directory.glob("runs/*/report.txt")).read_text()
        log = next(directory.glob("runs/*/teacher.log")).read_text()
    here = f"{directory}/gpt2-smal"
    for told in (
        f"there is no directory {here}",
        "the model gpt2-smal",
        address,
        "set HF_TOKEN",
        f"Did you mean {here}l?",
    ):
        assert told in report
    assert "Traceback" not in report + log
    assert log.count("there is no directory") == 1


@pytest.mark.parametrize("model", ["held/gpt2", "./held/gpt2", "held/distil/weights", "hald.gguf", "~/nowhere", "a b"])
def test_what_can_only_be_a_path_is_refused_with_what_was_tried_and_what_is_near(directory, monkeypatch, capsys, model):
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HOME", str(directory))
    (directory / "held" / "distilgpt2").mkdir(parents=True)
    (directory / "held.gguf").touch()
    assert main([*flags(teacher=model), "--", "train.py"]) == 2
    text = capsys.readouterr().err
    assert f"there is no file or directory {directory}/{model.removeprefix('./').removeprefix('~/')}." in text
    near = {"hald.gguf": "held.gguf", "~/nowhere": "", "a b": ""}.get(model, "held/distilgpt2")
    assert f"Did you mean {directory}/{near}?" in text or not near


INTERRUPTED = """
import os, signal, subprocess, sys
from shmbridge import launch
launch.load_launcher()
from launcher.planning import machine
class Collected:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
def look(with_gpus):
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    Collected()
    raise SystemExit("the interrupt was lost")
machine.look = look
sys.exit(launch.main())
"""


@pytest.mark.parametrize("command", [["--"], ["teacher", "start", "big"]])
def test_ctrl_c_before_anything_is_made_is_never_lost(directory, command):
    """Also where Python drops an exception, as in __del__; an extension's C code may crash of one. What was started ends too."""
    words = [*flags(), "--", "train.py"] if command == ["--"] else [*command, *flags()]
    with launched([sys.executable, "-c", INTERRUPTED, *words], directory) as run:
        assert run.wait() == 130, run.text
        assert run.text == ""
