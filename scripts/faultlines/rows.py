"""What a row is, and the stage on which it is played: a directory with actors, launchers, and what is expected of them."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faultlines.runs import Overdue, Run, python

ACTORS = Path(__file__).parent / "actors"
GRACE_S = 5.0  # timeouts.shutdown_s


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    number: int
    fault: str
    promise: str
    within: str
    play: Callable[[Stage], None]
    alone: bool  # nothing else runs beside it, because a second is promised


@dataclass
class Result:
    """What came of a row."""

    number: int
    fault: str
    promise: str
    within: str
    seen: str
    seconds: float | None  # of what came closest to its limit
    limit_s: float | None
    ended_s: float | None  # from the fault to the launcher's own end
    measured: dict[str, float]
    wrong: list[str]
    wall_s: float

    @property
    def holds(self) -> bool:
        return not self.wrong


@dataclass
class Stage:
    """Where one row is played."""

    directory: Path
    slack: float = 1.0  # limits are so many times longer
    runs: list[Run] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    measured: list[tuple[str, float, float]] = field(default_factory=list)
    ended_s: float | None = None
    attached: Run | None = None  # it has a session that is not its own

    def launch(
        self,
        part: str,
        *arguments: str,
        teacher: str = "plain",
        ranks: int = 2,
        words: Sequence[str] = (),
        program: Sequence[str] | None = None,
        **variables: str,
    ) -> Run:
        """`shmbridge-launch` with the training script in the role `part`; `program` in place of the command."""
        own = [
            "--teacher",
            f"teachers:{teacher}",
            "--cpu",
            str(ranks),
            "ring.max_tokens=64",
            f"timeouts.shutdown_s={GRACE_S:g}",
        ]
        more = [*own, *arguments, "--", "train.py", part, *words]
        return self.start([*(program or python("shmbridge.launch")), *more], **variables)

    def start(self, command: Sequence[str], **variables: str) -> Run:
        run = Run(command, self.directory, variables)
        self.runs.append(run)
        return run

    def expect(self, condition: object, text: str) -> None:
        """`text` tells what was wrong where `condition` is false."""
        if not condition:
            self.wrong.append(text)

    def says(self, text: str) -> None:
        """For the column `seen`."""
        self.told.append(text)

    def took(self, what: str, seconds: float, limit_s: float) -> None:
        """From the fault to what is promised."""
        limit_s *= self.slack
        self.measured.append((what, seconds, limit_s))
        self.expect(0 <= seconds <= limit_s, f"{what} took {seconds:.2f} s, promised within {limit_s:g} s")

    def named(self, run: Run, fault: float, limit_s: float) -> None:
        """The launcher names the cause in time, and ends within its grace."""
        self.took("the launcher's word", run.says(r"^\[launcher\] .*; stopping$") - fault, limit_s)
        self.ends(run, fault, limit_s + GRACE_S)

    def ends(self, run: Run, fault: float, limit_s: float) -> None:
        limit_s *= self.slack
        self.ended_s = run.end() - fault
        self.expect(self.ended_s <= limit_s, f"the launcher ended after {self.ended_s:.2f} s, not within {limit_s:g} s")

    def root_cause(self, run: Run, code: int, who: str, reason: str, **place: Any) -> str:
        """Exit code and the one message of a run that failed; its sentence. `place`: fields of the cause, True: any."""
        self.ends_with(run, code)
        cause = run.report.get("cause", {})
        self.expect(run.text.count("The run failed after") == 1, "there is not one root-cause message")
        self.expect(run.report.get("action") and run.report.get("path"), "the report names no next action or file")
        self.expect(re.fullmatch(who, cause.get("who", "")), f"{cause.get('who')!r} is named, not {who!r}")
        self.expect(re.search(reason, cause.get("reason", "")), f"the reason is {cause.get('reason')!r}")
        self.expect(cause.get("pid"), "no pid is named")
        for key, expected in place.items():
            found = cause.get(key)
            right = found is not None and found != "" if expected is True else found == expected
            self.expect(right, f"the report's {key} is {found!r}")
        return _sentence(cause)

    def ends_with(self, run: Run, code: int) -> None:
        """The launcher's exit code, and nothing of the run is left."""
        self.expect(run.code == code, f"the exit code is {run.code}, not {code}")
        self.leaves_nothing(run)

    def leaves_nothing(self, run: Run) -> None:
        left = run.processes()
        self.expect(not left, f"processes are left: {left}")
        if run is not self.attached:
            self.has_no_objects(run)

    def has_no_objects(self, run: Run) -> None:
        self.expect(not run.objects, f"objects are left in /dev/shm: {run.objects}")

    def seen_by_teacher(self) -> set[int]:
        """Every token that a forward has seen."""
        path = self.directory / "seen"
        return set(map(int, path.read_text().split())) if path.exists() else set()


def play(row: Row, slack: float = 1.0) -> Result:
    """Play one row to its end, and leave nothing of it."""
    began = time.monotonic()
    with staged(slack) as stage:
        try:
            row.play(stage)
        except Overdue as overdue:
            stage.wrong.append(str(overdue))
        except Exception as error:  # a row that is broken itself does not hold either
            stage.wrong.append(f"{type(error).__name__}: {error}")
    worst = max(stage.measured, key=lambda one: one[1] / one[2], default=("", None, None))
    return Result(
        number=row.number,
        fault=row.fault,
        promise=row.promise,
        within=row.within,
        seen="; ".join(stage.told),
        seconds=worst[1],
        limit_s=worst[2],
        ended_s=stage.ended_s,
        measured={what: round(seconds, 3) for what, seconds, _ in stage.measured},
        wrong=stage.wrong,
        wall_s=round(time.monotonic() - began, 1),
    )


@contextmanager
def staged(slack: float = 1.0) -> Iterator[Stage]:
    """A stage; nothing of its runs is left at the end."""
    directory = Path(tempfile.mkdtemp(prefix="faults-"))
    for name in ("teachers.py", "train.py", "notes.py"):
        shutil.copy(ACTORS / name, directory)
    stage = Stage(directory, slack)
    try:
        yield stage
    finally:
        for run in stage.runs:
            try:
                run.clear()
            except Exception as error:
                print(f"pid {run.process.pid} could not be cleared: {error}", file=sys.stderr)
        if stage.wrong and stage.runs:  # for whoever looks into it
            (directory / "output.txt").write_text("\n\n".join(_timed(run) for run in stage.runs))
            stage.wrong.append(f"see {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _timed(run: Run) -> str:
    """Its output, each line with its second (monotonic)."""
    return "\n".join([*(f"{at:.3f} {line}" for at, line in run.lines), f"{run.ended_at} {run.process.returncode}"])


def _sentence(cause: dict[str, Any]) -> str:
    """`rank 1: killed by SIGKILL (pid 12, training, step 5, sequence 6)`."""
    place = [f"pid {cause.get('pid')}", cause.get("phase") or ""]
    place += [f"{name} {cause[name]}" for name in ("step", "sequence") if cause.get(name) is not None]
    first = str(cause.get("reason", "")).split("\n")[0]
    first = first.removeprefix("shmbridge.errors.")
    short = first if len(first) <= 110 else first[:107] + "..."
    return f"{cause.get('who')}: {short} ({', '.join(part for part in place if part)})"
