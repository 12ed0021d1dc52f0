"""Ask another program one question, within a bound."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_REAP_S = 1.0


class Answer(NamedTuple):
    """How a program ended, and what it printed."""

    code: int
    out: bytes
    err: bytes

    @property
    def last_words(self) -> str:
        """The last line that says something, of stderr or else of stdout."""
        lines = [line.strip() for text in (self.out, self.err) for line in text.decode(errors="replace").splitlines()]
        return next(filter(None, reversed(lines)), "")


def ask(argv: Sequence[str], environment: Mapping[str, str], limit_s: float) -> Answer:
    """Run `argv` until it ends. All that it started is killed when `limit_s` seconds are over, or an exception comes.

    Raises:
        OSError: there is no such program.
        TimeoutError: it did not end in time.
    """
    process = subprocess.Popen(
        argv,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except BaseException as error:
        _kill(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"{argv[0]} gave no answer within {limit_s:g} s") from None
        raise
    return Answer(process.returncode, out, err)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Never waits long: a driver that hangs keeps its callers in the kernel, where SIGKILL does not reach them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(_REAP_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
