"""Signals to the launcher. Handlers only take note; the supervisor's loop wakes and acts."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
USER = (signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """Takes over STOP and USER while it is open. `fd` is readable once a signal has arrived."""

    def __init__(self) -> None:
        self._taken: list[signal.Signals] = []
        self.fd, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # a process that it started keeps ignoring SIGHUP
        wanted = [number for number in (*STOP, *USER) if not (nohup and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._take) for number in wanted}
        self._wake_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def take(self) -> list[signal.Signals]:
        """What has arrived since the last call."""
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            pass
        taken, self._taken = self._taken, []
        return taken

    def _take(self, number: int, _: FrameType | None) -> None:
        self._taken.append(signal.Signals(number))

    def __enter__(self) -> Signals:
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wake_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._wake)


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal; the default action would end it."""
    try:
        with open(f"/proc/{pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
