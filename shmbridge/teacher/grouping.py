"""How the requests of a round become forwards, and how large a forward may be. Without torch: shapes alone decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_GROWS_AFTER = 16  # forwards


class TokenLimit:
    """How many padded tokens a forward may have: teacher.max_batch_tokens, or less after it has run out of memory.

    It falls to half of a forward that failed. It doubles after 16 forwards of more than half of it have succeeded, because whatever
    took the memory may be gone. If a forward then fails again, the limit falls again, and the number of forwards until the next
    attempt doubles: 32, 64, and so on. A teacher's process has one limit for all generations.
    """

    def __init__(self, most: int) -> None:
        self.tokens = most
        self._most = most
        self._grows_after = _GROWS_AFTER
        self._succeeded = 0
        self._has_grown = False  # since it last fell

    def failed(self, padded: int) -> None:
        """A forward of `padded` tokens ran out of memory."""
        self.tokens = min(self.tokens, max(1, padded // 2))
        if self._has_grown:
            self._grows_after *= 2
        self._has_grown = False
        self._succeeded = 0

    def succeeded(self, padded: int) -> bool:
        """A forward of `padded` tokens succeeded. Returns whether the limit grew."""
        if self.tokens == self._most or 2 * padded <= self.tokens:
            return False
        self._succeeded += 1
        if self._succeeded < self._grows_after:
            return False
        self.tokens = min(self._most, 2 * self.tokens)
        self._has_grown = True
        self._succeeded = 0
        return True


class Piece(NamedTuple):
    """Rows start to stop of request number `request`, whose rows are `seq` tokens long."""

    request: int
    start: int
    stop: int
    seq: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def padded_tokens(pieces: Sequence[Piece]) -> int:
    """Tokens of one forward over `pieces`, padding included."""
    return sum(piece.rows for piece in pieces) * max(piece.seq for piece in pieces)


def compose(shapes: Sequence[tuple[int, int]], max_tokens: int, max_padding: float) -> list[list[Piece]]:
    """Requests of (batch, seq) as forwards of at most `max_tokens` tokens, of which at most `max_padding` (a share) is
    padding.

    One forward in the order of the requests where that fits; else they are sorted by length, so that rows of like length
    meet. A request stays whole where it fits into a forward of its own; a single row is never split.
    """
    whole = [Piece(request, 0, batch, seq) for request, (batch, seq) in enumerate(shapes)]
    if _fits(whole, max_tokens, max_padding):
        return [whole]
    forwards: list[list[Piece]] = []
    for request, _, batch, seq in sorted(whole, key=lambda piece: piece.seq):
        rows_at_once = max(1, max_tokens // seq)
        for start in range(0, batch, rows_at_once):
            piece = Piece(request, start, min(batch, start + rows_at_once), seq)
            if forwards and _fits([*forwards[-1], piece], max_tokens, max_padding):
                forwards[-1].append(piece)
            else:
                forwards.append([piece])
    return forwards


def _fits(pieces: Sequence[Piece], max_tokens: int, max_padding: float) -> bool:
    padded = padded_tokens(pieces)
    if padded > max_tokens:
        return False
    return sum(piece.rows * piece.seq for piece in pieces) >= (1 - max_padding) * padded


def halve(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Two forwards with half of the rows each; none where there is a single row."""
    total = sum(piece.rows for piece in pieces)
    if total == 1:
        return []
    halves: list[list[Piece]] = [[], []]
    seen = 0
    for piece in pieces:
        cut = min(piece.stop, max(piece.start, piece.start + total // 2 - seen))
        if cut > piece.start:
            halves[0].append(piece._replace(stop=cut))
        if cut < piece.stop:
            halves[1].append(piece._replace(start=cut))
        seen += piece.rows
    return halves


def by_request(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """One forward for each request among `pieces`."""
    groups: dict[int, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.request, []).append(piece)
    return list(groups.values())
