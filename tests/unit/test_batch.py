"""Requests as one batch, and the positions of it that each of them wants."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shmbridge.output_spec import Extent
from shmbridge.shm.ring import Request
from shmbridge.teacher.batch import combine, next_tokens, select, tokens
from shmbridge.teacher.grouping import Piece

CPU = torch.device("cpu")
KINDS = {"mask": np.uint8, "positions": np.uint8}
PAD = 99


def request(ids: list[list[int]], itemsize: int = 8, **arrays: list) -> Request:
    def data(values: list, kind: type) -> memoryview:
        return memoryview(np.array(values, kind)).cast("B")

    sent = {name: data(values, KINDS.get(name, np.int32)) for name, values in arrays.items()}
    extent = Extent(len(ids), len(ids[0]), int(np.sum(arrays["positions"])) if "positions" in arrays else None)
    kind = np.int32 if itemsize == 4 else np.int64
    return Request(0, None, extent, itemsize, data(ids, kind), sent, False, 0)


def batch(*requests: Request) -> tuple:
    pieces = [Piece(i, 0, one.extent.batch, one.extent.seq) for i, one in enumerate(requests)]
    made = combine(requests, pieces, PAD, CPU)
    assert all(tensor is None or tensor.dtype == torch.int64 for tensor in made)
    return tuple(tensor if tensor is None else tensor.tolist() for tensor in made)


def test_rows_of_one_length_need_no_mask_and_are_a_copy():
    sent = request([[1, 2], [3, 4]])
    made = combine([sent], [Piece(0, 1, 2, 2)], PAD, CPU)
    sent.ids[:] = bytes(len(sent.ids))
    assert (made.input_ids.tolist(), made.attention_mask, made.position_ids) == ([[3, 4]], None, None)
    assert batch(request([[1, 2]], 4, mask=[[1, 1]]), request([[3, 4]])) == ([[1, 2], [3, 4]], None, None)


@pytest.mark.parametrize(
    ("requests", "mask", "position_ids"),
    [
        ([request([[1, 2]]), request([[3, 4, 5]])], [[1, 1, 0], [1, 1, 1]], None),
        ([request([[1, 2]], mask=[[0, 1]]), request([[3, 4, 5]])], [[0, 1, 0], [1, 1, 1]], None),
        ([request([[1, 2]], position_ids=[[0, 0]]), request([[3, 4, 5]], position_ids=[[0, 1, 0]])], None, [[0, 0, 0], [0, 1, 0]]),
        (
            [request([[1, 2]], mask=[[0, 1]], position_ids=[[1, 0]]), request([[3, 4, 5]])],
            [[0, 1, 0], [1, 1, 1]],
            [[1, 0, 0], [0, 1, 2]],
        ),
    ],
    ids=["lengths", "a mask", "packed documents", "position_ids beside a mask"],
)  # fmt: skip
def test_rows_of_two_lengths_are_padded_on_the_right(requests, mask, position_ids):
    assert batch(*requests) == ([[1, 2, PAD], [3, 4, 5]], mask, position_ids)


def test_tokens_are_counted_without_padding():
    requests = [request([[1, 2], [3, 4]], mask=[[0, 1], [1, 1]]), request([[5, 6, 7]])]
    assert tokens(requests, [Piece(0, 0, 2, 2), Piece(1, 0, 1, 3)]) == 3 + 3
    assert tokens(requests, [Piece(0, 0, 1, 2)]) == 1


@pytest.mark.parametrize("seq", [3, 5], ids=["alone", "padded"])
@pytest.mark.parametrize("positions", [None, [[1, 1, 1], [0, 1, 0], [1, 0, 1]], [[1, 1, 1], [0, 0, 0], [0, 0, 0]]])
def test_the_positions_that_a_request_wants_lie_at_their_place_in_the_forward(seq, positions):
    """Rows 1 and 2 of a request are rows 4 and 5 of the forward; a number tells (row, position)."""
    ids = [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    candidates = [[[100 + word, 200 + word] for word in row] for row in ids]
    sent = request(ids, candidates=candidates, **({"positions": positions} if positions else {}))
    forward = 10 * torch.arange(6)[:, None] + torch.arange(seq)
    found = select({"x": forward.flatten()}, sent, Piece(0, 1, 3, 3), 4, seq, CPU, True)
    wanted = [(row, i) for row in (1, 2) for i in range(3) if positions is None or positions[row][i]]
    assert (found.rows, found.positions) == (slice(4, 6), len(wanted))
    for each in (found, found.kept()):
        assert each.take("x", 0, each.positions).tolist() == [10 * (row + 3) + i for row, i in wanted]
        assert each.take("x", 1, 2).tolist() == [10 * (row + 3) + i for row, i in wanted[1:2]]
    assert found.targets.tolist() == [ids[row][i + 1] if i < 2 else -100 for row, i in wanted]
    assert found.candidates.tolist() == [candidates[row][i] for row, i in wanted]
    assert select({}, sent, Piece(0, 1, 3, 3), 4, seq, CPU, False).targets is None


def test_targets_that_a_rank_sent_are_taken_in_place_of_the_next_tokens():
    sent = request([[1, 2, 3]], targets=[[7, -100, 9]], positions=[[1, 1, 0]])
    assert select({}, sent, Piece(0, 0, 1, 3), 0, 3, CPU, True).targets.tolist() == [7, -100]
    assert next_tokens(np.array([[1, 2], [3, 4]])).tolist() == [[2, -100], [4, -100]]
