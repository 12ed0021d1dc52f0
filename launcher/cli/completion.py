"""`shmbridge-launch completion SHELL`: the shell's completion script. A wheel holds all of them, made when it was built."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from launcher.cli import parsers
from launcher.exit_codes import REFUSED
from shmbridge.launch import folder

_FILES = ("config", "teacher.model")
_FOLDERS = ("run_dir",)

# The training script and its arguments follow `--`: files, which shtab does not know. Bash and zsh run the first line of
# shtab's function; fish reads a line of its own.
_FUNCTION = "\n_shtab_shmbridge_launch() {\n"
_AFTER_SEPARATOR = {
    "bash": '  [[ " ${COMP_WORDS[*]:0:COMP_CWORD} " == *" -- "* ]] && { COMPREPLY=(); compopt -o default; return; }\n',
    "zsh": "  (( ${words[(I)--]} && ${words[(i)--]} < CURRENT )) && { _files; return; }\n",
}
_FISH = "\ncomplete -c shmbridge-launch -n 'contains -- -- (commandline -opc)' -F\n"


def main(argv: Sequence[str]) -> int:
    """Print a completion script; the exit code."""
    shell = parsers.command("completion").parse_args(argv).shell
    shipped = folder("completions") / shell
    if shipped.is_file():
        print(shipped.read_text(), end="")
        return 0
    if importlib.util.find_spec("shtab") is None:
        print(
            "shmbridge-launch completion: an installed wheel holds the scripts; a checkout makes them with shtab, which is "
            "not installed here: pip install shtab",
            file=sys.stderr,
        )
        return REFUSED
    print(generate(shell))
    return 0


def generate(shell: str) -> str:
    """The completion script of `shell`, made by shtab."""
    import shtab

    parser = parsers.whole()
    _complete_paths(parser, shtab)
    made: str = shtab.complete(parser, shell)
    if shell == "fish":
        return made + _FISH
    assert made.count(_FUNCTION) == 1
    return made.replace(_FUNCTION, _FUNCTION + _AFTER_SEPARATOR[shell])


def _complete_paths(parser: argparse.ArgumentParser, shtab: object) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_paths(inner, shtab)
        elif action.dest in _FILES + _FOLDERS:
            setattr(action, "complete", getattr(shtab, "FILE" if action.dest in _FILES else "DIRECTORY"))  # noqa: B010
