"""`shmbridge-launch teacher start|status|stop`: a teacher that stays loaded while training scripts come and go."""

from __future__ import annotations

import argparse
import os
import select
import time
from collections.abc import Sequence
from contextlib import closing

from launcher.cli import parsers, teacher_start
from launcher.cli.run import values
from launcher.console.text import listed, seconds, table
from launcher.keeper import messages
from launcher.keeper.client import Connection
from launcher.keeper.messages import Standing
from shmbridge import config
from shmbridge.errors import ConfigError, DeadlineExceeded
from shmbridge.shm import process

_QUIET_S = 3.0  # a stop that takes longer says what it waits for


def main(argv: Sequence[str]) -> int:
    """Run what follows `teacher` on the command line; the exit code."""
    if argv[:1] == ["start"]:
        return _start(parsers.teacher_start().parse_intermixed_args(argv[1:]))
    args = parsers.kept_teacher().parse_args(argv)
    with closing(Connection(args.name, to_stop=args.command == "stop")) as connection:
        return _status(connection) if args.command == "status" else _stop(connection, args.force)


def _start(args: argparse.Namespace) -> int:
    name, *overrides = args.words
    if not name or "=" in name:
        raise ConfigError(f"the first word after `teacher start` is {name!r}; expected the teacher's name.")
    settings = teacher_start.settings_of(config.given(args.config, overrides, values(args)), name)
    if not settings.enabled:
        raise ConfigError("enabled is false, and a kept teacher is nothing else than enabled: leave it out.")
    if args.foreground:
        return teacher_start.keep(settings, lambda run: None, lambda: None)
    return teacher_start.in_background(settings)


def _status(connection: Connection) -> int:
    print(_page(connection.ask(messages.Look(), Standing), time.time()))
    return 0


def _page(standing: Standing, now: float) -> str:
    where = f"GPU {standing.gpus}" if standing.gpus else "the CPU"
    pids = listed([str(pid) if pid else "none" for pid in standing.teachers])
    rows = [
        ("state", standing.state),
        ("teacher", f"{standing.model} on {where}, pid {pids}"),
        ("plane", standing.plane),
        ("keeper", f"pid {standing.pid}, since {_since(standing.since, now)}"),
        ("session", standing.session),
        ("run", standing.run),
        ("answered", f"{standing.answered} request{'s' if standing.answered != 1 else ''}"),
        ("held by", "nobody"),
    ]
    holder = standing.holder
    if holder:
        ranks = (
            f"generation {holder.generation}, {holder.ranks} rank{'s' if holder.ranks > 1 else ''}, run {holder.run}"
        )
        rows[-1] = ("held by", f"pid {holder.pid}, since {_since(holder.since, now)}")
        rows.append(("", ranks))
    return f"kept teacher {standing.name}\n{table(rows)}"


def _since(at: float, now: float) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))} ({seconds(max(0.0, now - at))})"


def _stop(connection: Connection, force: bool) -> int:
    """Return once the keeper has ended. Raises DeadlineExceeded where it does not."""
    pid = connection.lines.pid
    keeper = os.pidfd_open(pid)
    try:
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
    finally:
        os.close(keeper)
    print(f"the kept teacher {connection.name} has ended")
    return 0
