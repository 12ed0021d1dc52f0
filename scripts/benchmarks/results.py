"""The figures of one run, and what they say about the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.cell import LARGE, size_text
from benchmarks.tables import Facts, Target

OURS = "shmbridge"
RAW = "raw limit"
MEMCPY = "bare memcpy"

SMALL_X_RAW = {"across": 1.3, "same": 2.2}
LARGE_X_MEMCPY = 1.1
FLAT_X = 1.1  # per-rank CPU time of the teacher, against one rank
IDLE_PERCENT = 1.0


@dataclass
class Row:
    """One contestant in one cell; microseconds. CPU times are per request of one rank, over all threads."""

    placement: str
    ranks: int
    reply_bytes: int
    contestant: str
    ranked: bool
    samples: int = 0
    min_us: float = 0.0
    p50_us: float = 0.0
    p90_us: float = 0.0
    x_raw: float | None = None
    first: bool = False
    rank_cpu_us: float = 0.0
    teacher_cpu_us: float = 0.0
    failed: str | None = None

    @property
    def cell(self) -> tuple[str, int, int]:
        return self.placement, self.reply_bytes, self.ranks


@dataclass
class Waiting:
    """CPU time of a process that has nothing to do, in percent of a core."""

    contestant: str
    idle_teacher_percent: float
    waiting_rank_percent: float


@dataclass
class Results:
    """Everything that a run measured."""

    facts: Facts
    requests: int
    rows: list[Row] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)

    def add(self, rows: Sequence[Row]) -> None:
        """The rows of one cell: fills in the ratio to the raw limit, and who is first."""
        raw = next((row for row in rows if row.contestant == RAW and not row.failed), None)
        for row in rows:
            if raw is not None and not row.failed:
                row.x_raw = row.p50_us / raw.p50_us
        ranked = [row for row in rows if row.ranked and not row.failed]
        if ranked:
            min(ranked, key=lambda row: row.p50_us).first = True
        self.rows += rows

    def of(self, contestant: str) -> list[Row]:
        """The contestant's rows that did not fail."""
        return [row for row in self.rows if row.contestant == contestant and not row.failed]

    def cells(self) -> list[tuple[str, int, int]]:
        """(placement, reply_bytes, ranks) in the order measured."""
        return list(dict.fromkeys(row.cell for row in self.rows))

    def teacher_costs(self) -> list[tuple[str, int, dict[int, float]]]:
        """(placement, reply_bytes, {ranks: CPU us of the teacher for each request}) of shmbridge."""
        costs: dict[tuple[str, int], dict[int, float]] = {}
        for row in self.of(OURS):
            costs.setdefault((row.placement, row.reply_bytes), {})[row.ranks] = row.teacher_cpu_us
        return [(*key, dict(sorted(by_ranks.items()))) for key, by_ranks in costs.items()]

    def targets(self) -> list[Target]:
        """Every target with its figure."""
        placements = dict.fromkeys(row.placement for row in self.rows)
        return [
            *(self._small(placement) for placement in placements),
            *(self._large(placement) for placement in placements),
            self._first(),
            *self._flat(),
            *self._idle(),
        ]

    def _small(self, placement: str) -> Target:
        limit = SMALL_X_RAW[placement]
        rows = [row for row in self.of(OURS) if row.placement == placement and row.reply_bytes < LARGE and row.x_raw]
        found = {row.ranks: row.x_raw or 0.0 for row in rows}
        return _target(f"small reply, {placement}: p50 / raw limit", limit, found)

    def _large(self, placement: str) -> Target:
        """Where one memcpy is measured: one rank, large replies."""
        bare = {row.cell: row.p50_us for row in self.of(MEMCPY) if row.placement == placement}
        found = {row.ranks: row.p50_us / bare[row.cell] for row in self.of(OURS) if row.cell in bare}
        return _target(f"large reply leased, {placement}: p50 / bare memcpy", LARGE_X_MEMCPY, found)

    def _first(self) -> Target:
        """Our variants are no competition for each other."""
        cells = self.cells()
        won = [cell for cell in cells if self._leads(cell)]
        lost = ", ".join(f"{p} {size_text(n)} {r}r" for p, n, r in cells if (p, n, r) not in won)
        found = f"{len(won)} of {len(cells)}" + (f"; not {lost}" if lost else "")
        return Target("first among the peers in every section", "all", found, len(won) == len(cells))

    def _leads(self, cell: tuple[str, int, int]) -> bool:
        rows = [row for row in self.rows if row.cell == cell and row.ranked and not row.failed]
        peers = [row.p50_us for row in rows if not row.contestant.startswith(OURS)]
        ours = [row.p50_us for row in rows if row.contestant == OURS]
        return bool(ours) and ours[0] < min(peers, default=float("inf"))

    def _flat(self) -> Iterable[Target]:
        for placement, nbytes, costs in self.teacher_costs():
            base, *rest = costs.items()
            found = {ranks: cost / base[1] for ranks, cost in rest}
            yield _target(f"teacher CPU, {placement}, {size_text(nbytes)}: / one rank", FLAT_X, found)

    def _idle(self) -> Iterable[Target]:
        kinds: dict[str, Callable[[Waiting], float]] = {
            "CPU of a teacher without requests": lambda waiting: waiting.idle_teacher_percent,
            "CPU of a rank that waits 1 s": lambda waiting: waiting.waiting_rank_percent,
        }
        for text, read in kinds.items():
            found = [read(waiting) for waiting in self.waiting if waiting.contestant == OURS]
            told = f"{found[0]:.2f} %" if found else "not measured"
            yield Target(text, f"{IDLE_PERCENT:g} %", told, found[0] <= IDLE_PERCENT if found else None)


def _target(text: str, limit: float, found: dict[int, float]) -> Target:
    """Reached where every number of ranks keeps the limit."""
    told = "  ".join(f"{value:.2f}x ({ranks}r)" for ranks, value in sorted(found.items()))
    reached = max(found.values()) <= limit if found else None
    return Target(text, f"{limit:g}x", told or "not measured", reached)
