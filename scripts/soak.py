#!/usr/bin/env python3
"""Does anything grow? Many requests of ranks that come and go, under one teacher; then the CPU time of a session that is idle.

    python scripts/soak.py                        # 100,000 requests, then 20 s of an idle run; about a minute
    python scripts/soak.py --requests 1000000     # some six minutes
    python scripts/soak.py --idle-s 0             # without the idle run

The owner, the teacher and the ranks are real processes over tiny tensors. Ranks live for one generation: most close their
bridge, some leave replies unread, drop requests, break out of a prefetch, or are killed -9. After each generation memory,
files and threads of teacher and owner and the session's objects in /dev/shm are counted; the teacher runs without Python's
garbage collector, so that reference cycles show. The idle run is shmbridge-launch with a teacher that has nothing to do, a
rank that waits for its reply and one that sleeps.

Exit code 0: nothing grew, every reply was right, and each process of the idle run stayed below its target. Needs
`pip install -e .[bench]` for the table.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks import idling, tables
from rich.text import Text

from shmbridge import config
from shmbridge.output_spec import Offer
from shmbridge.rank.bridge import Bridge
from shmbridge.shm import owner
from shmbridge.shm.owner import Owner
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.session import Lane, Token
from shmbridge.shm.teacher_session import TeacherSession
from shmbridge.teacher.main import serve
from tests.harness import Child, until

RANKS = 2
WORDS = 1000
# What may differ from sample to sample without growing: a process's memory, and its files where a rank was killed.
ROOM = dict.fromkeys(("teacher_bytes", "owner_bytes"), 2 << 20) | dict.fromkeys(("teacher_files", "owner_files"), 2)
SETTINGS = [
    "teacher.model=soak:teacher",
    "ring.max_tokens=256",
    "ring.depth=3",
    "parity=false",
    "train.restarts=1000000",
]


@dataclass(frozen=True)
class Sample:
    """After a generation."""

    requests: int
    seconds: float
    teacher_bytes: int  # anonymous memory, which no other process shares
    teacher_files: int
    teacher_threads: int
    owner_bytes: int
    owner_files: int
    owner_threads: int
    objects: int
    shm_bytes: int


class Forward:
    """Twice the IDs."""

    vocab_size = WORDS

    def __call__(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"answer": batch.input_ids * 2}


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak, then idle; 0 where nothing grew and the idle session is below its target."""
    options = _parser().parse_args(arguments)
    facts = tables.Facts.now()
    torch.set_num_threads(1)
    samples: list[Sample] = []
    for sample in soak(options.requests, options.each):
        samples.append(sample)
        tables.progress(f"{sample.requests:,} of {options.requests:,} requests")
    grown = verdict(samples)
    idle = idling.measure(options.idle_s) if options.idle_s else []
    shown = [_table(samples), Text("\n".join(grown) or _praise(samples))]
    shown += [idling.table(idle), Text(idling.told(idle))] if idle else []
    figures = {"samples": [asdict(one) for one in samples], "grown": grown, "idle": [asdict(one) for one in idle]}
    tables.report("soak", None, facts, settings=(), shown=shown, figures=figures, path=options.json)
    return 1 if grown or not idling.reached(idle) else 0


def soak(requests: int, each: int) -> Iterator[Sample]:
    """Generations of RANKS ranks with `each` requests a rank, until there were so many; a sample after each."""
    began, done, number = time.monotonic(), 0, 0
    with Owner(config.load(overrides=SETTINGS), RANKS) as session:
        token, record = session.start_generation(), session.control.teachers[0]
        first = token
        teacher = Child(lambda: _teach(first))
        try:
            while done < requests:
                _await(teacher, lambda: record.offer, "the teacher's offer")
                session.create_replies(Offer.decode(record.offer or b""))
                _await(teacher, lambda: record.ready == session.generation, "the teacher")
                done += _generation(session, token, number, each)
                yield _sample(session, teacher.pid, done, time.monotonic() - began)
                number += 1
                session.end_training()
                _await(teacher, lambda: str(record.phase) == "idle", "the teacher's drain")
                token = session.start_generation()
            session.end_session()
            teacher.join()
        finally:
            teacher.end()


def _await(child: Child, condition: Callable[[], object], what: str) -> None:
    """Until `condition` is true, or the child has ended."""
    until(lambda: condition() or child.poll() is not None, what)


