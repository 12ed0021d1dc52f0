"""Every flag and sub-command, as argparse parsers. It imports only the standard library, because shell completion is
generated from it at build time."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Sequence

from shmbridge import __version__
from shmbridge.errors import ConfigError

PROGRAM = "shmbridge-launch"
# What each command does, as the help of all and of itself says it.
COMMANDS = {
    "config": "print every setting with its comment, unit and default, as YAML that --config reads",
    "status": "show what each process of a live session is doing",
    "report": "show who waits for whom in a live session, with every process's Python stacks",
    "ls": "list the sessions of this user on this machine",
    "clean": "remove what dead sessions left; live ones are never touched",
    "doctor": "check this machine: what a run needs, what was found, and the remedy",
    "teacher": "load a teacher once and keep it for several runs: teacher start, status, stop",
    "completion": "print the completion script of a shell: bash, zsh or fish",
    "help": "print this help",
}
_SPLIT = re.compile(r"=[{\[][^}\]]*$")  # a setting whose brace or bracket does not close
SHELLS = ("bash", "zsh", "fish")

_EXAMPLE = f"{PROGRAM} --teacher-gpu 7 --train-gpus 0-6 --teacher meta-llama/Llama-3.1-8B -- train.py --lr 1e-4"
_EPILOG = f"""\
commands:
{{commands}}

  `{PROGRAM} COMMAND --help` tells more of each.

example:
  {_EXAMPLE}

Every flag is a setting of the config file too, and a.b=c overrides any setting: `{PROGRAM} config` prints all of them.
Completion: put `eval "$({PROGRAM} completion bash)"` into ~/.bashrc (or zsh and ~/.zshrc), or in fish
`{PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish`.
"""


def launch() -> argparse.ArgumentParser:
    """The parser of the arguments before `--` of a run."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [flags] [a.b=c ...] -- train.py ...\n"
        "       %(prog)s [flags] [a.b=c ...] -- -m package.module ...\n"
        "       %(prog)s COMMAND ...",
        description="Start a teacher and a torchrun training group as two jobs, with a bridge between them.",
        epilog=_EPILOG.format(commands="\n".join(f"  {name:{width}}  {says}" for name, says in COMMANDS.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings, such as ring.depth=4 (read as YAML)")
    _add_launch_flags(parser)
    return parser


def _add_launch_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"shmbridge {__version__}")
    add_teacher_flags(parser)
    training = parser.add_argument_group("training")
    _add_training_flags(training)
    run = parser.add_argument_group("the run")
    _add_run_flags(run)
    run.add_argument("--attach", metavar="NAME", help="train with the teacher that `teacher start NAME` keeps loaded")
    run.add_argument(
        "--no-teacher", action="store_true", help="run the same script without a teacher; it must look at reply.missing"
    )
    run.add_argument("--dry-run", action="store_true", help="print commands, environment and memory plan, then stop")


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher", metavar="MODEL", help="directory, hub id or .gguf file; or module:build")
    group.add_argument("--teacher-gpu", metavar="GPUS", help="such as 7 or 6,7 (default: the teacher is on the CPU)")
    group.add_argument("--teacher-replicas", metavar="N", type=int, help="copies (default: one on each of its GPUs)")
    group.add_argument("--teacher-restarts", metavar="N", type=int, help="start a dead teacher again, up to N times")
    group.add_argument("--plane", metavar="PLANE", help="where replies lie: auto, cuda_ipc or host (default: auto)")


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--train-gpus", metavar="GPUS", help="such as 0-6 or 0,2,5, one rank each; 0,0: two on one GPU")
    group.add_argument("--cpu", metavar="N", type=int, help="N training ranks on the CPU, instead of --train-gpus")
    group.add_argument("--train-restarts", metavar="N", type=int, help="start crashed training again, up to N times")
    group.add_argument("--torchrun", metavar="ARGS", help='further flags of torchrun, in one string: "--tee 3"')


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--config", metavar="FILE", help="YAML file, or the name of a ready configuration; FILE#a.b reads one section"
    )
    group.add_argument("--run-dir", metavar="DIR", help="each run gets its own directory in it (default: runs)")
    group.add_argument("--name", metavar="NAME", help="alias of the session; refused while a live launcher has it")


