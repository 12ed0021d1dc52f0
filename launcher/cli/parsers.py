"""Every flag and sub-command, as argparse parsers. It imports only the standard library, because shell completion is
generated from it at build time."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Sequence
from typing import Any

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
_TEACHER_COMMANDS = {
    "start": "load a teacher and keep it, in the background, for training groups that come with --attach NAME",
    "status": "what it is, who holds it",
    "stop": "end it",
}

# Flag, setting, what its value is called, type, help. Every flag is a setting.
_Flag = tuple[str, str, str, type, str]
_CONFIG: _Flag = ("--config", "config", "FILE", str, "YAML file or ready configuration; FILE#a.b reads a section")
_RUN_DIR: _Flag = ("--run-dir", "run_dir", "DIR", str, "each run gets its own directory in it (default: runs)")
_TRAIN_GPUS: _Flag = ("--train-gpus", "train.gpus", "GPUS", str, "0-6 or 0,2,5: one rank each; 0,0: two on one GPU")
_CPU: _Flag = ("--cpu", "train.cpu_ranks", "N", int, "N training ranks on the CPU, instead of --train-gpus")
_TEACHER: tuple[_Flag, ...] = (
    ("--teacher", "teacher.model", "MODEL", str, "directory, hub id or .gguf file; or module:build"),
    ("--teacher-gpu", "teacher.gpus", "GPUS", str, "such as 7 or 6,7 (default: the teacher is on the CPU)"),
    ("--teacher-replicas", "teacher.replicas", "N", int, "copies (default: one on each of its GPUs)"),
    ("--teacher-restarts", "teacher.restarts", "N", int, "start a dead teacher again, up to N times"),
    ("--plane", "plane", "PLANE", str, "where replies lie: auto, cuda_ipc or host (default: auto)"),
)
_TRAINING: tuple[_Flag, ...] = (
    *(_TRAIN_GPUS, _CPU),
    ("--train-restarts", "train.restarts", "N", int, "start crashed training again, up to N times"),
    ("--torchrun", "train.torchrun_args", "ARGS", str, 'further flags of torchrun, in one string: "--tee 3"'),
)
_RUN: tuple[_Flag, ...] = (
    *(_CONFIG, _RUN_DIR),
    ("--name", "name", "NAME", str, "alias of the session; refused while a live launcher has it"),
)

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


def command(name: str) -> argparse.ArgumentParser:
    """The parser of the arguments after one of COMMANDS, or after `teacher start`."""
    says = COMMANDS[name] if name in COMMANDS else _TEACHER_COMMANDS[name.removeprefix("teacher ")]
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}", description=f"{says[0].upper()}{says[1:]}.", allow_abbrev=False
    )
    _add_command_flags(parser, name)
    return parser


def whole() -> argparse.ArgumentParser:
    """All commands in one parser, from which completion is generated. It is not used to parse, since a run has no
    command."""
    parser = argparse.ArgumentParser(prog=PROGRAM, allow_abbrev=False)
    _add_launch_flags(parser)
    commands = parser.add_subparsers()
    for name, says in COMMANDS.items():
        _add_command_flags(commands.add_parser(name, help=says), name)
    return parser


def _add(parser: argparse.ArgumentParser, title: str, flags: Sequence[_Flag]) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(title)
    for flag, setting, metavar, kind, says in flags:
        group.add_argument(flag, dest=setting, metavar=metavar, type=kind, help=says)
    return group


def _add_launch_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"shmbridge {__version__}")
    _add(parser, "teacher", _TEACHER)
    _add(parser, "training", _TRAINING)
    run = _add(parser, "the run", _RUN)
    run.add_argument("--attach", metavar="NAME", help="train with the teacher that `teacher start NAME` keeps loaded")
    run.add_argument(
        "--no-teacher", action="store_true", help="run the same script without a teacher; it must look at reply.missing"
    )
    run.add_argument("--dry-run", action="store_true", help="print commands, environment and memory plan, then stop")


def _add_command_flags(parser: argparse.ArgumentParser, name: str) -> None:
    def switch(flag: str, says: str) -> None:
        parser.add_argument(flag, action="store_true", help=says)

    if name in ("status", "report"):
        says = "name, id, or the beginning of an id"
        parser.add_argument("session", nargs="?", default="", metavar="SESSION", help=says)
    if name == "status":
        switch("--watch", "again every second, until Ctrl-C or the session's end")
    elif name == "report":
        switch("--json", "every fact as JSON")
    elif name == "doctor":
        switch("--json", "every fact as JSON: name, status, found, remedy")
    elif name == "clean":
        switch("--dry-run", "say what would be removed, and remove nothing")
    elif name == "completion":
        parser.add_argument("shell", choices=SHELLS, help="the shell that is to read it")
    elif name == "config":
        parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings, such as ring.depth=4")
        _add(parser, "teacher", _TEACHER)
        _add(parser, "training", _TRAINING)
        _add(parser, "the run", _RUN)
    elif name == "teacher":
        commands = parser.add_subparsers(dest="command", required=True)
        for word, says in _TEACHER_COMMANDS.items():
            _add_command_flags(commands.add_parser(word, help=says, allow_abbrev=False), f"teacher {word}")
    elif name == "teacher start":
        parser.usage = f"{PROGRAM} {name} NAME [flags] [a.b=c ...]"
        says = "its name, then settings such as ring.depth=4"
        parser.add_argument("words", nargs="+", metavar="NAME [a.b=c ...]", help=says)
        _add(parser, "teacher", _TEACHER)
        _add(parser, "the training to plan for (default: a rank on each other GPU)", (_TRAIN_GPUS, _CPU))
        _add(parser, "the run", (_CONFIG, _RUN_DIR))
        switch("--foreground", "stay in this terminal; Ctrl-C ends the teacher")
    elif name in ("teacher status", "teacher stop"):
        parser.add_argument("name", metavar="NAME")
        if name == "teacher stop":
            switch("--force", "end the training group that holds it first")


def values(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as dotted settings. None takes back what the config file has: --cpu its GPUs, --train-gpus
    its ranks on the CPU.

    Raises:
        ConfigError: a GPU list, or --config, is there but blank.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for flag, setting, *_ in (_CONFIG, _TEACHER[1], _TRAIN_GPUS):
        if setting in given and not given[setting].strip():
            what = "give a file or the name of a ready configuration" if flag == "--config" else "name GPUs such as 0-6"
            raise ConfigError(f"{flag} is empty; {what}, or leave the flag out.")
    values: dict[str, Any] = {"enabled": False} if given.get("no_teacher") else {}
    if "train.cpu_ranks" in given:
        values |= {"train.gpus": None, "teacher.gpus": None}
    if "train.gpus" in given:
        values |= {"train.cpu_ranks": None}
    settings = [setting for _, setting, *_ in (*_TEACHER, *_TRAINING, _RUN_DIR, _RUN[-1])]
    return values | {setting: given[setting] for setting in settings if setting in given}


def refuse_missing_word(name: str, rest: Sequence[str]) -> None:
    """Raises ConfigError where the command `name` needs another word and has none."""
    needed = {"teacher": "a command: start, status or stop", "completion": "a shell: bash, zsh or fish"}
    if not rest and name in needed:
        raise ConfigError(f"`{PROGRAM} {name}` needs {needed[name]}.")


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
