"""`shmbridge-launch`: which command is meant.

shmbridge-launch --teacher-gpu 7 --train-gpus 0-6 --teacher MODEL [a.b=c ...] -- train.py ARGS

Each command imports what it needs itself, so that it loads no more than that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from launcher.cli import parsers
from launcher.exit_codes import REFUSED


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: that of the failed child, 128 + signal, or 2 if nothing was
    started."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = parsers.launch()
    if not argv:
        parser.print_help(sys.stderr)
        return REFUSED
    if argv[0] == "help":
        argv = [*argv[1:], "--help"]
    from launcher.process.signals import Stopped
    from shmbridge.errors import ShmbridgeError

    is_command = argv[0] in parsers.COMMANDS
    said_by = f"{parsers.PROGRAM} {argv[0]}" if is_command else parsers.PROGRAM
    try:
        return _command(*argv) if is_command else _launch(parser, argv)
    except ShmbridgeError as error:
        print(f"{said_by}: {error}", file=sys.stderr)
        return REFUSED
    except Stopped as stopped:
        from launcher.console.terminal import Console

        Console().say(str(stopped))
        return 128 + stopped.number


def _command(name: str, *rest: str) -> int:
    parsers.refuse_missing_word(name, rest)
    if name in ("config", "completion", "teacher"):
        code: int = import_module(f"launcher.cli.{name}").main(rest)
        return code
    from launcher.cli import commands

    return commands.main(name, rest)


def _launch(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """A run: the launcher's arguments stand before the first `--`, the training command after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    script = argv[at + 1 :]
    if at == len(argv):
        parsers.refuse_missing_separator(parser, argv)
    args, unknown = parser.parse_known_intermixed_args(argv[:at])
    parsers.refuse_unknown_flag(parser, unknown)
    from launcher.console.terminal import Console

    if args.attach is not None:
        from launcher.cli import attach

        return attach.run(args, script, Console())
    from launcher.cli import run

    return run.run(args, script, Console())
