"""Composition of forwards: every row once, never more tokens than allowed where rows can be split."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shmbridge.teacher.grouping import Piece, TokenLimit, by_request, compose, halve, padded_tokens

shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


def rows_of(forwards):
    return [(p.request, row) for pieces in forwards for p in pieces for row in range(p.start, p.stop)]


paddings = st.sampled_from([0.0, 0.1, 0.5, 0.99])


@given(shapes, st.integers(1, 80), paddings)
def test_every_row_stands_once_and_in_order_within_the_limits(requests, limit, padding):
    forwards = compose(requests, limit, padding)
    assert sorted(rows_of(forwards)) == [(i, row) for i, (batch, _) in enumerate(requests) for row in range(batch)]
    for pieces in forwards:
        assert padded_tokens(pieces) <= limit or sum(p.rows for p in pieces) == 1
        tokens = sum(p.rows * p.seq for p in pieces)
        assert tokens >= (1 - padding) * padded_tokens(pieces)
    for request in range(len(requests)):
        assert all([p.request for p in pieces].count(request) <= 1 for pieces in forwards)
        starts = [p.start for pieces in forwards for p in pieces if p.request == request]
        assert starts == sorted(starts)


def test_requests_of_like_length_meet():
    assert compose([(2, 9), (2, 100), (1, 10), (1, 90)], 1000, 0.25) == [
        [Piece(0, 0, 2, 9), Piece(2, 0, 1, 10)],
        [Piece(3, 0, 1, 90), Piece(1, 0, 2, 100)],
    ]
    assert len(compose([(2, 9), (2, 100)], 1000, 0.5)) == 1


@given(shapes, st.integers(1, 80), paddings)
def test_a_request_that_fits_is_not_split(requests, limit, padding):
    whole = {
        p.request for pieces in compose(requests, limit, padding) for p in pieces if p.rows == requests[p.request][0]
    }
    assert whole >= {i for i, (batch, seq) in enumerate(requests) if batch * seq <= limit}


@given(shapes)
def test_halves_hold_the_same_rows(requests):
    pieces = [Piece(i, 0, batch, seq) for i, (batch, seq) in enumerate(requests)]
    halves = halve(pieces)
    if rows_of([pieces]) == [(0, 0)]:
        assert not halves, "a single row"
        return
    assert rows_of(halves) == rows_of([pieces])
    counts = [sum(p.rows for p in half) for half in halves]
    assert len(counts) == 2
    assert all(counts)
    assert max(counts) - min(counts) <= 1


@given(shapes)
def test_by_request_separates(requests):
    pieces = [Piece(i, 0, batch, seq) for i, (batch, seq) in enumerate(requests)]
    assert [{p.request for p in group} for group in by_request(pieces)] == [{i} for i in range(len(requests))]


def test_the_limit_falls_to_half_of_what_failed_and_grows_after_more_and_more_forwards():
    limit = TokenLimit(1000)
    assert not limit.succeeded(1000)
    limit.failed(800)
    assert limit.tokens == 400
    assert not any(limit.succeeded(200) for _ in range(100)), "half of the limit says nothing of twice the limit"
    for needed in (16, 32, 64):
        grown = [limit.succeeded(201) for _ in range(needed)]
        assert grown == [False] * (needed - 1) + [True]
        assert limit.tokens == 800
        limit.failed(800)
        assert limit.tokens == 400
    limit.failed(1)
    assert limit.tokens == 1, "a single row is always tried"
