#!/usr/bin/env python3
"""Benchmarks of shmbridge: one sub-command each.

    python scripts/bench.py roundtrip                       # tables on the terminal, some three minutes
    python scripts/bench.py roundtrip --quick               # one rank, few requests
    python scripts/bench.py roundtrip --json roundtrip.json # every figure, with machine and versions
    python scripts/bench.py overlap                         # training steps beside a teacher; some five minutes
    python scripts/bench.py trainer                         # HuggingFace's Trainer beside a teacher; some two minutes
    python scripts/bench.py replicas                        # one, two and four teachers; some four minutes
    python scripts/bench.py losses                          # memory and time of the losses
    python scripts/bench.py cuda                            # the CUDA plane; needs a GPU

All but `losses` know --quick and --json. `roundtrip` needs `pip install -e .[bench]` for the ZeroMQ peer; a peer that is not
installed or does not run is reported as failed and the others go on.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before NumPy and torch load: every copy below is one thread's, and a process with threads must not fork.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

from benchmarks import cuda, losses, overlap, replicas, roundtrip, trainer
from benchmarks.cell import PLACEMENTS


def main() -> int:
    """Run the sub-command that the command line names; its exit code."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        print("stopped; nothing is left behind", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Benchmarks of shmbridge.")
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    _add_roundtrip(commands)
    _add_overlap(commands)
    _add_trainer(commands)
    _add_replicas(commands)
    command = _add(commands, "losses", "peak memory and time of the losses, beside the plain formulas", losses)
    losses.add_arguments(command)
    command = _add(commands, "cuda", "the CUDA plane: copies, calls, steps; needs a GPU", cuda)
    cuda.add_arguments(command)
    _add_common(command, "small replies, few turns")
    return parser


def _add(commands: Any, name: str, text: str, module: Any) -> argparse.ArgumentParser:
    """The sub-command whose module's docstring tells the rest."""
    raw = argparse.RawDescriptionHelpFormatter
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=module.__doc__, formatter_class=raw
    )
    command.set_defaults(run=module.run)
    return command


def _add_common(command: argparse.ArgumentParser, quick: str) -> None:
    command.add_argument("--quick", action="store_true", help=quick)
    command.add_argument("--patience", type=float, default=60.0, help="seconds until a process counts as hung")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure, machine and versions")


def _add_roundtrip(commands: Any) -> None:
    text = "IDs to the teacher and its reply back: this bridge, the raw limit, and other transports"
    command = _add(commands, "roundtrip", text, roundtrip)
    command.add_argument("--ranks", type=_list_of(_count), default=[1, 2, 4], help="training ranks (default: 1,2,4)")
    command.add_argument(
        "--sizes", type=_list_of(_nbytes), default=[1 << 10, 16 << 20], help="reply sizes (default: 1KB,16MB)"
    )
    command.add_argument(
        "--placement", type=_list_of(_placement), default=list(PLACEMENTS), help="cores (default: same,across)"
    )
    command.add_argument("--requests", type=_count, default=1000, help="per rank and row; a tenth from 1 MB on")
    _add_common(command, "one rank and 200 requests")


def _add_overlap(commands: Any) -> None:
    command = _add(commands, "overlap", "training steps beside a teacher of simulated devices", overlap)
    command.add_argument("--ranks", type=_count, default=7, help="training ranks (default: 7)")
    command.add_argument("--student-ms", type=float, default=100.0, help="s, a step of the student (default: 100)")
    command.add_argument(
        "--multiples", type=_list_of(float), default=[0.25, 0.5, 1.0, 2.0], help="t, in s (default: 0.25,0.5,1,2)"
    )
    command.add_argument(
        "--apart", type=_list_of(float), default=[0.05, 0.2], help="ranks ask so far apart, in s (default: 0.05,0.2)"
    )
    _add_turns(command, steps=20, repeats=3)
    _add_common(command, "three ranks, short steps, one turn")


def _add_trainer(commands: Any) -> None:
    command = _add(commands, "trainer", "steps of HuggingFace's Trainer beside a teacher of simulated devices", trainer)
    command.add_argument(
        "--student-ms", type=_count, default=200, help="s, a micro-batch of the student (default: 200)"
    )
    command.add_argument(
        "--multiples", type=_list_of(float), default=[0.5, 1.0, 2.0], help="t, in s (default: 0.5,1,2)"
    )
    command.add_argument("--accumulation", type=_list_of(_count), default=[1, 4], help="k (default: 1,4)")
    command.add_argument("--depths", type=_list_of(_count), default=[1, 2], help="ring.depth (default: 1,2)")
    command.add_argument("--micro-batches", type=_count, default=12, help="of an epoch (default: 12)")
    _add_common(command, "short steps, one depth")


def _add_replicas(commands: Any) -> None:
    command = _add(commands, "replicas", "one to several teachers of simulated devices", replicas)
    command.add_argument("--ranks", type=_list_of(_count), default=[8, 7], help="training ranks (default: 8,7)")
    command.add_argument("--replicas", type=_list_of(_count), default=[1, 2, 4], help="teachers (default: 1,2,4)")
    command.add_argument("--us-per-token", type=float, default=40.0, help="of a teacher's device (default: 40)")
    _add_turns(command, steps=20, repeats=3)
    _add_common(command, "few ranks, one turn")


def _add_turns(command: argparse.ArgumentParser, steps: int, repeats: int) -> None:
    command.add_argument("--steps", type=_count, default=steps, help=f"of one turn (default: {steps})")
    command.add_argument("--repeats", type=_count, default=repeats, help=f"turns of each case (default: {repeats})")


def _list_of(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return list(dict.fromkeys(convert(item.strip()) for item in text.split(",")))

    return parse


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _nbytes(text: str) -> int:
    """`1KB` is 1024 bytes; a multiple of 64, because a reply is whole cache lines of float32."""
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10), ("B", 1)):
        number = text.upper().removesuffix(unit)
        if number != text.upper() and number.isdecimal() and int(number) * size % 64 == 0 and int(number):
            return int(number) * size
    raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1KB or 16MB, in steps of 64 bytes")


def _placement(text: str) -> str:
    if text not in PLACEMENTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PLACEMENTS)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
