"""`shmbridge-launch --attach NAME -- train.py`: a training group beside a kept teacher."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from launcher import registry
from launcher.cli.run import announce, make_directory, run_path, values
from launcher.console.logs import Logs
from launcher.console.terminal import Console
from launcher.keeper import client
from launcher.keeper.client import Connection, RemoteSession
from launcher.plan import jobs, machine, placement, summary, torchrun
from launcher.plan.jobs import Plan
from launcher.plan.plane_choice import PlaneChoice
from launcher.process.signals import Signals
from launcher.process.trial import Stopped
from launcher.supervisor.loop import EventLoop
from launcher.supervisor.training import TrainingJob, settings_of
from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ConfigError
from shmbridge.shm.session import Token


def run(args: argparse.Namespace, script: Sequence[str], console: Console) -> int:
    """Plan the run, begin a generation of the kept teacher's session, run the training job. Raises ShmbridgeError where it is refused."""
    if args.no_teacher:
        raise ConfigError("--attach and --no-teacher contradict each other: leave one out.")
    given = config.given(args.config, args.overrides, values(args))
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        connection = Connection(args.attach)
        stack.callback(connection.close)
        settings, mine = client.agree(connection, given)
        planned = _plan(settings, script, args.attach)
        torchrun.check_module(script)
        if args.dry_run:
            job = _training(planned, run_path(settings, args.attach), "SESSION@1")
            print(summary.describe(planned, [job], os.environ), end="")
            return 0
        registration = stack.enter_context(registry.claim(settings.name)) if settings.name else None
        session = RemoteSession(connection, mine, console, signals)
        directory = make_directory(run_path(settings, args.attach))
        try:
            token = _begin(session, planned, directory)
        except Stopped as stopped:
            console.say(str(stopped))
            return 128 + stopped.number
        if registration:
            registration.describe(str(token), str(directory.resolve()))
        training = _training(planned, directory, str(token))
        announce(planned, [training], str(token), directory, console)
        logs = Logs(console, directory / "train", planned.ranks)
        for replica, log in enumerate(session.logs):
            logs.follow(placement.teacher_name(replica, len(session.logs)), log, from_end=True)
        loop = EventLoop(os.environ, logs, console, signals, settings.timeouts.shutdown_s)
        return loop.run(session, TrainingJob(planned, training, session, token, directory, loop))


def _begin(session: RemoteSession, planned: Plan, directory: Path) -> Token:
    """The first generation; its participants are told the run's directory, of which nothing is left where it is refused."""
    try:
        return session.begin(settings_of(planned, directory), planned.ranks)
    except BaseException:
        directory.rmdir()
        raise


def _plan(settings: Config, script: Sequence[str], name: str) -> Plan:
    """Of training alone: the keeper checks what memory its replies take."""
    if not settings.train.gpus and not settings.train.cpu_ranks:
        raise ConfigError("no training ranks: give --train-gpus 0-6, or --cpu 2 for two ranks on the CPU.")
    found = machine.look(bool(settings.teacher.gpus or settings.train.gpus))
    assert settings.plane != "auto"
    planned = jobs.plan(settings, script, found, PlaneChoice(settings.plane, f"as the kept teacher {name} has it"))
    return dataclasses.replace(planned, memory=None)


def _training(planned: Plan, directory: Path, session: str) -> jobs.JobSpec:
    return next(job for job in planned.jobs(directory, session) if job.replica is None)
