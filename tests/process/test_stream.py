"""Replies in chunks: order, leaving early, errors in the middle, readers that stop or die, and memory that stays."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shmbridge.errors import Closed, DeadlineExceeded, RequestRefused, TeacherDied, TeacherError
from shmbridge.head import Head
from shmbridge.rank.bridge import Bridge, Pending
from shmbridge.shm import process
from shmbridge.teacher.batch import Batch
from tests.harness import Bench, bench, until
from tests.process.test_bridge import ids

ROOT = Path(__file__).parents[2]
WORDS, WIDTH, CHUNK = 50, 8, 4
STREAM = [f"payload.stream={{chunk_positions: {CHUNK}, chunks: 2}}"]
LOGITS = ["payload.logits.dtype=float32", *STREAM]
RAISES, BREAKS_THE_HEAD, WAITS = 666, 667, 668


class PickyHead(Head):
    """Raises at the position of the token BREAKS_THE_HEAD."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if (hidden > 1e6).any():
            raise ArithmeticError("no logits for this one")
        return super().__call__(hidden)


class Table:
    """A language model without context: hidden states of a table, and a head. Some tokens make trouble."""

    vocab_size = 1000

    def __init__(self, gate: int | None = None) -> None:
        random = torch.Generator().manual_seed(0)
        self.table = torch.randn(self.vocab_size, WIDTH, generator=random)
        self.head = PickyHead(torch.randn(WORDS, WIDTH, generator=random))
        self.gate = gate

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        if (batch.input_ids == RAISES).any():
            raise ArithmeticError("six hundred and sixty-six")
        if self.gate is not None and (batch.input_ids == WAITS).any():
            os.read(self.gate, 1)
        hidden = self.table[batch.input_ids]
        hidden[batch.input_ids == BREAKS_THE_HEAD] = 1e9
        return {"hidden": hidden}

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch x seq, WORDS), as one process computes them."""
        return Head.__call__(self.head, self.table[input_ids]).flatten(0, 1)


MODEL = Table()


@contextmanager
def serving(*overrides: str, lanes: int = 1, teacher: Any = MODEL) -> Iterator[Bench]:
    with bench(lanes, *(overrides or LOGITS)) as it:
        it.teacher(teacher)
        yield it


def safe(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    """Token IDs without trouble."""
    return ids(batch, seq, seed) % 600


def read(pending: Pending) -> list[tuple[slice, dict[str, torch.Tensor]]]:
    """Every chunk, in tensors of one's own."""
    return [(rows, {name: chunk[name].clone() for name in chunk.names}) for rows, chunk in pending.chunks()]


def right(found: torch.Tensor, sent: torch.Tensor) -> None:
    torch.testing.assert_close(found.flatten(0, -2), MODEL.logits(sent))


def answers(bridge: Bridge, seed: int = 99) -> None:
    """One exchange, right."""
    sent = safe(2, 5, seed)
    right(bridge.exchange(sent).logits, sent)


# What is read


@pytest.mark.every_plane
def test_chunks_are_in_order_and_are_the_whole_reply():
    payload = [
        "payload.logits={}",
        "payload.topk={k: 5, temperatures: [1.0, 2.0]}",
        "payload.logprobs={entropy: true, candidates: 3}",
        "payload.hidden={}",
    ]
    with (
        serving(*payload) as whole,
        serving(*payload, *STREAM) as it,
        whole.bridge() as by_slots,
        it.bridge() as by_chunks,
    ):
        for shape in ((1, 3), (1, 4), (2, 4), (3, 7), (1, 61)):
            sent = safe(*shape) % WORDS
            candidates = ids(sent.numel(), 3).reshape(*shape, 3) % WORDS
            for positions in (None, ids(*shape, seed=3) % 3 == 0, torch.zeros(shape)):
                extras = {"positions": positions, "candidates": candidates}
                wanted = by_slots.exchange(sent, **extras)
                found = read(by_chunks.submit(sent, **extras))
                count = sent.numel() if positions is None else int(positions.sum())
                assert [(rows.start, rows.stop) for rows, _ in found] == [
                    (start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)
                ]
                assembled = by_chunks.exchange(sent, **extras)
                assert assembled.names == wanted.names
                for name in wanted.names:
                    torch.testing.assert_close(assembled[name], wanted[name])
                    flat = wanted[name] if positions is not None else wanted[name].flatten(0, 1)
                    for rows, chunk in found:
                        torch.testing.assert_close(chunk[name], flat[rows])


