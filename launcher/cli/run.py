"""Flags to settings, a plan of them, and its run."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from launcher import registry, sessions
from launcher.cli import parsers
from launcher.console.logs import Logs
from launcher.console.terminal import Console
from launcher.planning import jobs, machine, plane_choice, summary, torchrun
from launcher.planning.jobs import JobSpec, Plan
from launcher.planning.machine import Machine
from launcher.process import cuda_ipc_trial
from launcher.process.signals import Signals
from launcher.supervisor.hosted_session import HostedSession
from launcher.supervisor.loop import EventLoop
from launcher.supervisor.session_handle import SessionHandle
from launcher.supervisor.training import TrainingJob, settings_of
from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ConfigError
from shmbridge.shm.owner import Owner
from shmbridge.shm.session import Token


class Prepared(NamedTuple):
    """All that a launcher needs before it starts its jobs."""

    plan: Plan
    session: SessionHandle
    token: str  # of the session's first generation; empty without a teacher
    run: Path  # the run's directory
    jobs: tuple[JobSpec, ...]  # the teachers', then training's
    loop: EventLoop


def run(args: argparse.Namespace, script: Sequence[str], console: Console) -> int:
    """Plan the run and run it: a teacher and a training group. Raises ShmbridgeError where it is refused."""
    settings = config.load(args.config, args.overrides, parsers.values(args))
    if not args.dry_run:
        reclaim(console)
    found = machine.look(bool(settings.teacher.gpus or settings.train.gpus))
    planned = jobs.plan(settings, script, found)
    torchrun.check_module(script)
    if args.dry_run:
        if planned.memory:
            planned.memory.check()
        specs = planned.jobs(run_path(settings, "SESSION"), "SESSION@1")
        print(summary.describe(planned, specs, os.environ), end="")
        return 0
    claimed = registry.claim(settings.name) if settings.name else nullcontext()
    with Signals() as signals, claimed as name, prepared(settings, planned, found, console, signals) as made:
        token = made.session.begin(settings_of(made.plan, made.run), made.plan.ranks)
        if name:
            name.describe(made.token, str(made.run.resolve()))
        header = summary.header(made.plan, made.token, made.run, os.environ)
        announce(made.plan, made.jobs, made.run, header, console)
        training = TrainingJob(made.plan, made.jobs[-1], made.session, token, made.run, made.loop)
        return made.loop.run(made.session, training)


def reclaim(console: Console) -> None:
    """Remove what dead sessions left."""
    for session_id, count in sessions.reclaim():
        console.say(f"removed {count} objects that the dead session {session_id[:8]} left in /dev/shm")


@contextmanager
def prepared(settings: Config, planned: Plan, found: Machine, console: Console, signals: Signals) -> Iterator[Prepared]:
    """Try the plane where the settings do not tell which one works, check the memory, and create the run directory and the session,
    which is removed after the block. `signals` are open around it, so that it is removed whenever a signal comes.

    Raises:
        PlanError: memory is too small, or the plane that was asked for does not work.
        Stopped: the user ended the launcher during the trial.
    """
    if planned.plane and not planned.plane.reason:
        pairs = plane_choice.gpu_pairs(planned.teachers, planned.train_gpus)
        console.say(f"trying CUDA IPC between {plane_choice.between(pairs)}")
        exporters, importer = cuda_ipc_trial.commands(planned, pairs, os.environ)
        chosen = plane_choice.by_trial(settings, pairs, lambda: cuda_ipc_trial.run(pairs, exporters, importer, signals))
        planned = jobs.plan(settings, planned.script, found, chosen)
    if planned.memory:
        planned.memory.check()
    settings = planned.config
    with ExitStack() as stack:
        owner = None
        if settings.enabled:
            owner = stack.enter_context(Owner(settings, planned.ranks, len(planned.teachers)))
        run = make_directory(run_path(settings, owner.session_id[:8] if owner else "no-teacher"))
        token = str(Token(owner.session_id, 1)) if owner else ""
        specs = planned.jobs(run, token)
        logs = Logs(console, run / "train", planned.ranks)
        loop = EventLoop(os.environ, logs, console, signals, settings.timeouts.shutdown_s)
        session = HostedSession(settings, owner, specs[:-1], loop) if owner else SessionHandle()
        yield Prepared(planned, session, token, run, specs, loop)


def announce(planned: Plan, specs: Sequence[JobSpec], run: Path, header: str, console: Console) -> None:
    """Write what is planned into the run directory, and show the header."""
    (run / "config.yaml").write_text(config.dump(planned.config))
    (run / "plan.txt").write_text(summary.describe(planned, specs, os.environ))
    for spec in specs:
        console.expect(spec.who)
    console.say(header)


def run_path(settings: Config, label: str) -> Path:
    return Path(settings.run_dir) / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.name or label}"


def make_directory(path: Path) -> Path:
    """`path`, or path-2, path-3, ... where it exists. Raises ConfigError where it cannot be made."""
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        except OSError as error:
            raise ConfigError(f"run_dir is {str(path.parent)!r}: {error.strerror}.") from None
        else:
            return candidate
