"""torch.distributed.run in a process of our own, which tells what its ranks ended with.

torchrun itself always exits with 1, and its error file is empty for a rank that was killed or that called sys.exit(7).
Here the failures are written down as JSON, and the exit code is the first failing rank's (128 + number for a signal).

Run by path in a child of the launcher: `python -P elastic.py --record FILE --patience S -- TORCHRUN_ARGS...`. torchrun installs signal
handlers that raise, so it never runs in the launcher's own process.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# As in cause.py, which this file cannot import: it is run by path, and must not see the launcher's directory.
_HARD_DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


def main(record: Path, patience_s: int, args: list[str]) -> int:
    """Run the training group, whose ranks have `patience_s` to stop by themselves; its exit code."""
    _outlive_user_signals()
    _let_ranks_save(patience_s)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(args)
    except ChildFailedError as error:
        failures = [_describe(rank, failure) for rank, failure in error.failures.items()]
        first = _first(failures)
        record.parent.mkdir(parents=True, exist_ok=True)  # torchrun makes it only where it logs there
        record.write_text(json.dumps({"first": first, "failures": failures}))
        code: int = first["exitcode"]
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _outlive_user_signals() -> None:
    """SIGUSR1 and SIGUSR2 are for the ranks. A handler, unlike SIG_IGN, is not inherited by them."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)


def _let_ranks_save(patience_s: int) -> None:
    """torchrun gives ranks 30 s to stop, less where a second SIGTERM comes (its shim's, behind one that was sent to all); then
    it ends, and they with it. Here the launcher decides when it is enough."""
    from torch.distributed.elastic.multiprocessing import api

    handle, close = api._terminate_process_handler, api.PContext.close

    def once(signum: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        handle(signum, frame)

    def patient(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        close(self, death_sig, max(timeout, patience_s))

    api._terminate_process_handler = once
    setattr(api.PContext, "close", patient)  # noqa: B010


def _describe(rank: int, failure: ProcessFailure) -> dict[str, Any]:
    return {
        "rank": rank,
        "local_rank": failure.local_rank,
        "pid": failure.pid,
        "exitcode": failure.exitcode,
        "signal": failure.signal_name() if failure.exitcode < 0 else None,
        "traceback": _traceback(failure.message),
        "timestamp": failure.timestamp,
    }


def _traceback(message: Any) -> str:
    """Of a script whose main function has @record: it gives a mapping; otherwise torchrun makes up a sentence."""
    return str(message.get("extraInfo", {}).get("py_callstack", "")) if isinstance(message, dict) else ""


def _first(failures: list[dict[str, Any]]) -> dict[str, Any]:
    """The failure that came first. torchrun lists them as it saw them, those that it ended itself last.

    Within the second that its timestamps resolve, a rank that died by a signal comes before one whose exception may be
    the echo of it, such as a lost connection.
    """
    first = failures[0]
    for failure in failures:
        if -failure["exitcode"] in _HARD_DEATHS and failure["timestamp"] <= first["timestamp"] + 1:
            return failure
    return first


if __name__ == "__main__":
    assert sys.argv[1::2][:2] == ["--record", "--patience"] and sys.argv[5] == "--"
    sys.exit(main(Path(sys.argv[2]), int(sys.argv[4]), sys.argv[6:]))