def test_two_ranks_of_unlike_length_in_one_forward_get_their_own_chunks():
    def body(bridge):
        for step in range(5):
            sent = safe(1 + bridge.rank, 9 - 2 * bridge.rank, seed=10 * step + bridge.rank)
            for rows, chunk in bridge.submit(sent).chunks():
                torch.testing.assert_close(chunk.logits, MODEL.logits(sent)[rows])

    with serving("teacher.collect=lockstep", *LOGITS, lanes=2) as it:
        assert [child.join() for child in [it.rank(lane, body) for lane in range(2)]] == [0, 0]


def test_a_request_that_was_split_by_rows_is_one_stream():
    sent = safe(7, 7)
    positions = ids(7, 7, seed=3) % 2 == 0
    positions[2:4] = False  # the second of four forwards has none
    wanted = MODEL.logits(sent)[positions.flatten()]
    with serving("teacher.max_batch_tokens=20", *LOGITS) as it, it.bridge() as bridge:
        at = 0
        for rows, chunk in bridge.submit(sent, positions=positions).chunks():
            assert rows.start == at
            torch.testing.assert_close(chunk.logits, wanted[rows])
            at = rows.stop
        assert at == len(wanted)
        torch.testing.assert_close(bridge.exchange(sent, positions=positions).logits, wanted)


def test_a_teacher_of_ones_own_streams_what_it_returns():
    with serving(*STREAM, teacher=lambda batch: {"twice": 2 * batch.input_ids}) as it, it.bridge() as bridge:
        sent = ids(3, 5)
        assert torch.equal(bridge.exchange(sent)["twice"], 2 * sent)
        found = torch.cat([chunk["twice"] for _, chunk in read(bridge.submit(sent))])
        assert torch.equal(found, 2 * sent.flatten())


def test_where_nothing_is_streamed_there_is_one_chunk():
    with serving("payload.logits.dtype=float32") as it, it.bridge() as bridge:
        sent = safe(2, 9)
        [(rows, chunk)] = read(bridge.submit(sent))
        assert (rows.start, rows.stop) == (0, 18)
        right(chunk["logits"], sent)
        assert bridge.free_slots == 2


def test_wait_is_refused_and_the_pending_can_still_be_read():
    with serving() as it, it.bridge() as bridge:
        sent = safe(2, 9)
        pending = bridge.submit(sent)
        with pytest.raises(RequestRefused, match=r"use pending\.chunks\(\), or pending\.copy\(\)"):
            pending.wait()
        right(pending.copy().logits, sent)
        with pytest.raises(Closed, match="was waited for or cancelled before"):
            pending.copy()


def test_a_chunk_that_was_given_back_is_not_read():
    with serving() as it, it.bridge() as bridge:
        kept = [chunk for _, chunk in bridge.submit(safe(1, 9)).chunks()]
        with pytest.raises(Closed, match="released"):
            kept[0].logits  # noqa: B018


def test_replies_are_streamed_in_the_order_of_their_requests():
    with serving() as it, it.bridge() as bridge:
        sent = [safe(1, 9, seed) for seed in range(3)]
        first, second = bridge.submit(sent[0], step=1), bridge.submit(sent[1], step=2)
        with pytest.raises(RequestRefused, match="sequence 0 is to be read before sequence 1"):
            second.copy()
        right(first.copy().logits, sent[0])
        third = bridge.submit(sent[2])
        second.cancel()
        right(third.copy().logits, sent[2])


