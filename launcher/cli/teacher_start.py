"""`shmbridge-launch teacher start NAME`: plans a kept teacher, and runs its keeper, here or in the background."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from launcher import registry
from launcher.cli.run import check_memory, make_directory, reclaim, run_path, settle
from launcher.console.logs import Logs, Tail
from launcher.console.terminal import LAUNCHER, Console
from launcher.console.text import table
from launcher.keeper import agreement, transport
from launcher.keeper.server import Listener
from launcher.plan import jobs, machine, placement, summary
from launcher.plan.jobs import JobSpec, Plan
from launcher.plan.machine import Machine
from launcher.process.signals import Signals
from launcher.process.trial import Stopped
from launcher.supervisor.hosted import HostedSession
from launcher.supervisor.loop import EventLoop
from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ShmbridgeError
from shmbridge.shm.owner import Owner

_READY = b"ready"
_POLL_MS = 50


def settings_of(given: dict[str, object], name: str) -> Config:
    """What the command line asks for, for a teacher that stays. Raises ConfigError."""
    settings = agreement.located(config.from_tree({**given, "name": name}))
    teacher = msgspec.structs.replace(settings.teacher, keep=True)
    return msgspec.structs.replace(settings, teacher=teacher)


def keep(settings: Config, logged: Callable[[Path], None], ready: Callable[[], None]) -> int:
    """Run a keeper to its end; `logged` is told the run directory, `ready` that the teacher has loaded. The exit code."""
    console = Console()
    reclaim(console)
    found = machine.look(bool(settings.teacher.gpus or settings.train.gpus))
    expected = _expecting(settings, found)
    planned = jobs.plan(expected, ("-m", "training"), found)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        registration = stack.enter_context(registry.claim(settings.name, kept=True))
        listener = stack.enter_context(transport.listening(settings.name))
        try:
            planned = settle(expected, planned, found, console, signals)
        except Stopped as stopped:
            console.say(str(stopped))
            return 128 + stopped.number
        check_memory(planned)
        run = make_directory(run_path(settings, settings.name))
        logged(run)
        owner = stack.enter_context(Owner(planned.config, 1, len(planned.teachers)))
        owner.describe(msgspec.structs.replace(planned.config, run_dir=str(run.resolve())))
        registration.describe(owner.session_id, str(run.resolve()))
        specs = _teachers(planned, run, owner.session_id)
        _describe(planned, specs, run, owner.session_id, console)
        loop = EventLoop(os.environ, Logs(console, run / "none", 0), console, signals, settings.timeouts.shutdown_s)
        session = HostedSession(planned.config, owner, specs, loop)
        return loop.run(session, Listener(planned, session, run, loop, listener, ready))


def _expecting(settings: Config, found: Machine) -> Config:
    """With the training group that is planned for, where none is named: a rank on each other GPU, or one for each replica."""
    if settings.train.gpus or settings.train.cpu_ranks or not settings.enabled:
        return settings
    if settings.teacher.gpus:
        own = placement.parse_gpus(settings.teacher.gpus, "teacher.gpus")
        others = [number for number in range(len(found.gpus)) if number not in own] or own
        train = msgspec.structs.replace(settings.train, gpus=",".join(map(str, others)))
    else:
        train = msgspec.structs.replace(settings.train, cpu_ranks=settings.teacher.replicas or 1)
    return msgspec.structs.replace(settings, train=train)


def _teachers(planned: Plan, run: Path, session: str) -> tuple[JobSpec, ...]:
    return tuple(job for job in planned.jobs(run, f"{session}@1") if job.replica is not None)


def _describe(planned: Plan, specs: tuple[JobSpec, ...], run: Path, session: str, console: Console) -> None:
    (run / "config.yaml").write_text(config.dump(planned.config))
    (run / "plan.txt").write_text(summary.describe(planned, specs, os.environ))
    for job in specs:
        console.expect(job.who)
    teacher = planned.config.teacher
    where = f"GPU {teacher.gpus}" if teacher.gpus else "the CPU"
    rows = [
        ("run", str(run)),
        ("session", session),
        ("teacher", f"{teacher.model} on {where}, kept as {planned.config.name}"),
    ]
    console.say(table([*rows, ("plane", str(planned.plane)), ("keeper", f"pid {os.getpid()}")], indent=""))


# In the background


def in_background(settings: Config) -> int:
    """Start a keeper that outlives this process; show its output until the teacher is ready. The exit code: 0, or the
    keeper's own. A signal meanwhile goes to the keeper."""
    read, write = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(read)
        os._exit(_become_keeper(settings, write))
    os.close(write)
    with Signals() as signals:
        code = _look_on(keeper, read, signals)
    os.close(read)
    return code


def _become_keeper(settings: Config, told: int) -> int:
    """The exit code of the keeper, which this process is from now on."""
    os.setsid()

    def logged(run: Path) -> None:
        log = os.open(run / "keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        void = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for fd, to in ((void, 0), (log, 1), (log, 2)):
            os.dup2(fd, to)
        os.write(told, f"{run}\n".encode())

    try:
        return keep(settings, logged, lambda: _tell(told))
    except ShmbridgeError as error:
        print(f"shmbridge-launch teacher: {error}", file=sys.stderr)
        return 2
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _tell(told: int) -> None:
    try:
        os.write(told, _READY)
    except BrokenPipeError:  # whoever started the keeper has gone
        pass
    os.close(told)


def _look_on(keeper: int, told: int, signals: Signals) -> int:
    """Show what the keeper prints until the teacher is ready, or the keeper has ended. Signals go to the keeper."""
    console, log, heard = Console(), None, b""
    poll = select.poll()
    poll.register(signals.fd, select.POLLIN)
    poll.register(told, select.POLLIN)
    code: int | None = None
    while code is None:
        if told in {fd for fd, _ in poll.poll(_POLL_MS)}:
            chunk = os.read(told, 64 * 1024)
            heard += chunk
            if not chunk:
                poll.unregister(told)
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
