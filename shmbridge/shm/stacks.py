"""Python stacks of a live process, on demand: faulthandler writes them to a file when its signal arrives.

It works while the interpreter is stuck in native code, holds the GIL or waits in a collective; not while the process is
stopped. The signal is one that neither hosts nor Slurm use.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

SIGNAL = signal.SIGRTMIN + 5
_FOLDER = "stacks"
_written: set[Path] = set()  # files that this process, or the one that it was forked from, has open for its stacks


def path(run: Path, pid: int) -> Path:
    """Where the process with `pid` of a run in directory `run` writes its stacks."""
    return run / _FOLDER / f"{pid}.txt"


def listen(run: Path) -> bool:
    """Let this process write its stacks. False where the signal is taken, or there is no such run directory.

    A forked child, such as a DataLoader worker, has the handler too, and would write into its parent's file: the reader asks
    by pid. Calling it again opens nothing more.
    """
    file = path(run, os.getpid())
    if file in _written:
        return True
    if signal.getsignal(SIGNAL) is not signal.SIG_DFL or not run.is_dir():
        return False
    file.parent.mkdir(exist_ok=True)
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    faulthandler.register(SIGNAL, file=fd, all_threads=True, chain=False)
    _written.add(file)
    return True
