"""`shmbridge-launch`: which command is meant.

shmbridge-launch --teacher-gpu 7 --train-gpus 0-6 --teacher MODEL [a.b=c ...] -- train.py ARGS
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from launcher.cli import parsers
from launcher.codes import INTERRUPTED, REFUSED


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
    from shmbridge.errors import ShmbridgeError

    said_by = parsers.PROGRAM
    try:
        if argv[0] in parsers.COMMANDS:
            parsers.refuse_missing_word(argv)
            said_by += f" {argv[0]}"
            return _command(argv)
        arguments, script = _split(argv)
        if "--" not in argv:
            parsers.refuse_missing_separator(parser, argv)
        args, unknown = parser.parse_known_intermixed_args(arguments)
        parsers.refuse_unknown_flag(parser, unknown)
        return _launch(args, script)
    except ShmbridgeError as error:
        print(f"{said_by}: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED


def _command(argv: Sequence[str]) -> int:
    """The commands import what they need themselves, so that each loads no more than that."""
    name, *rest = argv
    if name == "config":
        from launcher.cli import config

        return config.main(rest)
    if name == "completion":
        from launcher.cli import completion

        return completion.main(rest)
    if name == "teacher":
        from launcher.cli import teacher

        return teacher.main(rest)
    from launcher.cli import commands

    return commands.main(name, rest)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's arguments, and the training command after the first `--`."""
    arguments = list(argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _launch(args: argparse.Namespace, script: Sequence[str]) -> int:
    from launcher.console.terminal import Console

    if args.attach is not None:
        from launcher.cli import attach

        return attach.run(args, script, Console())
    from launcher.cli import run

    return run.run(args, script, Console())
