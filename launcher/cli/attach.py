"""`shmbridge-launch --attach NAME -- train.py`: a training group beside a kept teacher."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from contextlib import closing, nullcontext

from launcher import registry
from launcher.cli import parsers
from launcher.cli.run import announce, make_directory, run_path
from launcher.console.logs import Logs
from launcher.console.terminal import Console
from launcher.keeper import client
from launcher.keeper.client import Connection, RemoteSession
from launcher.planning import jobs, machine, placement, summary, torchrun
from launcher.planning.plane_choice import PlaneChoice
from launcher.process.signals import Signals
from launcher.supervisor.loop import EventLoop
from launcher.supervisor.training import TrainingJob, settings_of
from shmbridge import config
from shmbridge.errors import ConfigError

_ASK_S = 0.1


def run(args: argparse.Namespace, script: Sequence[str], console: Console) -> int:
    """Plan the run, begin a generation of the kept teacher's session, run the training job. Raises ShmbridgeError where it is refused."""
    if args.no_teacher:
        raise ConfigError("--attach and --no-teacher contradict each other: leave one out.")
    given = config.given(args.config, args.overrides, parsers.values(args))
    with closing(Connection(args.attach)) as connection:
        settings = client.agree(connection, given)
        found = machine.look(bool(settings.teacher.gpus or settings.train.gpus))
        assert settings.plane != "auto"
        chosen = PlaneChoice(settings.plane, f"as the kept teacher {args.attach} has it")
        planned = dataclasses.replace(jobs.plan(settings, script, found, chosen), memory=None)  # the keeper checks it
        torchrun.check_module(script)
        path = run_path(settings, args.attach)
        if args.dry_run:
            print(summary.describe(planned, planned.jobs(path, "SESSION@1")[-1:], os.environ), end="")
            return 0
        session = RemoteSession(connection, settings, console)
        claimed = registry.claim(settings.name) if settings.name else nullcontext()
        with Signals() as signals, claimed as name:
            directory = make_directory(path)
            try:  # its participants are told the run's directory, of which nothing is left where it is refused
                while (token := session.begin(settings_of(planned, directory), planned.ranks)) is None:
                    signals.wait(_ASK_S, [fd for fd, _ in session.watch()])
                    signals.check()
            except BaseException:
                directory.rmdir()
                raise
            if name:
                name.describe(str(token), str(directory.resolve()))
            training = planned.jobs(directory, str(token))[-1]
            header = summary.header(planned, str(token), directory, os.environ)
            announce(planned, [training], directory, header, console)
            logs = Logs(console, directory / "train", planned.ranks)
            for replica, log in enumerate(session.logs):
                logs.follow(placement.teacher_name(replica, len(session.logs)), log, from_end=True)
            loop = EventLoop(os.environ, logs, console, signals, settings.timeouts.shutdown_s)
            return loop.run(session, TrainingJob(planned, training, session, token, directory, loop))
