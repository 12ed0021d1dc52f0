"""`shmbridge-launch teacher start|status|stop`: a teacher that stays loaded while training scripts come and go."""

from __future__ import annotations

import argparse
import os
import select
import signal
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from launcher import registry
from launcher.cli import parsers
from launcher.cli.run import announce, prepared, reclaim
from launcher.console.logs import Tail
from launcher.console.terminal import LAUNCHER, Console
from launcher.console.text import seconds, table
from launcher.keeper import agreement, messages, transport
from launcher.keeper.client import Connection
from launcher.keeper.server import Listener
from launcher.planning import jobs, machine, placement
from launcher.planning.jobs import Plan
from launcher.planning.machine import Machine
from launcher.process.signals import STOP, Signals, spare_children
from launcher.supervisor.hosted_session import HostedSession
from launcher.supervisor.training import settings_of
from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ConfigError, DeadlineExceeded
from shmbridge.shm import process

_QUIET_S = 3.0  # a stop that takes longer says what it waits for
_LOOK_S = 0.05
_READY = b"ready"


def main(argv: Sequence[str]) -> int:
    """Run what follows `teacher` on the command line; the exit code."""
    if argv[0] == "start":
        return _start(parsers.command("teacher start").parse_intermixed_args(argv[1:]))
    args = parsers.command("teacher").parse_args(argv)
    with closing(Connection(args.name, to_stop=args.command == "stop")) as connection:
        if args.command == "stop":
            return _stop(connection, args.force)
        standing = connection.ask(messages.Look(), messages.Standing)
        print(f"kept teacher {args.name}\n{table(standing.rows)}")
        return 0


def _stop(connection: Connection, force: bool) -> int:
    """Return once the keeper has ended. Raises DeadlineExceeded where it does not."""
    pid = connection.lines.pid
    with open(os.pidfd_open(pid), "rb") as keeper:
        leaving = connection.ask(messages.Stop(force), messages.Leaving)
        poll = select.poll()
        poll.register(keeper, select.POLLIN)
        if not poll.poll(_QUIET_S * 1000):
            print(f"waiting for {leaving.waits_for} to end, at most {seconds(leaving.within_s)}", flush=True)
            if not poll.poll(leaving.within_s * 1000):
                raise DeadlineExceeded(
                    f"the keeper of {connection.name} (pid {pid}) has not ended within {seconds(leaving.within_s)}; it is "
                    f"{process.state(pid)}. `kill -KILL {pid}` ends it and everything below it."
                )
    print(f"the kept teacher {connection.name} has ended")
    return 0


def _start(args: argparse.Namespace) -> int:
    name, *overrides = args.words
    if not name or "=" in name:
        raise ConfigError(f"the first word after `teacher start` is {name!r}; expected the teacher's name.")
    given = config.given(args.config, overrides, parsers.values(args))
    settings = agreement.located(config.from_tree({**given, "name": name}))
    if not settings.enabled:
        raise ConfigError("enabled is false, and a kept teacher is nothing else than enabled: leave it out.")
    settings = msgspec.structs.replace(settings, teacher=msgspec.structs.replace(settings.teacher, keep=True))
    console = Console()
    reclaim(console)
    found = machine.look(bool(settings.teacher.gpus or settings.train.gpus))
    settings = _expecting(settings, found)
    planned = jobs.plan(settings, ("-m", "training"), found)

    def keep(told: int | None = None) -> int:
        return _keep(settings, planned, found, console, told)

    return keep() if args.foreground else _in_background(keep, console)


def _expecting(settings: Config, found: Machine) -> Config:
    """With the training group that is planned for, where none is named: a rank on each other GPU, or one for each replica."""
    if settings.train.gpus or settings.train.cpu_ranks:
        return settings
    if settings.teacher.gpus:
        own = placement.parse_gpus(settings.teacher.gpus, "teacher.gpus")
        others = [number for number in range(len(found.gpus)) if number not in own] or own
        train = msgspec.structs.replace(settings.train, gpus=",".join(map(str, others)))
    else:
        train = msgspec.structs.replace(settings.train, cpu_ranks=settings.teacher.replicas or 1)
    return msgspec.structs.replace(settings, train=train)


def _keep(settings: Config, planned: Plan, found: Machine, console: Console, told: int | None) -> int:
    """Run a keeper to its end; its exit code. `told` is the pipe of a process that waits until the teacher is ready: it is told the run
    directory, in which the output goes on as keeper.log, and then that the teacher is ready."""
    name = settings.name
    with (
        Signals() as signals,
        registry.claim(name, kept=True) as registration,
        transport.listening(name) as listener,
        prepared(settings, planned, found, console, signals) as made,
    ):
        assert isinstance(made.session, HostedSession)
        made.session.view.describe(
            settings_of(made.plan, made.run)
        )  # where reports and stacks go until a group has come
        registration.describe(made.token, str(made.run.resolve()))

        def tell(text: bytes) -> None:
            if told is not None:
                with suppress(BrokenPipeError):  # whoever started the keeper has gone
                    os.write(told, text)

        if told is not None:
            _log_to(made.run / "keeper.log")
        tell(f"{made.run}\n".encode())

        teacher = made.plan.config.teacher
        where = f"GPU {teacher.gpus}" if teacher.gpus else "the CPU"
        rows = [
            ("run", str(made.run)),
            ("session", made.token),
            ("teacher", f"{teacher.model} on {where}, kept as {name}"),
            ("plane", str(made.plan.plane)),
            ("keeper", f"pid {os.getpid()}"),
        ]
        announce(made.plan, made.jobs[:-1], made.run, table(rows, indent=""), console)
        keeper = Listener(made.plan, made.session, made.run, made.loop, listener, lambda: tell(_READY))
        return made.loop.run(made.session, keeper)


def _log_to(path: Path) -> None:
    """Let what this process prints go to a file, and have it read nothing."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    void = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for fd, to in ((void, 0), (log, 1), (log, 2)):
        os.dup2(fd, to)


def _in_background(keep: Callable[[int], int], console: Console) -> int:
    """Start a keeper that outlives this process; show its output until the teacher is ready. The exit code: 0, or the keeper's own. A
    signal meanwhile goes to the keeper. In the keeper it returns too, at its end, with its exit code."""
    read, write = os.pipe()
    spare_children()
    with Signals() as signals:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # they reach the keeper once its own Signals is open
        keeper = os.fork()
        if keeper == 0:
            os.setsid()
            os.close(read)
            return keep(write)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
        os.close(write)
        with open(read, "rb"):
            return _look_on(keeper, read, signals, console)


def _look_on(keeper: int, told: int, signals: Signals, console: Console) -> int:
    heard, log, code = b"", None, None
    pipes = [told]
    while code is None:
        if signals.wait(_LOOK_S, pipes) & {told}:
            chunk = os.read(told, 64 * 1024)
            heard += chunk
            if not chunk:
                pipes = []
        for number in signals.take():
            os.kill(keeper, number)
        pid, status = os.waitpid(keeper, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
        elif heard.endswith(_READY):
            code = 0
        if log is None and b"\n" in heard:
            log = Tail(LAUNCHER, Path(heard.split(b"\n")[0].decode()) / "keeper.log")
        for line in log.read() if log else ():
            console.write(f"{line}\n")
        console.flush()
    return code if code >= 0 else 128 - code