# Leaving early


def leave_by_break(pending: Pending) -> None:
    for _rows, _chunk in pending.chunks():
        break


def leave_by_exception(pending: Pending) -> None:
    with pytest.raises(KeyError, match="in the loop"):
        for rows, _chunk in pending.chunks():
            if rows.start:
                raise KeyError("in the loop")


def leave_by_cancel(pending: Pending) -> None:
    seen = []
    for rows, _chunk in pending.chunks():
        seen.append(rows)
        if len(seen) == 2:
            pending.cancel()
    assert len(seen) == 2, "nothing comes after cancel"


def leave_half_read(pending: Pending) -> None:
    chunks = pending.chunks()
    next(chunks)
    pending.cancel()
    assert not list(chunks)


def never_begin(pending: Pending) -> None:
    pending.chunks()


def cancel_unread(pending: Pending) -> None:
    pending.cancel()
    pending.cancel()
    with pytest.raises(Closed):
        next(pending.chunks())


def drop(pending: Pending) -> None:
    del pending


LEAVING = [leave_by_break, leave_by_exception, leave_by_cancel, leave_half_read, never_begin, cancel_unread, drop]


@pytest.mark.parametrize("leave", LEAVING)
def test_what_is_left_unread_is_abandoned_and_the_next_request_gets_its_own_chunks(leave):
    def body(bridge):
        gc.disable()
        for turn in range(4):
            leave(bridge.submit(safe(3, 20, seed=turn)))
            following = [safe(2, 7, seed=10 * turn + i) for i in range(2)]
            for sent, pending in zip(following, [bridge.submit(sent) for sent in following], strict=True):
                found = read(pending)
                assert [rows.start for rows, _ in found] == [0, 4, 8, 12]
                right(torch.cat([chunk["logits"] for _, chunk in found]), sent)
            until(lambda: bridge.free_slots == 2, "all slots free")

    with serving() as it:
        assert it.rank(0, body).join() == 0


def test_the_head_is_not_applied_to_what_nobody_reads():
    with serving() as it, it.bridge() as bridge:
        ring = it.owner.lanes[0].ring
        leave_by_break(bridge.submit(safe(1, 200)))
        until(lambda: ring.replied == 1, "the end of the reply")
        assert ring.streamed <= 4, "two chunks of room, and two while the rank was on its way out"


# Deadlines and errors


def test_a_deadline_before_the_first_chunk_leaves_the_pending_to_be_read_again():
    gate, opening = os.pipe()
    with serving(teacher=Table(gate)) as it, it.bridge() as bridge:
        sent = torch.full((1, 9), WAITS)
        pending = bridge.submit(sent, step=7)
        for late in (lambda: pending.copy(timeout=0.02), lambda: next(pending.chunks(timeout=0.02))):
            with pytest.raises(DeadlineExceeded, match=r"step 7, sequence 0 after 0\.02 s; the teacher is in phase"):
                late()
        os.write(opening, b"x")
        right(pending.copy().logits, sent)


@pytest.mark.parametrize(("token", "message", "place", "chunks"), [
    (RAISES, "six hundred and sixty-six", "__call__", 0),
    (BREAKS_THE_HEAD, "no logits for this one", "encode", 2),
])  # fmt: skip
def test_an_error_reaches_the_culprit_alone_after_the_chunks_before_it(token, message, place, chunks):
    def body(bridge):
        for step in range(3):
            sent = safe(2, 9, seed=10 * step + bridge.rank)
            if bridge.rank == 1 and step == 1:
                sent[1, 2] = token
                seen = []
                with pytest.raises(TeacherError, match=message) as caught:
                    seen.extend(rows.start for rows, _ in bridge.submit(sent, step=step).chunks())
                assert f"in {place}" in caught.value.remote_traceback
                assert len(seen) in (0, chunks)
                with pytest.raises(TeacherError, match=message):
                    bridge.exchange(sent)
                assert bridge.free_slots == 2
            else:
                right(bridge.exchange(sent).logits, sent)
        answers(bridge)

    with serving("teacher.linger_ms=0", *LOGITS, lanes=2) as it:
        assert [child.join() for child in [it.rank(lane, body) for lane in range(2)]] == [0, 0]


