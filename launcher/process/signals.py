"""Signals to the launcher. While Signals is open its handlers only take note, and the event loop wakes and acts."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterable
from types import FrameType

from launcher.process import shim

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
USER = (signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):  # like KeyboardInterrupt: no check that goes on after an Exception goes on after this
    """The user ended the launcher before its event loop ran."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.number = number


class Signals:
    """Takes over STOP and USER while it is open. `fd` is readable once a signal has arrived."""

    def __init__(self) -> None:
        self._taken: list[signal.Signals] = []
        self.fd, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # a process that it started keeps ignoring SIGHUP
        wanted = [number for number in (*STOP, *USER) if not (nohup and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._take) for number in wanted}
        self._wake_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)  # a keeper in the background is started with them blocked

    def take(self) -> list[signal.Signals]:
        """What has arrived since the last call."""
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            pass
        taken, self._taken = self._taken, []
        return taken

    def check(self) -> None:
        """Raises Stopped where a signal that ends the launcher has arrived since the last call."""
        for number in self.take():
            if number in STOP:
                raise Stopped(number)

    def wait(self, seconds: float, fds: Iterable[int] = ()) -> set[int]:
        """Sleep until a signal arrives or one of `fds` is readable; which of them are."""
        poll = select.poll()
        for fd in (self.fd, *fds):
            poll.register(fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(1000 * seconds)}

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


def exit_on_interrupt() -> None:
    """Let SIGINT end this process at once, and what it has started, until Signals is open. Nothing is there yet that must be removed. As
    a KeyboardInterrupt it could come while a module is imported or in an extension's C code, where it is lost or crashes."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def spare_children() -> None:
    """Let SIGINT end this process alone from now on while Signals is not open: it is about to start one that outlives it."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _exit(number: int, _: FrameType | None) -> None:
    shim.kill_all(shim.descendants(os.getpid()), and_trackers=True)
    os._exit(128 + number)


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal; the default action would end it."""
    try:
        with open(f"/proc/{pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
