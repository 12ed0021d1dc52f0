"""torch.distributed.run in a process of our own, which tells what its ranks ended with.

torchrun itself always exits with 1, and its error file is empty for a rank that was killed or that called sys.exit(7).
Here the failures are written down as JSON, and the exit code is the first failing rank's (128 + number for a signal).

The launcher stops the ranks with one of two signals of its own (see shim.py). torchrun then sends SIGINT or SIGTERM to each
rank once, and waits for all of them. SIGINT, SIGTERM and SIGHUP to this process itself stop nothing: Slurm sends them to
every process of a step, the launcher and the ranks included.

Run by path in a child of the launcher: `python -P elastic.py --record FILE --patience S -- TORCHRUN_ARGS...`. torchrun installs signal
handlers that raise, so it never runs in the launcher's own process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

# As in supervisor/cause.py and shim.py, which this file cannot import: it is run by path, and must not see the launcher's directory.
_HARD_DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
STOPS = {signal.SIGRTMIN + 8: signal.SIGINT, signal.SIGRTMIN + 9: signal.SIGTERM}
HOLD = signal.SIGRTMIN + 10
# A signal to all processes of a step has reached the last of them so long after the launcher.
_SENT_TO_ALL_S = 0.2


def main(record: Path, patience_s: int, args: list[str]) -> int:
    """Run the training group, whose ranks have `patience_s` to stop by themselves; its exit code."""
    for number in STOPS:  # there are no ranks yet
        signal.signal(number, lambda number, _: sys.exit(128 + STOPS[number]))
    _outlive_signals()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _signal_each_rank_once(patience_s)
    try:
        run.main(args)
    except ChildFailedError as error:
        first = _first(list(error.failures.values()))
        # Of a script whose main function has @record: it gives a mapping; otherwise torchrun makes up a sentence.
        told: dict[str, Any] = first.message.get("extraInfo", {}) if isinstance(first.message, dict) else {}
        facts = {name: getattr(first, name) for name in ("local_rank", "pid", "exitcode", "timestamp")}
        record.parent.mkdir(parents=True, exist_ok=True)  # torchrun makes it only where it logs there
        record.write_text(json.dumps({"first": facts | {"traceback": str(told.get("py_callstack", ""))}}))
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


_received: dict[int, float] = {}  # signals to this process: when each came last (monotonic seconds), by number


def _note(number: int, _: FrameType | None) -> None:
    _received[number] = time.monotonic()


def _outlive_signals() -> None:
    """Have signals to this process do nothing but be noted. A handler, unlike SIG_IGN, is not inherited by the ranks."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, HOLD):
        signal.signal(number, _note)
        signal.siginterrupt(number, False)


def _signal_each_rank_once(patience_s: int) -> None:
    """Change how torchrun stops its ranks.

    It would stop them at any signal of its own, give them 30 s, less where a second signal comes, and signal their process
    groups. Here it stops them when the launcher says so, they have `patience_s`, and a rank's DataLoader workers go on, so
    that it can finish its step. A rank is sent nothing where this process has received the same signal in the last
    `patience_s`: then it was sent to all processes, and a second one would interrupt the handler of the first.
    """
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    close = api.PContext.close

    def stop(number: int, _: FrameType | None) -> None:
        for each in STOPS:
            signal.signal(each, lambda *_: None)
        logging.disable(logging.WARNING)  # the launcher has told of the stop
        time.sleep(_SENT_TO_ALL_S)
        sent = STOPS[number]
        _received.pop(HOLD, None)
        raise api.SignalException(f"the launcher stops the ranks with {sent.name}", sent)

    def patient(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        close(self, death_sig, max(timeout, patience_s))

    def signal_rank(self: SubprocessHandler, death_sig: signal.Signals | None = None) -> None:
        number = death_sig or signal.SIGTERM
        if HOLD in _received and number == signal.SIGTERM:
            return
        if number not in _received or time.monotonic() - _received[number] > patience_s:
            self.proc.send_signal(number)

    for each in STOPS:
        signal.signal(each, stop)
    setattr(api, "_terminate_process_handler", _note)  # noqa: B010
    setattr(api.PContext, "close", patient)  # noqa: B010
    setattr(SubprocessHandler, "close", signal_rank)  # noqa: B010


def _first(failures: list[ProcessFailure]) -> ProcessFailure:
    """The failure that came first. torchrun lists them as it saw them, those that it ended itself last.

    Within the second that its timestamps resolve, a rank that died by a signal comes before one whose exception may be
    the echo of it, such as a lost connection.
    """
    hard = [failure for failure in failures if -failure.exitcode in _HARD_DEATHS]
    return next((failure for failure in hard if failure.timestamp <= failures[0].timestamp + 1), failures[0])


if __name__ == "__main__":
    assert sys.argv[1::2][:2] == ["--record", "--patience"] and sys.argv[5] == "--"
    code = main(Path(sys.argv[2]), int(sys.argv[4]), sys.argv[6:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python would take half a second to take torch's modules down