# Ranks that do not read


def reads_later(bridge: Bridge) -> None:
    """Submits two, stops itself, and reads when it is woken."""
    sent = [safe(2, 15, seed=i) for i in range(2)]
    pending = [bridge.submit(one) for one in sent]
    os.kill(os.getpid(), signal.SIGSTOP)
    for one, reply in zip(sent, pending, strict=True):
        right(reply.copy().logits, one)
    answers(bridge)


def test_a_stopped_rank_keeps_nobody_waiting_and_reads_its_chunks_later():
    with serving(lanes=2) as it:
        stopped = it.rank(1, reads_later)
        until(lambda: process.state(stopped.pid) == "stopped", "the stopped rank")
        bridge = it.bridge()
        for step in range(10):
            answers(bridge, step)
        ring = it.owner.lanes[1].ring
        assert (ring.replied, ring.streamed, ring.consumed) == (0, 2, 0)
        stopped.kill(signal.SIGCONT)
        assert stopped.join() == 0
        answers(bridge)


def test_lockstep_waits_for_the_reader_of_a_stream():
    """What teacher.collect=lockstep means here: no forward without a request of every open lane."""
    with serving("teacher.collect=lockstep", *LOGITS, lanes=2) as it:
        stopped = it.rank(1, reads_later)
        until(lambda: process.state(stopped.pid) == "stopped", "the stopped rank")
        bridge = it.bridge()
        answers(bridge)  # together with the other's first
        sent = safe(1, 9)
        pending = bridge.submit(sent)
        with pytest.raises(
            DeadlineExceeded, match=r"teacher\.collect is lockstep: it waits for a request of every rank"
        ):
            pending.copy(timeout=0.05)
        stopped.kill(signal.SIGCONT)
        right(pending.copy().logits, sent)
        answers(bridge)
        bridge.close()
        assert stopped.join() == 0


# Ends


def stops_half_way(bridge: Bridge) -> None:
    chunks = bridge.submit(safe(3, 15)).chunks()
    next(chunks)
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_killed_in_mid_stream_leaves_the_teacher_to_the_others():
    with serving(lanes=2) as it:
        killed = it.rank(1, stops_half_way)
        until(lambda: process.state(killed.pid) == "stopped", "the rank in the middle of its stream")
        with it.bridge() as bridge:
            answers(bridge, 1)
            killed.kill()
            assert killed.join() == -signal.SIGKILL
            for step in range(5):
                answers(bridge, step)
        assert it.children[0].join() == 0


@pytest.mark.every_plane
def test_a_teacher_killed_in_mid_stream_is_named_with_step_and_sequence():
    with serving() as it, it.bridge() as bridge:
        sent = safe(3, 15)
        seen = []
        with pytest.raises(
            TeacherDied, match=r"rank 0 waited for the reply to step 5, sequence 0: teacher 0 .* is gone"
        ):
            for rows, chunk in bridge.submit(sent, step=5).chunks():
                torch.testing.assert_close(chunk.logits, MODEL.logits(sent)[rows])
                seen.append(rows.start)
                if rows.start == 0:
                    until(lambda: it.owner.lanes[0].ring.streamed == 2, "a full ring of chunks")
                    it.children[0].kill()
                    assert it.children[0].join() == -signal.SIGKILL
        assert seen == [0, CHUNK], "what was answered before is still given"


def test_closing_with_unread_streams_ends_the_teacher():
    with serving("ring.depth=3", *LOGITS) as it, it.bridge() as bridge:
        pending = [bridge.submit(safe(2, 15, i)) for i in range(3)]
        chunks = pending[0].chunks()
        _, chunk = next(chunks)
        bridge.close()
        right(chunk.logits, safe(2, 15)[:1, :CHUNK])  # what is in one's hands stays readable
        with pytest.raises(Closed, match="bridge is closed"):
            next(chunks)
        with pytest.raises(Closed, match="bridge is closed"):
            pending[1].copy()
        assert it.children[0].join() == 0


