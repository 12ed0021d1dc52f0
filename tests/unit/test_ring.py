"""Cursors and slots over plain memory, both sides played by one process."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmbridge.errors import AttachError, RingFull
from shmbridge.output_spec import Extent
from shmbridge.shm.layout import ARRAYS, CHUNK_HEAD, ERROR_CAPACITY, REPLY_HEAD, REQUEST, LaneLayout
from shmbridge.shm.ring import Composition, Ring

PLACE = Composition(1, 0, 2, 4, 7, 1000)


def make(depth: int = 2, max_tokens: int = 64, candidates: int = 0, chunks: int = 0) -> Ring:
    shape = LaneLayout(depth, max_tokens, candidates, chunks)
    memory = memoryview(bytearray(shape.nbytes))
    return Ring(memory, memory.cast("Q"), shape, generation=3)


def ask(ring: Ring, ids: bytes = bytes(range(64)), batch: int = 2, seq: int = 4, mask: bytes | None = None) -> int:
    sequence = ring.claim()
    arrays = {} if mask is None else {"mask": memoryview(mask)}
    ring.write_request(sequence, 9, Extent(batch, seq), memoryview(ids), arrays)
    ring.publish_request(sequence)
    return sequence


def answer(ring: Ring, error: str | None = None) -> int:
    sequence = ring.next_request()
    assert sequence is not None
    ring.write_reply(sequence, PLACE, error)
    ring.publish_reply(sequence)
    return sequence


def stream(ring: Ring, sequence: int, start: int) -> None:
    ring.write_chunk(sequence, start, 5)
    ring.publish_chunk()


def test_a_request_arrives_as_it_was_sent():
    ring = make()
    sequence = ask(ring, mask=bytes([1, 1, 1, 0] * 2))
    request = ring.read_request(sequence)
    assert (request.sequence, request.step, request.extent, request.itemsize) == (0, 9, Extent(2, 4), 8)
    assert bytes(request.ids) == bytes(range(64))
    assert {name: bytes(array) for name, array in request.arrays.items()} == {"mask": bytes([1, 1, 1, 0] * 2)}


@given(names=st.sets(st.sampled_from(list(ARRAYS))), itemsize=st.sampled_from([4, 8]), tokens=st.integers(1, 21))
@settings(max_examples=100, deadline=None)
def test_every_array_arrives_beside_the_ids_and_none_reaches_beyond_the_slot(names, itemsize, tokens):
    ring = make(depth=1, max_tokens=21, candidates=3)
    ids = bytes(range(tokens)) * itemsize
    sent = {
        name: bytes([7 + i]) * ring.layout.array_bytes(name, tokens) for i, name in enumerate(ARRAYS) if name in names
    }
    guard = ring.layout.request_stride + ring.layout.request(0)
    before = bytes(ring.memory[guard : guard + 64])
    extent = Extent(1, tokens, tokens - 1 if "positions" in names else None)
    arrays = {name: memoryview(array) for name, array in sent.items()}
    ring.write_request(0, None, extent, memoryview(ids), arrays, probe="mask" in names)
    assert bytes(ring.memory[guard : guard + 64]) == before
    ring.publish_request(0)
    request = ring.read_request(0)
    assert bytes(request.ids) == ids
    assert {name: bytes(array) for name, array in request.arrays.items()} == sent
    assert (request.extent, request.probe, request.step) == (extent, "mask" in names, None)


def test_a_sealed_reply_is_not_asked_for_again_and_settles_once_it_is_published():
    ring = make()
    ask(ring), ask(ring)
    ring.write_reply(0, PLACE)
    ring.seal_reply(0)
    assert ring.next_request() == 1 and not ring.settled
    ring.publish_reply(0)
    assert ring.next_request() == 1 and ring.settled


def test_a_full_ring_refuses_and_a_release_frees():
    ring = make(depth=2)
    ask(ring), ask(ring)
    with pytest.raises(RingFull, match="2 requests are in flight"):
        ring.claim()
    answer(ring)
    with pytest.raises(RingFull):
        ring.claim()
    ring.release(0)
    assert ring.claim() == 2


def test_a_long_traceback_keeps_its_end():
    ring = make()
    ask(ring)
    answer(ring, error="x" * 2 * ERROR_CAPACITY + "the end")
    head = ring.read_reply(0)
    assert head.composition == PLACE
    assert head.error is not None and head.error.endswith("the end") and len(head.error) == ERROR_CAPACITY


@pytest.mark.parametrize(("generation", "sequence"), [(3, 1), (2, 0)])
@pytest.mark.parametrize("what", ["request", "reply", "chunk"])
def test_what_belongs_to_another_sequence_or_generation_is_refused(what, generation, sequence):
    ring = make(depth=1, chunks=2)
    ask(ring)
    stream(ring, 0, 0)
    answer(ring)
    head, offset, values, read = {
        "request": (REQUEST, ring.layout.request(0), (9, 2, 4, 8, 0, 8, 0), lambda: ring.read_request(0)),
        "reply": (REPLY_HEAD, ring.layout.reply_head(0), (1, *[0] * 8), lambda: ring.read_reply(0)),
        "chunk": (CHUNK_HEAD, ring.layout.chunk_head(0), (0, 5), lambda: ring.next_chunk(0)),
    }[what]
    head.pack_into(ring.memory, offset, 3, 0, *values)
    read()
    ring.replied = 0  # else a chunk of a later sequence tells that the reply is over
    head.pack_into(ring.memory, offset, generation, sequence, *values)
    with pytest.raises(AttachError, match="refused"):
        read()


@pytest.mark.parametrize(
    "words",
    [
        {"requested": 3},
        {"replied": 1},
        {"requested": 2**63},
        {"requested": 7, "replied": 4},
        {"requested": 1, "abandoned": 8},
        {"streamed": 2**40},
    ],
)
def test_garbled_cursors_are_named(words):
    ring = make(depth=2, chunks=2)
    for name, value in words.items():
        setattr(ring, name, value)
    with pytest.raises(AttachError, match="refused" if "streamed" in words else "cursors are garbled"):
        ring.next_chunk(0) if "streamed" in words else ring.next_request()


@given(fields=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), min_size=9, max_size=9))
@settings(max_examples=300, deadline=None)
def test_no_descriptor_reaches_beyond_its_slot(fields):
    ring = make()
    ask(ring)
    REQUEST.pack_into(ring.memory, ring.layout.request(0), *fields)
    try:
        request = ring.read_request(0)
    except AttachError:
        return
    tokens = request.extent.batch * request.extent.seq
    assert tokens <= ring.layout.max_tokens
    assert request.extent.positions <= tokens
    assert len(request.ids) == tokens * request.itemsize


@given(moves=st.lists(st.sampled_from(["ask", "answer", "release"]), max_size=60), depth=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_cursors_keep_their_order_under_any_schedule(moves, depth):
    ring = make(depth=depth)
    asked = answered = released = 0
    for move in moves:
        if move == "ask":
            if asked - released == depth:
                with pytest.raises(RingFull):
                    ask(ring)
            else:
                assert ask(ring) == asked
                asked += 1
        elif move == "answer" and answered < asked:
            assert answer(ring) == answered
            answered += 1
        elif move == "release" and released < answered:
            ring.release(released)
            released += 1
        assert (ring.requested, ring.replied, ring.released) == (asked, answered, released)
        assert released <= answered <= asked <= released + depth


def test_chunks_are_read_in_order_and_wait_for_room():
    ring = make(chunks=2)
    assert ring.next_chunk(0) is None
    stream(ring, 0, 0), stream(ring, 0, 5)
    assert not ring.has_room()
    assert ring.next_chunk(0) == (0, 0, 5)
    assert ring.next_chunk(0) == (0, 0, 5)  # until it is consumed
    ring.consume(0)
    assert ring.has_room()
    stream(ring, 0, 10)
    assert ring.next_chunk(0) == (1, 5, 5)
    ring.consume(1)
    assert ring.next_chunk(0) == (2, 10, 5)


def test_chunks_of_an_abandoned_reply_are_skipped():
    ring = make(chunks=3)
    stream(ring, 0, 0), stream(ring, 0, 5), stream(ring, 1, 0)
    ring.abandon(0)
    assert ring.abandoned == 1
    assert ring.next_chunk(1) == (2, 0, 5)
    assert ring.consumed == 2


def test_a_reply_that_was_skipped_is_no_reply():
    ring = make()
    ask(ring)
    ring.abandon(0)
    ring.skip_reply(0)
    ring.publish_reply(0)
    with pytest.raises(AttachError, match="status 3: refused"):
        ring.read_reply(0)