def teacher_start() -> argparse.ArgumentParser:
    """The parser of `teacher start`."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} teacher start",
        usage="%(prog)s NAME [flags] [a.b=c ...]",
        description="Load a teacher and keep it, in the background, for training groups that come with --attach NAME.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "words", nargs="+", metavar="NAME [a.b=c ...]", help="its name, then settings such as ring.depth=4"
    )
    _add_start_flags(parser)
    return parser


def _add_start_flags(parser: argparse.ArgumentParser) -> None:
    add_teacher_flags(parser)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file, or the name of a ready configuration; FILE#a.b reads one section"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="the teacher gets its own directory in it (default: runs)")
    parser.add_argument("--train-gpus", metavar="GPUS", help="which GPUs will train (default: all others)")
    parser.add_argument("--cpu", metavar="N", type=int, help="how many ranks on the CPU are planned for")
    parser.add_argument("--foreground", action="store_true", help="stay in this terminal; Ctrl-C ends the teacher")


def kept_teacher() -> argparse.ArgumentParser:
    """The parser of `teacher status` and `teacher stop`; `teacher_start` parses `teacher start`."""
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} teacher", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start", help="load a teacher and keep it (teacher start --help)")
    _add_kept_commands(commands)
    return parser


def _add_kept_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for command, says in (("status", "what it is, who holds it"), ("stop", "end it")):
        sub = commands.add_parser(command, help=says, allow_abbrev=False)
        sub.add_argument("name", metavar="NAME")
        if command == "stop":
            sub.add_argument("--force", action="store_true", help="end the training group that holds it first")


def command(name: str) -> argparse.ArgumentParser:
    """The parser of the arguments after one of COMMANDS."""
    says = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}", description=f"{says[0].upper()}{says[1:]}.", allow_abbrev=False
    )
    add_command_flags(parser, name)
    return parser


def add_command_flags(parser: argparse.ArgumentParser, name: str) -> None:
    if name in ("status", "report"):
        parser.add_argument(
            "session", nargs="?", default="", metavar="SESSION", help="name, id, or the beginning of an id"
        )
    if name == "status":
        parser.add_argument(
            "--watch", action="store_true", help="again every second, until Ctrl-C or the session's end"
        )
    if name == "report":
        parser.add_argument("--json", action="store_true", help="every fact as JSON")
    if name == "doctor":
        parser.add_argument("--json", action="store_true", help="every fact as JSON: name, status, found, remedy")
    if name == "clean":
        parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    if name == "completion":
        parser.add_argument("shell", choices=SHELLS, help="the shell that is to read it")
    if name == "config":
        parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings, such as ring.depth=4")
        add_teacher_flags(parser)
        _add_training_flags(parser.add_argument_group("training"))
        _add_run_flags(parser.add_argument_group("the run"))


def whole() -> argparse.ArgumentParser:
    """All commands in one parser, from which completion is generated. It is not used to parse, since a run has no
    command."""
    parser = argparse.ArgumentParser(prog=PROGRAM, allow_abbrev=False)
    _add_launch_flags(parser)
    commands = parser.add_subparsers()
    for name, says in COMMANDS.items():
        sub = commands.add_parser(name, help=says)
        if name == "teacher":
            kept = sub.add_subparsers()
            start = kept.add_parser("start", help="load a teacher and keep it")
            start.add_argument("name", metavar="NAME")
            _add_start_flags(start)
            _add_kept_commands(kept)
        else:
            add_command_flags(sub, name)
    return parser


def refuse_missing_word(argv: Sequence[str]) -> None:
    """Raises ConfigError where a command stands alone that needs another word."""
    needed = {"teacher": "a command: start, status or stop", "completion": "a shell: bash, zsh or fish"}
    if len(argv) == 1 and argv[0] in needed:
        raise ConfigError(f"`{PROGRAM} {argv[0]}` needs {needed[argv[0]]}.")


def refuse_missing_separator(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Raises ConfigError where a training script follows without `--`, or a word is no command."""
    own = _length_of_own(parser, argv)
    if own == len(argv) or (
        own and _SPLIT.search(argv[own - 1])
    ):  # the shell split a setting: the settings' reader tells
        return
    word, script = argv[own], list(argv[own:])
    near = [] if own or word.endswith(".py") else difflib.get_close_matches(word, COMMANDS, n=1)
    if near:
        raise ConfigError(f"unknown command {word!r}; did you mean `{PROGRAM} {near[0]}`?")
    if word in ("python", "python3"):  # torchrun starts it
        script = script[1:]
    before = list(argv[:own])
    if not own:  # the flags stand behind the script
        flags = _length_of_own(parser, script[1:])
        script, before = [*script[:1], *script[1 + flags :]], script[1 : 1 + flags]
    raise ConfigError(
        f"found {word!r} where a flag or a setting (a.b=c) was expected. The training script and its arguments follow `--`:"
        f"\n\n  {shlex.join([PROGRAM, *before, '--', *script])}"
    )


def _length_of_own(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """How many of the first words are flags with their values, or settings."""
    takes_value = False
    for at, word in enumerate(argv):
        option = parser._option_string_actions.get(word)
        if not (takes_value or option or word.startswith("--") or (word[:1] != "-" and "=" in word)):
            return at
        takes_value = option is not None and option.nargs != 0 and not takes_value
    return len(argv)


def refuse_unknown_flag(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Raises ConfigError where the parser did not know a flag."""
    for word in unknown:
        near = difflib.get_close_matches(word.partition("=")[0], parser._option_string_actions, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"`{parser.prog} --help` lists the flags"
        raise ConfigError(f"unknown flag {word}; {hint}")