def test_a_teacher_ends_the_streams_that_were_asked_for_before_training_ended():
    with serving("ring.depth=3", *LOGITS) as it, it.bridge() as bridge:
        sent = [safe(3, 15, i) for i in range(2)]
        pending = [bridge.submit(one) for one in sent]
        first = []
        for rows, chunk in pending[0].chunks():
            first.append(chunk.logits.clone())
            if rows.start == 0:
                it.owner.end_training()
        right(torch.cat(first), sent[0])
        right(pending[1].copy().logits, sent[1])
        assert it.children[0].join() == 0


# Memory


def anonymous_kb() -> int:
    """Memory of this process alone, without what it shares."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def peak_kb_of_one_reply(tokens: int, words: int) -> tuple[int, int]:
    """What teacher and rank take at most for one streamed reply, above what they take before it."""
    peaks = mmap.mmap(-1, 32)
    shared = memoryview(peaks).cast("Q")

    def note(side: int) -> None:
        shared[side] = max(shared[side], anonymous_kb())

    class Noted(Head):
        def __call__(self, hidden):
            logits = super().__call__(hidden)
            note(0)
            return logits

    class Large:
        head = Noted(torch.ones(words, 16))

        def __call__(self, batch):
            if batch.input_ids.shape[1] < tokens:  # the probe, or a small request before the one that counts
                shared[2] = anonymous_kb()
            note(0)
            return {"hidden": torch.ones(*batch.input_ids.shape, 16)}

    def body(bridge):
        bridge.exchange(torch.ones(1, 64, dtype=torch.int64))
        shared[0] = shared[2]
        shared[3] = shared[1] = anonymous_kb()
        for _rows, chunk in bridge.submit(torch.ones(1, tokens, dtype=torch.int64)).chunks():
            torch.log_softmax(chunk.logits, -1).sum()
            note(1)

    stream = "payload.stream={chunk_positions: 64, chunks: 2}"
    with serving("payload.logits.dtype=float32", stream, f"ring.max_tokens={tokens}", teacher=Large()) as it:
        assert it.rank(0, body).join() == 0
    return shared[0] - shared[2], shared[1] - shared[3]


def test_memory_of_both_sides_does_not_grow_with_the_sequence():
    """1k and 4k tokens x 8k words: whole float32 logits would be 32 and 128 MB; IDs and hidden states are 0.1 and 0.4."""
    short, long = peak_kb_of_one_reply(1024, 8192), peak_kb_of_one_reply(4096, 8192)
    for side, before, after in zip(("teacher", "rank"), short, long, strict=True):
        assert after - before < 24 << 10, f"the {side} took {before} kB, then {after} kB"


@pytest.mark.one_plane
@pytest.mark.slow
def test_the_script_that_shows_it():
    script = [sys.executable, "scripts/stream_long.py", "--tokens", "256", "512", "--words", "1024", "--chunk", "32"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tokens = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert tokens == ["tokens", "256", "512"]


@pytest.mark.parametrize("raises", [False, True])
def test_a_request_without_chunks_ends_while_the_next_reply_is_streaming(raises):
    """It raised, or it chose no position. The chunks that are there already are the next reply's."""
    with serving() as it, it.bridge() as bridge:
        first = bridge.submit(torch.full((1, 4), RAISES if raises else 0), positions=torch.full((1, 4), int(raises)))
        sent = safe(1, 9)
        second = bridge.submit(sent)
        until(lambda: it.owner.lanes[0].ring.streamed == 2, "two chunks of the second reply")
        if raises:
            with pytest.raises(TeacherError, match="six hundred"):
                list(first.chunks())
        else:
            assert list(first.chunks()) == []
        right(second.copy().logits, sent)
