"""The teacher's process: `python -m shmbridge.teacher.main`, started by the launcher.

Sign in, load the model, probe it, publish what it returns; then serve one generation after the other. Whatever is raised on the
way is written to the record before the process ends, so that every rank stops with the teacher's own traceback; a ConfigError is
told without one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

import torch

from shmbridge import log
from shmbridge.config import Config, is_builder
from shmbridge.errors import AttachError, ConfigError, PeerLost
from shmbridge.head import Head
from shmbridge.plane import shared_head
from shmbridge.plane.cuda_slab import Slabs
from shmbridge.shm import process
from shmbridge.shm.heartbeat import Heartbeat
from shmbridge.shm.participant_record import Phase
from shmbridge.shm.session import SESSION_VARIABLE, Token
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher import output_discovery, startup
from shmbridge.teacher.batch import Forward
from shmbridge.teacher.grouping import TokenLimit
from shmbridge.teacher.server import Server


def main() -> int:
    """Serve until the ranks have closed. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="shmbridge.teacher.main")
    parser.add_argument("--teacher-index", type=int, default=0)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of this process's own, cuda:0 and on; 0: the CPU")
    args = parser.parse_args()
    _outlive_signals()
    session = TeacherSession(Token.parse(os.environ.get(SESSION_VARIABLE, "")), args.teacher_index)
    log.configure(session.settings.log.level)
    process.write_stacks_on_signal(Path(session.settings.run_dir))
    Heartbeat(session.record)
    settings = session.settings
    try:
        if settings.teacher.cpu_threads:
            torch.set_num_threads(settings.teacher.cpu_threads)
        device = torch.device("cuda:0" if args.gpus else "cpu")
        session.record.enter(Phase.LOADING)
        forward = build(session, settings, device, args.gpus)
        session.record.enter(Phase.PROBING)
        serve(session, forward, device)
    except PeerLost as error:
        session.record.fail_with(error)
        log.logger.error("the teacher stops: %s", error)
        return 1
    except ConfigError as error:  # its message tells the user all; a traceback would hide it
        session.record.fail(str(error))
        session.wake_ranks()
        log.logger.error("%s", error)
        return 1
    except BaseException as error:
        session.record.fail_with(error)
        session.wake_ranks()
        raise
    return 0


def serve(session: TeacherSession, forward: Forward, device: torch.device) -> None:
    """Publish what `forward` returns, and answer requests with it: of one generation, or of all where training may start
    again. Warm up once the first generation's slabs are there."""
    settings = session.settings
    stays = settings.teacher.keep or settings.train.restarts > 0
    agreed, encoder = output_discovery.make(forward, settings, device)
    slabs: Slabs = {}
    limit = TokenLimit(settings.teacher.max_batch_tokens)
    warm = device.type != "cuda"  # on the CPU nothing is loaded late
    if not warm:
        torch.cuda.empty_cache()  # a slab cannot take what loading has left in torch's cache
    head: Head | None = getattr(forward, "head", None) if agreed.head and session.index == 0 else None
    session.publish(agreed)
    while session.next_generation():
        if agreed.head and head:
            shared_head.write(session.token, agreed.head, head)
            head = None  # once for all generations
        try:
            server = Server(session, forward, encoder, agreed, device, slabs, limit)
        except AttachError:
            if not session.training_done:  # else training ended meanwhile, and its memory is gone
                raise
        else:
            if not warm:
                startup.warm_up(forward, encoder, limit, session.settings, device)  # this generation's
                warm = True
            server.serve()
            del server  # the generation's memory is unmapped with it
        session.leave()
        if not stays:
            break


def _outlive_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP do nothing: Slurm sends them to every process of a step, and the ranks are to be served while
    they save. The launcher gets them too, and tells the teacher when to end. Processes that the teacher starts take them as
    usual."""
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in stops:
        signal.signal(number, lambda *_: None)

    def take_again() -> None:
        for number in stops:
            signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=take_again)


def build(session: TeacherSession, settings: Config, device: torch.device, gpus: int) -> Forward:
    """The forward of a custom teacher (`module:build`), or of a HuggingFace model. Raises ConfigError."""
    model = settings.teacher.model
    if not is_builder(model):
        from shmbridge.teacher.huggingface import HuggingFaceTeacher

        return HuggingFaceTeacher(settings, device, session.record.progress, gpus)
    module, _, name = model.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        builder = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports another that is not
        extra = os.environ.get("PYTHONPATH")
        raise ConfigError(
            f"teacher.model is {model!r}: there is no module {error.name!r} in the working directory {Path.cwd()}, on "
            f"PYTHONPATH ({extra or 'not set'}) or in the packages of {sys.executable}. Start where the module is, or add its "
            "directory to PYTHONPATH."
        ) from None
    if not callable(builder):
        raise ConfigError(f"teacher.model is {model!r}; module {module} has no function {name!r}.")
    forward: Forward = builder(settings)
    if not callable(forward):
        raise ConfigError(f"{model} returned a {type(forward).__name__}; expected forward(batch) -> dict of tensors.")
    return forward


if __name__ == "__main__":
    sys.exit(main())
