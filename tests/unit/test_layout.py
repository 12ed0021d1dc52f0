"""The drawings of layout.py are true."""

from __future__ import annotations

import re

import pytest

from shmbridge.shm import layout
from shmbridge.shm.layout import ControlWord, Header, LaneLayout, LaneWord


def drawn(title: str) -> list[int]:
    """The offsets in bytes at the left edge of the drawing below `title`."""
    assert layout.__doc__
    below = layout.__doc__.split(f"\n{title}", 1)[1].split("\n\n", 2)[1]
    return [int(found) for found in re.findall(r"^ *(\d+) [|+]", below, re.M)]


LANE = LaneLayout(depth=3, max_tokens=10, candidates=2, chunks=2, members=2)


@pytest.mark.parametrize(
    ("title", "offsets"),
    [
        (
            "CONTROL, one",
            [
                layout.WORD * Header.MAGIC,
                layout.WORD * ControlWord.OWNER_PID,
                layout.SETTINGS_OFFSET,
                layout.RECORDS_OFFSET,
                layout.RECORDS_OFFSET + layout.RECORD_BYTES,
            ],
        ),
        (
            "A record, in",
            [0, layout.DECLARED.offset, layout.OFFER.offset, layout.FAILURE.offset, layout.RECORD_BYTES],
        ),
        (
            "LANE, one",
            [
                *(
                    layout.WORD * word
                    for word in (0, LaneWord.DEPTH, LaneWord.REQUESTED, LaneWord.REPLIED, LaneWord.RELEASED)
                ),
                LANE.record(0),
            ],
        ),
        ("REPLY, one", [0, layout.PAGE]),
    ],
)
def test_offsets_are_drawn_where_they_are(title, offsets):
    assert drawn(title) == offsets


def test_the_parts_of_a_lane_follow_each_other_as_they_are_drawn():
    starts = [LANE.record(0), LANE.record(1), *map(LANE.request, range(3)), *map(LANE.reply_head, range(3))]
    starts += [*map(LANE.chunk_head, range(2)), LANE.nbytes]
    sizes = [layout.RECORD_BYTES] * 2 + [LANE.request_stride] * 3 + [layout.REPLY_HEAD_BYTES] * 3
    ends = [start + size for start, size in zip(starts, [*sizes, *[layout.CACHE_LINE] * 2], strict=False)]
    assert ends[:4] + ends[5:] == starts[1:5] + starts[6:]
    assert starts[5] == layout.align(ends[4], layout.PAGE)


def test_no_two_words_share_a_place():
    for kind in (ControlWord, LaneWord, layout.RecordWord, layout.ExchangeWord):
        places = [value for name, value in vars(kind).items() if name.isupper()]
        assert len(set(places)) == len(places) and (kind is layout.RecordWord or min(places) > Header.INDEX)
