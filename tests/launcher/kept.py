"""A keeper in the background of a test, over a teacher and ranks without torch, and what is asked of it."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from launcher import registry
from launcher.cli.main import main
from shmbridge.shm import owner
from tests.harness import until
from tests.launcher.running import HERE, Launched, launched

SETTINGS = ("teacher.model=fake:build", "ring.max_tokens=64", "payload.topk.k=8", "timeouts.shutdown_s=5")


class Kept:
    """A keeper in the background, and the commands that speak to it."""

    def __init__(self, directory: Path, name: str = "big") -> None:
        self.directory = directory
        self.name = name
        python = directory / "python"
        python.write_text(f"#!/bin/sh\nexec {sys.executable} {HERE / 'fake_teacher.py'} ${{FAKE_TEACHER:-ok}} 0\n")
        python.chmod(0o755)
        self.settings = (*SETTINGS, f"teacher.python={python}")
        self.runs: list[Launched] = []

    def begin(self, *more: str, **variables: str) -> Launched:
        """`teacher start`, which may still be loading."""
        launcher = [str(HERE / "full_shm.py")] if "FAKE_FULL" in variables else ["-m", "shmbridge.launch"]
        command = [sys.executable, *launcher, "teacher", "start", self.name, *self.settings, *more]
        self.runs.append(Launched(command, self.directory, variables))
        return self.runs[-1]

    def start(self, *more: str, **variables: str) -> Launched:
        """`teacher start`, to its end."""
        run = self.begin(*more, **variables)
        assert run.process.wait(60) == 0, run.text
        return run

    def command(self, *words: str) -> tuple[int, str]:
        """`teacher status` or `teacher stop`: the exit code and the output."""
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            code = main(["teacher", words[0], self.name, *words[1:]])
        return code, printed.getvalue()

    @property
    def status(self) -> dict[str, str]:
        code, text = self.command("status")
        assert code == 0, text
        return {key.strip(): value for key, value in re.findall(r"^  (.{8})  (.*)$", text, re.M)}

    @property
    def teacher(self) -> int:
        return int(self.status["teacher"].rpartition("pid ")[2])

    @property
    def keeper(self) -> int:
        return registry.entries()[self.name].pid

    @property
    def log(self) -> str:
        return next(self.directory.glob("runs/*/keeper.log")).read_text()

    @property
    def loaded(self) -> int:
        """How often the weights were."""
        return sum(file.read_text().count("loaded the weights") for file in self.directory.glob("runs/*/teacher.log"))

    def serves(self, loaded: int = 1, ranks: int = 2) -> None:
        """One more group, by a teacher that has loaded so often."""
        with self.attach("asks", ranks=ranks) as run:
            assert ended(run) == 0, run.text
        assert self.loaded == loaded

    def is_gone(self) -> None:
        """Nothing is left of it: no process, no object, no name, no socket."""
        until(lambda: not any(run.processes() for run in self.runs), "the end of every process")
        assert not {run.session for run in self.runs} & set(owner.objects())
        assert list(registry.directory().iterdir()) == []

    def stop(self, *more: str) -> None:
        code, text = self.command("stop", *more)
        assert code == 0, text
        assert text.endswith(f"the kept teacher {self.name} has ended\n")
        self.is_gone()

    def attach(self, training: str, *more: str, ranks: int = 2, **variables: str) -> AbstractContextManager[Launched]:
        arguments = ["--attach", self.name, "--cpu", str(ranks), *more, "--", "-m", "this"]
        command = [sys.executable, str(HERE / "faked.py"), "ok", training, *arguments]
        return launched(command, self.directory, FAKE_RANKS=str(ranks), **variables)


@contextmanager
def keeping(directory: Path, name: str = "big") -> Iterator[Kept]:
    kept = Kept(directory, name)
    try:
        yield kept
    finally:
        for run in kept.runs:
            for pid in [*run.processes(), run.process.pid]:
                if pid != run.process.pid or run.process.poll() is None:
                    kill(pid)
            run.process.wait(60)
            if run.session:
                owner.unlink_session(run.session)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def ended(run: Launched) -> int:
    """The exit code of a training group's launcher; nothing of the group is left."""
    code = run.process.wait(60)
    assert run.processes() == [], run.text
    return code


def objects(kept: Kept) -> list[str]:
    session = kept.status["session"]
    return owner.objects(session).get(session, [])
