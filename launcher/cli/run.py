"""Flags to settings, a plan of them, and its run."""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.console.terminal import Console
    from launcher.plan.jobs import JobSpec, Plan
    from launcher.plan.machine import Machine
    from launcher.process.signals import Signals
    from launcher.registry import Registration
    from shmbridge.config import Config

_FLAGS = {
    "teacher": "teacher.model",
    "teacher_gpu": "teacher.gpus",
    "teacher_replicas": "teacher.replicas",
    "train_gpus": "train.gpus",
    "cpu": "train.cpu_ranks",
    "torchrun": "train.torchrun_args",
    "teacher_restarts": "teacher.restarts",
    "train_restarts": "train.restarts",
    "plane": "plane",
    "name": "name",
    "run_dir": "run_dir",
}


def run(args: argparse.Namespace, script: Sequence[str], console: Console) -> int:
    """Plan the run and run it: a teacher and a training group. Raises ShmbridgeError where it is refused."""
    from launcher.plan import jobs, machine, summary, torchrun
    from shmbridge import config

    settings = config.load(args.config, args.overrides, values(args))
    if not args.dry_run:
        reclaim(console)
    found = machine.look(bool(settings.teacher.gpus or settings.train.gpus))
    planned = jobs.plan(settings, script, found)
    torchrun.check_module(script)
    if args.dry_run:
        check_memory(planned)
        specs = planned.jobs(run_path(settings, "SESSION"), "SESSION@1")
        print(summary.describe(planned, specs, os.environ), end="")
        return 0
    return _run(settings, planned, found, console)


def reclaim(console: Console) -> None:
    """Remove what dead sessions left."""
    from launcher import sessions

    for session_id, count in sessions.reclaim():
        console.say(f"removed {count} objects that the dead session {session_id[:8]} left in /dev/shm")


def values(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as dotted settings. None takes back what the config file has: --cpu its GPUs, --train-gpus
    its ranks on the CPU.

    Raises:
        ConfigError: a GPU list, or --config, is there but blank.
    """
    from shmbridge.errors import ConfigError

    for flag in ("teacher_gpu", "train_gpus", "config"):
        text = getattr(args, flag)
        if text is not None and not text.strip():
            what = "give a file or the name of a ready configuration" if flag == "config" else "name GPUs such as 0-6"
            raise ConfigError(f"--{flag.replace('_', '-')} is empty; {what}, or leave the flag out.")
    values: dict[str, Any] = {}
    if args.cpu is not None:
        values |= {"train.gpus": None, "teacher.gpus": None}
    if args.train_gpus is not None:
        values |= {"train.cpu_ranks": None}
    values |= {key: value for flag, key in _FLAGS.items() if (value := getattr(args, flag, None)) is not None}
    return values | ({"enabled": False} if getattr(args, "no_teacher", False) else {})


def _run(settings: Config, planned: Plan, found: Machine, console: Console) -> int:
    """Try the plane, create the session and the run directory, run the jobs, remove the session."""
    from launcher import registry
    from launcher.process.signals import Signals
    from launcher.process.trial import Stopped

    with ExitStack() as stack:
        signals = stack.enter_context(Signals())  # outermost: a signal at any moment still has the session removed
        registration = stack.enter_context(registry.claim(settings.name)) if settings.name else None
        try:
            planned = settle(settings, planned, found, console, signals)
        except Stopped as stopped:
            console.say(str(stopped))
            return 128 + stopped.number
        check_memory(planned)
        return _supervise(planned, registration, console, signals, stack)


def settle(settings: Config, planned: Plan, found: Machine, console: Console, signals: Signals) -> Plan:
    """The plan for the plane that a trial has shown to work, where the settings alone do not tell.

    Raises:
        PlanError: the plane that was asked for does not work.
        Stopped: the user ended the launcher meanwhile.
    """
    from launcher.plan import jobs, plane_choice
    from launcher.process import trial

    if not planned.plane or planned.plane.reason:
        return planned
    pairs = plane_choice.gpu_pairs(planned.teachers, planned.train_gpus)
    console.say(f"trying CUDA IPC between {plane_choice.between(pairs)}")
    exporters, importer = trial.commands(planned, pairs, os.environ)
    chosen = plane_choice.by_trial(settings, pairs, lambda: trial.run(pairs, exporters, importer, signals))
    return jobs.plan(settings, planned.script, found, chosen)


def check_memory(planned: Plan) -> None:
    if planned.memory:
        planned.memory.check()


def _supervise(
    planned: Plan, registration: Registration | None, console: Console, signals: Signals, stack: ExitStack
) -> int:
    """Create the session and the run directory, which `stack` removes and closes, and run the jobs."""
    from launcher.console.logs import Logs
    from launcher.supervisor.handle import SessionHandle
    from launcher.supervisor.hosted import HostedSession
    from launcher.supervisor.loop import EventLoop
    from launcher.supervisor.training import TrainingJob, settings_of
    from shmbridge.shm.owner import Owner
    from shmbridge.shm.session import Token

    settings = planned.config
    owner = stack.enter_context(Owner(settings, planned.ranks, len(planned.teachers))) if settings.enabled else None
    run = make_directory(run_path(settings, owner.session_id[:8] if owner else "no-teacher"))
    first = str(Token(owner.session_id, 1)) if owner else ""
    *teachers, training = planned.jobs(run, first)
    loop = EventLoop(
        os.environ, Logs(console, run / "train", planned.ranks), console, signals, settings.timeouts.shutdown_s
    )
    session = HostedSession(settings, owner, teachers, loop) if owner else SessionHandle()
    token = session.begin(settings_of(planned, run), planned.ranks)
    if registration:
        registration.describe(first, str(run.resolve()))
    announce(planned, (*teachers, training), first, run, console)
    return loop.run(session, TrainingJob(planned, training, session, token, run, loop))


def announce(planned: Plan, jobs: Sequence[JobSpec], session: str, run: Path, console: Console) -> None:
    """Write what is planned into the run directory, and show its header."""
    from launcher.plan import summary
    from shmbridge import config

    (run / "config.yaml").write_text(config.dump(planned.config))
    (run / "plan.txt").write_text(summary.describe(planned, jobs, os.environ))
    for job in jobs:
        console.expect(job.who)
    console.say(summary.header(planned, session, run, os.environ))


def run_path(settings: Config, label: str) -> Path:
    return Path(settings.run_dir) / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.name or label}"


def make_directory(path: Path) -> Path:
    """`path`, or path-2, path-3, ... where it exists. Raises ConfigError where it cannot be made."""
    from shmbridge.errors import ConfigError

    for candidate in _numbered(path):
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"run_dir is {str(path.parent)!r}: {error.strerror}.") from None
        return candidate
    raise AssertionError


def _numbered(path: Path) -> Iterator[Path]:
    """path, path-2, path-3, ..."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")
