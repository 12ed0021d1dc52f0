"""The command: all checks, printed as a table or as JSON."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

import msgspec

from launcher.doctor import host
from launcher.doctor.checks import STATUSES, Fact, gather, worst
from launcher.process.signals import Stopped
from shmbridge import __version__

# The order in which facts are told, and the names that --json promises.
NAMES = (
    *("python", "torch", "cuda", "driver", "gpus", "peer_access", "cuda_ipc", "shm", "memlock", "ptrace_scope"),
    *("pidfd", "pid_namespace", "host_name", "numa", "sessions", "packages", "optional"),
)
_LIMIT_S = 10.0  # of the checks that start no process: a name server may be slow
_COLOURS = {"ok": "32", "warning": "33", "fault": "31;1"}
_STATUS_WIDTH, _NAME_WIDTH = max(map(len, STATUSES)), max(map(len, NAMES))
_MARGIN = 2


class Examination(msgspec.Struct, frozen=True):
    """What `doctor --json` prints."""

    shmbridge: str  # version
    status: str  # the worst of the facts': ok, warning or fault
    facts: list[Fact]  # in the order of NAMES


def main(as_json: bool) -> int:
    """Run all checks and print them; 0, or 1 where there is a fault, or 128 + signal."""
    try:
        facts = _all()
    except Stopped as stopped:
        return 128 + stopped.number
    status = worst(facts)
    if as_json:
        encoded = msgspec.json.encode(Examination(__version__, status, facts))
        sys.stdout.write(msgspec.json.format(encoded).decode() + "\n")
    else:
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if terminal else 0
        print(f"shmbridge {__version__} on this machine\n")
        print(page(facts, width, coloured=terminal and not os.environ.get("NO_COLOR")))
        counts = [(word, sum(fact.status == word for fact in facts)) for word in ("fault", "warning")]
        told = ", ".join(f"{count} {word}{'s' if count > 1 else ''}" for word, count in counts if count)
        print(f"\n{len(facts)} checks: {told or 'all ok'}")
    return 1 if status == "fault" else 0


def page(facts: Sequence[Fact], width: int = 0, coloured: bool = False, margin: int = _MARGIN) -> str:
    """A line for each fact, and its remedy in the line below; wrapped at `width` columns, 0: never."""
    indent = margin + _STATUS_WIDTH + 2 + _NAME_WIDTH + 2
    room = max(30, width - indent) if width else 10**9
    wrapper = textwrap.TextWrapper(room, break_long_words=False, break_on_hyphens=False)
    lines = []
    for fact in facts:
        status = fact.status.ljust(_STATUS_WIDTH)
        if coloured:
            status = f"\033[{_COLOURS[fact.status]}m{status}\033[0m"
        wrapper.subsequent_indent = ""
        found, *more = wrapper.wrap(fact.found) or [""]
        wrapper.subsequent_indent = "   "
        more += wrapper.wrap(f"-> {fact.remedy}") if fact.remedy else []
        lines.append(f"{' ' * margin}{status}  {fact.name.replace('_', ' '):{_NAME_WIDTH}}  {found}".rstrip())
        lines += [" " * indent + line for line in more]
    return "\n".join(lines)


def _all() -> list[Fact]:
    from launcher.doctor import gpu

    waiting = sys.stderr.isatty()

    def note(text: str) -> None:
        if waiting:
            print(f"\r\033[K{text + ' ...' if text else ''}", end="", file=sys.stderr, flush=True)

    note("looking at this machine")
    try:
        found = {fact.name: fact for fact in [*gather(host.CHECKS, _LIMIT_S), *gpu.facts(note)]}
    finally:
        note("")
    return [found[name] for name in NAMES]
