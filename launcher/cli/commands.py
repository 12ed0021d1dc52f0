"""`shmbridge-launch report|status|ls|clean|doctor`: what is said of sessions from outside, and of the machine."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from launcher import registry, sessions
from launcher.cli import parsers
from launcher.console.text import size, table
from launcher.doctor import command as doctor
from launcher.hang import report, snapshot, status
from launcher.process.signals import Signals, Stopped
from launcher.sessions import LIVE, STALE, Session
from shmbridge.errors import AttachError
from shmbridge.shm.session import MappedSession

_EVERY_S = 1.0
_CLEAR = "\033[H\033[J"


def main(name: str, argv: Sequence[str]) -> int:
    """Run the command `name`; the exit code."""
    args = parsers.command(name).parse_args(argv)
    try:
        return COMMANDS[name](args)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _report(args: argparse.Namespace) -> int:
    session = sessions.find(args.session)
    view = MappedSession(session.session_id)
    run = Path(view.settings.run_dir)
    made = report.make(view, run if run.is_dir() else None, "asked for by shmbridge-launch report", session.name)
    try:
        made = report.write(made, run)
    except OSError as error:
        print(f"shmbridge-launch report: not written to {run}: {error.strerror}", file=sys.stderr)
    if args.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(made)) + b"\n")
    else:
        print(made)
    return 0


def _status(args: argparse.Namespace) -> int:
    """With --watch once a second, until Ctrl-C or the session's end."""
    session = sessions.find(args.session)
    view = MappedSession(session.session_id)

    def page() -> str:
        return status.page(snapshot.look(view), session.name, view.settings.run_dir)

    if not args.watch:
        print(page())
        return 0
    clear = _CLEAR if sys.stdout.isatty() else ""
    try:
        with Signals() as signals:
            while sessions.live(session.session_id):
                if view.control.generation != view.generation:
                    view.update()
                print(f"{clear}{time.strftime('%H:%M:%S')}  {page()}\n", flush=True)
                signals.wait(_EVERY_S)
                signals.check()
    except AttachError:
        pass  # it ended between two looks
    except Stopped:
        return 0
    print(f"session {session.short} has ended")
    return 0


def _list(_: argparse.Namespace) -> int:
    found = sessions.every()
    if not found:
        print("no sessions")
        return 0
    rows = [("SESSION", "NAME", "STATE", "OWNER", "RANKS", "TEACHER", "RUN")]
    print(table([*rows, *map(_line, found)], indent=""))
    for one in found:
        if one.problem:
            print(f"{one.short}: {one.problem}")
    if any(one.state == STALE for one in found):
        print("\nstale: the launcher was killed; `shmbridge-launch clean` removes what it left")
    return 0


def _line(one: Session) -> tuple[str, ...]:
    if one.snapshot is None:
        objects = f"{one.objects} object{'s' if one.objects != 1 else ''} in /dev/shm"
        return one.short, one.name, one.state, "", "", "", objects if one.state == STALE else ""
    ranks, seen = one.snapshot.ranks, one.snapshot
    held_by = f"{'keeper' if seen.kept else 'launcher'} {seen.launcher_pid}"
    attached = sum(rank.attached for rank in ranks)
    share = str(len(ranks)) if attached == len(ranks) else f"{attached} of {len(ranks)}"
    phases = dict.fromkeys(rank.activity for rank in ranks if rank.attached)
    states = f": {', '.join(phases)}" if phases else ""
    teachers = ", ".join(dict.fromkeys(teacher.activity for teacher in seen.teachers))
    again = f" (generation {seen.generation})" if seen.generation > 1 else ""
    training = "no group" if seen.over else share + states
    return one.short, one.name, one.state + again, held_by, training, teachers, one.run


def _clean(args: argparse.Namespace) -> int:
    """Whoever is live holds a kernel lock, and is not touched."""
    would = "would remove" if args.dry_run else "removed"
    found = sessions.every()
    removed = [one for one in found if one.state == STALE]
    if not args.dry_run:
        reclaimed = dict(sessions.reclaim())
        removed = [one for one in removed if one.session_id in reclaimed]
    for one in removed:
        print(f"{would} {one.objects} objects ({size(one.nbytes)}) of the dead session {one.short}")
    names = [name for name in registry.entries() if registry.remove_if_free(name, args.dry_run)]
    for name in names:
        print(f"{would} the name {name!r}, which no live launcher holds")
    if not removed and not names:
        print("nothing to remove")
    live = sum(one.state == LIVE for one in found)
    if live:
        print(f"{live} live session{'s' if live > 1 else ''} untouched")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "report": _report,
    "status": _status,
    "ls": _list,
    "clean": _clean,
    "doctor": lambda args: doctor.main(args.json),
}
