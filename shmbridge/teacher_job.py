"""The teacher's process: `python -m shmbridge.teacher_job`, started by the launcher.

Attach, load the model, probe it, offer what it returns, serve. Whatever is raised on the way is written on the board
before the process ends, so that every rank stops with the teacher's own traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

import torch

from shmbridge import payload, trace
from shmbridge.board import Phase
from shmbridge.config import Config, is_builder
from shmbridge.errors import ConfigError, PeerLost
from shmbridge.offer import Offer
from shmbridge.payload import Forward
from shmbridge.server import Server
from shmbridge.session import SESSION_VARIABLE, TeacherSession, Token


def main() -> int:
    """Serve until the ranks have closed. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="shmbridge.teacher_job")
    parser.add_argument("--teacher-index", type=int, default=0)
    index = parser.parse_args().teacher_index
    session = TeacherSession(Token.parse(os.environ.get(SESSION_VARIABLE, "")), index)
    trace.configure(session.settings.log.level)
    try:
        run(session)
    except PeerLost as error:
        session.record.fail_with(error)
        trace.logger.error("the teacher stops: %s", error)
        return 1
    except BaseException as error:
        session.record.fail_with(error)
        session.wake_ranks()
        raise
    return 0


def run(session: TeacherSession) -> None:
    """Load, offer, serve."""
    settings = session.settings
    if settings.teacher.cpu_threads:
        torch.set_num_threads(settings.teacher.cpu_threads)
    device = torch.device("cuda:0" if settings.teacher.gpus else "cpu")
    session.record.enter(Phase.LOADING)
    forward = build(session, settings, device)
    session.record.enter(Phase.PROBING)
    agreed = offer_of(forward, settings, device)
    session.offer(agreed)
    server = Server(session, forward, agreed, device)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.serve()


def build(session: TeacherSession, settings: Config, device: torch.device) -> Forward:
    """The forward of a teacher of one's own (`module:build`), or of a HuggingFace model. Raises ConfigError."""
    model = settings.teacher.model
    if is_builder(model):
        module, _, name = model.partition(":")
        sys.path.insert(0, str(Path.cwd()))
        builder = getattr(importlib.import_module(module), name, None)
        if not callable(builder):
            raise ConfigError(f"teacher.model is {model!r}; module {module} has no function {name!r}.")
        forward: Forward = builder(settings)
        if not callable(forward):
            raise ConfigError(
                f"{model} returned a {type(forward).__name__}; expected forward(batch) -> dict of tensors."
            )
        return forward
    from shmbridge.teacher import HuggingFaceTeacher

    return HuggingFaceTeacher(settings, device, session.record.progress)


def offer_of(forward: Forward, settings: Config, device: torch.device) -> Offer:
    """What `forward` returns, by its own word (attribute `outputs`), the config's, or a probe. Raises PlanError."""
    declared = settings.teacher.outputs or getattr(forward, "outputs", {})
    with torch.inference_mode():
        outputs = payload.probe(forward, device, declared)
    return Offer(
        outputs=outputs,
        model=settings.teacher.model,
        path=getattr(forward, "path", ""),
        vocab_size=settings.teacher.vocab_size or getattr(forward, "vocab_size", None),
        max_seq=getattr(forward, "max_seq", None),
    )


if __name__ == "__main__":
    sys.exit(main())
