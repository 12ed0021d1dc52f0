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
from types import ModuleType
from typing import Any

# Before NumPy and torch load: every copy below is one thread's, and a process with threads must not fork.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

from benchmarks import cuda, losses, overlap, replicas, roundtrip, trainer
from benchmarks.processes import Failed


def main() -> int:
    """Run the sub-command that the command line names; its exit code."""
    parser = _parser()
    options = parser.parse_args()
    if getattr(options, "quick", False):
        options.command.set_defaults(**options.module.QUICK)
        options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int = options.module.run(options)
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing is left behind", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Benchmarks of shmbridge.")
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")

    def add(module: ModuleType, text: str, quick: str = "") -> Callable[..., Any]:
        """A sub-command, described by its module's docstring; returns what adds an option to it."""
        name = module.__name__.rpartition(".")[2]
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=text, description=module.__doc__, formatter_class=raw)
        command.set_defaults(command=command, module=module)
        if quick:
            command.add_argument("--quick", action="store_true", help=quick)
            command.add_argument("--patience", type=float, default=60.0, help="seconds until a process counts as hung")
            command.add_argument("--json", type=Path, metavar="FILE", help="write every figure, machine and versions")
        return command.add_argument

    def add_turns(option: Callable[..., Any]) -> None:
        option("--steps", type=_count, default=20, help="of one turn (default: 20)")
        option("--repeats", type=_count, default=3, help="turns of each case (default: 3)")

    option = add(
        roundtrip,
        "IDs to the teacher and its reply back: this bridge, the raw limit, and other transports",
        "one rank and 200 requests",
    )
    option("--ranks", type=_list_of(_count), default=[1, 2, 4], help="training ranks (default: 1,2,4)")
    option("--sizes", type=_list_of(_nbytes), default=[1 << 10, 16 << 20], help="reply sizes (default: 1KB,16MB)")
    option("--placement", type=_list_of(_placement), default=["same", "across"], help="cores (default: same,across)")
    option("--requests", type=_count, default=1000, help="per rank and row; a tenth from 1 MB on")

    option = add(overlap, "training steps beside a teacher of simulated devices", "three ranks, short steps, one turn")
    option("--ranks", type=_count, default=7, help="training ranks (default: 7)")
    option("--student-ms", type=float, default=100.0, help="s, a step of the student (default: 100)")
    option("--multiples", type=_list_of(float), default=[0.25, 0.5, 1.0, 2.0], help="t, in s (default: 0.25,0.5,1,2)")
    option(
        "--apart", type=_list_of(float), default=[0.05, 0.2], help="ranks ask so far apart, in s (default: 0.05,0.2)"
    )
    add_turns(option)

    option = add(
        trainer,
        "steps of HuggingFace's Trainer beside a teacher of simulated devices",
        "short steps, one depth",
    )
    option("--student-ms", type=_count, default=200, help="s, a micro-batch of the student (default: 200)")
    option("--multiples", type=_list_of(float), default=[0.5, 1.0, 2.0], help="t, in s (default: 0.5,1,2)")
    option("--accumulation", type=_list_of(_count), default=[1, 4], help="k (default: 1,4)")
    option("--depths", type=_list_of(_count), default=[1, 2], help="ring.depth (default: 1,2)")
    option("--micro-batches", type=_count, default=12, help="of an epoch (default: 12)")

    option = add(replicas, "one to several teachers of simulated devices", "few ranks, one turn")
    option("--ranks", type=_list_of(_count), default=[8, 7], help="training ranks (default: 8,7)")
    option("--replicas", type=_list_of(_count), default=[1, 2, 4], help="teachers (default: 1,2,4)")
    option("--us-per-token", type=float, default=40.0, help="of a teacher's device (default: 40)")
    add_turns(option)

    option = add(losses, "peak memory and time of the losses, beside the plain formulas")
    option("--rows", type=_count, default=2048, help="positions (default: 2048)")
    option("--vocab", type=_count, default=32768, help="words (default: 32768)")
    option("--dim", type=_count, default=256, help="width of the hidden states (default: 256)")
    option("--dtypes", type=_list_of(str), default=["float32", "bfloat16"], help="inputs (default: float32,bfloat16)")

    option = add(cuda, "the CUDA plane: copies, calls, reads; needs a GPU", "small replies, few turns")
    option("--teacher", type=int, default=0, metavar="GPU", help="the teacher's card (default: 0)")
    option("--rank", type=int, default=0, metavar="GPU", help="the rank's card (default: 0)")
    option("--mib", type=_count, default=256, help="the largest reply (default: 256)")
    option("--turns", type=_count, default=200, help="of each measurement (default: 200)")
    return parser


def _list_of(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: list(dict.fromkeys(convert(item.strip()) for item in text.split(",")))


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
    if text not in ("same", "across"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of same, across")
    return text


if __name__ == "__main__":
    sys.exit(main())
