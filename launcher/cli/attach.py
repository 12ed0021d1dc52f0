"""`shmbridge-launch --attach NAME -- train.py`: a training group beside a kept teacher."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from launcher import registry
from launcher.cli.run import make_directory, run_path, values
from launcher.console import header
from launcher.console.terminal import Console
from launcher.daemon import attached
from launcher.daemon.attached import Attachment, KeptTeachers, Line
from launcher.plan import machine, plan, replicas, torchrun
from launcher.plan.plan import Plan
from launcher.plan.plane import Choice
from launcher.process.signals import Signals
from launcher.process.trial import Stopped
from launcher.supervisor.supervise import Supervisor
from shmbridge import config
from shmbridge.config import Config
from shmbridge.errors import ConfigError


def run(args: argparse.Namespace, script: Sequence[str], console: Console) -> int:
    """Plan the run, take the lease, run the training job. Raises ShmbridgeError where it is refused."""
    if args.no_teacher:
        raise ConfigError("--attach and --no-teacher contradict each other: leave one out.")
    given = config.given(args.config, args.overrides, values(args))
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        line = Line(args.attach)
        stack.callback(line.close)
        settings, mine = attached.agree(line, given)
        planned = _plan(settings, script, args.attach)
        torchrun.check_module(script)
        if args.dry_run:
            jobs = _training(planned, run_path(settings, args.attach), "SESSION@1")
            print(plan.describe(planned, jobs, os.environ), end="")
            return 0
        registration = stack.enter_context(registry.claim(settings.name)) if settings.name else None
        try:
            attachment = stack.enter_context(attached.attach(line, settings, mine, console, signals))
        except Stopped as stopped:
            console.say(str(stopped))
            return 128 + stopped.number
        directory = make_directory(run_path(settings, args.attach))
        session = _begin(attachment, planned, directory)
        if registration:
            registration.describe(session, str(directory.resolve()))
        return _supervise(planned, attachment, session, directory, console, signals)


def _plan(settings: Config, script: Sequence[str], name: str) -> Plan:
    """Of training alone: the keeper checks what memory its replies take."""
    if not settings.train.gpus and not settings.train.cpu_ranks:
        raise ConfigError("no training ranks: give --train-gpus 0-6, or --cpu 2 for two ranks on the CPU.")
    found = machine.look(bool(settings.teacher.gpus or settings.train.gpus))
    assert settings.plane != "auto"
    planned = plan.make(settings, script, found, Choice(settings.plane, f"as the kept teacher {name} has it"))
    return dataclasses.replace(planned, memory=None)


def _training(planned: Plan, directory: Path, session: str) -> tuple[plan.JobSpec, ...]:
    return tuple(job for job in planned.jobs(directory, session) if job.replica is None)


def _begin(attachment: Attachment, planned: Plan, directory: Path) -> str:
    """The first generation; its participants are told the run's directory."""
    attachment.ranks = planned.ranks
    attachment.describe(msgspec.structs.replace(planned.config, run_dir=str(directory.resolve())))
    try:
        return str(attachment.start_generation())
    except BaseException:
        directory.rmdir()
        raise


def _supervise(
    planned: Plan, attachment: Attachment, session: str, directory: Path, console: Console, signals: Signals
) -> int:
    jobs = _training(planned, directory, session)
    (directory / "config.yaml").write_text(config.dump(planned.config))
    (directory / "plan.txt").write_text(plan.describe(planned, jobs, os.environ))
    for job in jobs:
        console.expect(job.who)
    console.say(header.make(planned, session, directory, os.environ))
    kept = KeptTeachers(attachment, console)
    supervisor = Supervisor(planned, jobs, os.environ, attachment, directory, console, signals, kept)
    for replica, log in enumerate(attachment.logs):
        supervisor.follow(replicas.called(replica, len(attachment.logs)), log)
    return supervisor.run()