def _generation(session: Owner, token: Token, number: int, each: int) -> int:
    """One life of all ranks; how many requests they made. Raises RuntimeError for a wrong reply."""
    killed = number % 4 == 3  # the last rank, in the middle of it
    ranks = [Child(lambda lane=lane: _train(token, lane, number, each)) for lane in range(RANKS)]
    rings = [Lane.attach(token, session.control.shape, lane).ring for lane in range(RANKS)]
    if killed:
        _await(ranks[-1], lambda: rings[-1].requested > each // 2, "half of the requests")
        ranks[-1].kill()
    for lane, rank in enumerate(ranks):
        code = rank.join()
        if code and not (killed and rank is ranks[-1]):
            raise RuntimeError(f"rank {lane} of generation {number + 1} ended with {code}")
    return sum(ring.requested for ring in rings)


def _train(token: Token, lane: int, number: int, each: int) -> None:
    """`each` requests of unlike shapes, in one of five ways of handling them at a time."""
    with Bridge(RankSession(token, lane)) as bridge:
        bridge.wait_ready()
        made = 0
        while made < each:
            made += _WAYS[(made // 50 + number + lane) % len(_WAYS)](bridge, made, min(50, each - made))
        if number % 3 == 1:
            bridge.submit(_ids(made), step=made)  # nobody reads it


def _in_place(bridge: Bridge, made: int, count: int) -> int:
    for step in range(made, made + count):
        with bridge.submit(_ids(step), step=step).wait() as reply:
            _check(reply, step)
    return count


def _copied(bridge: Bridge, made: int, count: int) -> int:
    for step in range(made, made + count):
        _check(bridge.exchange(_ids(step), step=step), step)
    return count


def _several(bridge: Bridge, made: int, count: int) -> int:
    for step in range(made, made + count, 2):
        first, second = bridge.submit(_ids(step), step=step), bridge.submit(_ids(step + 1), step=step + 1)
        _check(second.copy(), step + 1)
        _check(first.copy(), step)
    return 2 * ((count + 1) // 2)


def _dropped(bridge: Bridge, made: int, count: int) -> int:
    for step in range(made, made + count):
        bridge.submit(_ids(step), step=step)
    return count


def _broken_off(bridge: Bridge, made: int, count: int) -> int:
    ahead = bridge.prefetch(_ids(step) for step in range(made, made + 10**9))
    for step, (_, pending) in enumerate(ahead, made):
        _check(pending.copy(), step)
        if step == made + count - 1:
            break
    ahead.close()
    return count


_WAYS: tuple[Callable[[Bridge, int, int], int], ...] = (_in_place, _copied, _several, _dropped, _broken_off)


def _ids(step: int) -> torch.Tensor:
    rows, seq = 1 + step % 3, 4 + step % 17
    return torch.full((rows, seq), step % WORDS)


def _check(reply: Any, step: int) -> None:
    if not torch.equal(reply["answer"], 2 * _ids(step)):
        raise RuntimeError(f"step {step}: a wrong reply")


def _teach(token: Token) -> None:
    gc.disable()  # what only the collector would free is seen as growth
    torch.set_num_threads(1)
    serve(TeacherSession(token), Forward(), torch.device("cpu"))


# What is counted


def _sample(session: Owner, teacher: int, requests: int, seconds: float) -> Sample:
    gc.collect()
    names = owner.objects(session.session_id).get(session.session_id, [])
    return Sample(
        requests=requests,
        seconds=round(seconds, 1),
        teacher_bytes=_anonymous(teacher),
        teacher_files=len(os.listdir(f"/proc/{teacher}/fd")),
        teacher_threads=len(os.listdir(f"/proc/{teacher}/task")),
        owner_bytes=_anonymous(os.getpid()),
        owner_files=len(os.listdir("/proc/self/fd")),
        owner_threads=len(os.listdir("/proc/self/task")),
        objects=len(names),
        shm_bytes=sum((owner.SHM_DIRECTORY / name).stat().st_size for name in names),
    )


def _anonymous(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError


def verdict(samples: Sequence[Sample]) -> list[str]:
    """What has grown, from the second quarter to the last; empty where nothing has."""
    quarter = max(1, len(samples) // 4)
    before, after = samples[quarter : 2 * quarter] or samples[:1], samples[-quarter:]
    found = []
    counted = [name for name in Sample.__dataclass_fields__ if name not in ("requests", "seconds")]
    for name in counted:
        first, last = (statistics.median(getattr(one, name) for one in those) for those in (before, after))
        if last > first + ROOM.get(name, 0):
            found.append(f"GROWS: {name} from {first:,.0f} to {last:,.0f}")
    return found


def _praise(samples: Sequence[Sample]) -> str:
    last = samples[-1]
    return (
        f"nothing grew over {last.requests:,} requests and {len(samples)} generations; every reply was right "
        f"({last.requests / last.seconds:,.0f} requests a second)"
    )


def _table(samples: Sequence[Sample]) -> Any:
    names = ("requests", "seconds", "teacher", "files", "threads", "owner", "files", "threads", "objects", "/dev/shm")
    every = max(1, len(samples) // 10)
    rows = [
        (
            *(f"{one.requests:,}", f"{one.seconds:.0f}"),
            *(f"{one.teacher_bytes / 2**20:.1f} MiB", str(one.teacher_files), str(one.teacher_threads)),
            *(f"{one.owner_bytes / 2**20:.1f} MiB", str(one.owner_files), str(one.owner_threads)),
            *(str(one.objects), f"{one.shm_bytes >> 10:,} KiB"),
        )
        for one in [*samples[:-1:every], samples[-1]]
    ]
    return tables.table(numbers=names, rows=rows)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--requests", type=int, default=100_000, help="of all ranks together (default: 100000)")
    parser.add_argument("--each", type=int, default=1000, help="of one rank in one generation (default: 1000)")
    parser.add_argument("--idle-s", type=float, default=20.0, help="seconds of an idle run; 0: none (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
