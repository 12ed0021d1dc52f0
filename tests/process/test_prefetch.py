"""bridge.prefetch: the teacher ahead of the loop, and what holds where a loop ends, breaks, raises or does something else."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from shmbridge.errors import Closed, DeadlineExceeded, RequestRefused, RingFull
from shmbridge.rank.bridge import Bridge
from shmbridge.rank.pending import Pending
from shmbridge.teacher.batch import Batch
from tests.harness import Echo, bench, until
from tests.late_gpu import LateGpu
from tests.process.test_bridge import ids, running

WAITS = 999


class Gated(Echo):
    """Waits for a byte of `gate` at each batch that holds the token WAITS."""

    def __init__(self, gate: int) -> None:
        self.gate = gate

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        if (batch.input_ids == WAITS).any():
            os.read(self.gate, 1)
        return {**super().__call__(batch), "places": places(batch)}


def places(batch: Batch) -> torch.Tensor:
    """position_ids as they came, or -1."""
    return torch.full_like(batch.input_ids, -1) if batch.position_ids is None else batch.position_ids.clone()


def batches(count: int, rows: int = 2, seq: int = 5, seed: int = 0) -> list[torch.Tensor]:
    return [ids(rows, seq, seed=1000 * seed + i) % WAITS for i in range(count)]


def right(pending: Pending, sent: torch.Tensor) -> None:
    with pending.wait() as reply:
        assert torch.equal(reply["ids"], sent)


def nothing_in_flight(bridge: Bridge) -> None:
    """Every slot is free again, and the next requests get their own replies."""
    until(lambda: bridge.free_slots == bridge.settings.ring.depth, "all slots free")
    for batch in batches(3, seed=77):
        assert torch.equal(bridge.exchange(batch)["ids"], batch)


# Order and ends


def as_loader(workers: int) -> Callable[[list[torch.Tensor]], Any]:
    return lambda wanted: DataLoader(
        wanted, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )


SOURCES = {
    "a list": list,
    "a generator": lambda wanted: (batch for batch in wanted),
    "a DataLoader": as_loader(0),
    "a DataLoader with workers": as_loader(2),
}


@pytest.mark.parametrize("source", SOURCES)
def test_each_batch_is_handed_out_once_and_in_order_in_every_epoch(source):
    with running("ring.depth=3") as (_, bridge):
        for count in (7, 2, 0, 7):  # also fewer than the ring has slots
            wanted, seen = batches(count), []
            for batch, pending in bridge.prefetch(SOURCES[source](wanted)):
                right(pending, batch)
                seen.append(batch)
            assert len(seen) == count and all(map(torch.equal, seen, wanted))
            assert bridge.free_slots == 3
        nothing_in_flight(bridge)


def test_the_teacher_is_ahead_of_the_loop():
    """Batch n + 1 is submitted before n is handed out, and answered while the loop holds n."""
    gate, opening = os.pipe()
    wanted = batches(4)
    wanted[0][0, 0] = WAITS
    with running("ring.depth=3", teacher=Gated(gate)) as (it, bridge):
        ring = it.owner.lanes[0].ring
        taken = []
        ahead = bridge.prefetch(taken.append(i) or batch for i, batch in enumerate(wanted))
        batch, pending = next(ahead)
        assert (ring.requested, taken, pending.done) == (3, [0, 1, 2], False), "two ahead of a teacher that waits"
        os.write(opening, b"x")
        until(lambda: ring.replied == 3, "the replies to all that was submitted, while the loop holds the first batch")
        right(pending, batch)
        batch, pending = next(ahead)
        assert (ring.requested, taken) == (4, [0, 1, 2, 3])
        ahead.close()
        pending.cancel()
        nothing_in_flight(bridge)


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_ahead_batches_are_taken_and_as_many_sent_as_the_ring_has_room_for(ahead):
    with running("ring.depth=3") as (it, bridge):
        ring = it.owner.lanes[0].ring
        taken = []
        source = (taken.append(i) or batch for i, batch in enumerate(batches(5)))
        for turn, (batch, pending) in enumerate(bridge.prefetch(source, ahead=ahead), 1):
            assert len(taken) == min(5, turn + ahead)
            assert ring.requested == min(5, turn + min(ahead, 2))
            right(pending, batch)
        with pytest.raises(RequestRefused, match="ahead is -1; 0 takes each batch in its turn"):
            bridge.prefetch([], ahead=-1)


# Errors of the loader, and of batches


class Shards(torch.utils.data.Dataset):
    """Six batches. That of `broken` cannot be read; that of `refused` holds an ID that the teacher does not take."""

    def __init__(self, broken: int | None = None, refused: int | None = None) -> None:
        self.wanted = batches(6)
        self.broken = broken
        if refused is not None:
            self.wanted[refused][1, 3] = -100

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        if i == self.broken:
            raise ZeroDivisionError("a bad shard")
        return self.wanted[i]


@pytest.mark.parametrize(
    ("shards", "as_source", "kind", "message", "at"),
    [
        (Shards(broken=0), iter, ZeroDivisionError, "a bad shard", 0),
        (Shards(broken=4), iter, ZeroDivisionError, "a bad shard", 4),
        (Shards(broken=1), as_loader(0), ZeroDivisionError, "a bad shard", 1),
        (Shards(refused=2), iter, RequestRefused, r"input_ids\[1, 3\] is -100", 2),
    ],
)
def test_what_is_raised_comes_in_its_turn_after_the_batches_before_it(shards, as_source, kind, message, at):
    with running("ring.depth=3") as (_, bridge):
        seen = 0
        ahead = bridge.prefetch(as_source(shards))
        with pytest.raises(kind, match=message) as caught:
            for batch, pending in ahead:
                right(pending, batch)
                seen += 1
        assert seen == at
        if kind is ZeroDivisionError:
            assert "in __getitem__" in "".join(caught.value.__notes__), "where it was raised is told"
        assert list(ahead) == [], "it stays at its end"
        nothing_in_flight(bridge)


def test_an_exception_that_was_told_holds_no_reference_to_the_prefetch():
    with running() as (_, bridge):
        gc.disable()
        try:
            ahead = bridge.prefetch(["no tokens"])
            watched = weakref.ref(ahead)
            with contextlib.suppress(RequestRefused):
                next(ahead)
            del ahead
            assert watched() is None
        finally:
            gc.enable()


def test_a_loader_that_raised_unseen_keeps_neither_slots_nor_the_bridge():
    """The loop breaks before the loader's exception has its turn; no collector runs."""

    class Loader:
        def __iter__(self):
            return self

        def __next__(self):
            if not wanted:
                raise ZeroDivisionError("a bad shard")
            return wanted.pop()

    def body(bridge):
        gc.disable()
        for batch, pending in bridge.prefetch(Loader()):
            right(pending, batch)
            break
        nothing_in_flight(bridge)

    wanted = batches(2)
    with bench(1, "ring.depth=3") as it:
        it.teacher(Echo())
        assert it.rank(0, body).join() == 0


# Leaving the loop


def leave_by_break(ahead) -> None:
    for batch, pending in ahead:
        right(pending, batch)
        break


def leave_by_exception(ahead) -> None:
    with pytest.raises(KeyError, match="in the loop"):
        for _batch, pending in ahead:
            with pending.wait():
                raise KeyError("in the loop")


def leave_by_close(ahead) -> None:
    batch, pending = next(ahead)
    ahead.close()
    ahead.close()
    right(pending, batch)
    assert list(ahead) == []


def leave_by_with(ahead) -> None:
    with pytest.raises(KeyError, match="in the loop"), ahead as entered:
        next(entered)
        raise KeyError("in the loop")
    assert next(ahead, None) is None


def never_begin(ahead) -> None:
    iter(ahead)


LEAVING = [leave_by_break, leave_by_exception, leave_by_close, leave_by_with, never_begin]


@pytest.mark.parametrize("leave", LEAVING)
def test_nothing_stays_in_flight_behind_a_loop_that_was_left(leave):
    def body(bridge):
        gc.disable()
        for turn in range(3):
            leave(bridge.prefetch(batches(6, seed=turn)))
            nothing_in_flight(bridge)

    with bench(1, "ring.depth=3") as it:
        it.teacher(Echo())
        assert it.rank(0, body).join() == 0


def test_what_a_left_loop_had_submitted_is_not_computed():
    gate, opening = os.pipe()
    wanted = batches(5)
    wanted[1][0, 0] = WAITS
    with running("ring.depth=3", teacher=Gated(gate)) as (_, bridge):
        with bridge.prefetch(wanted) as ahead:
            _, pending = next(ahead)
            before = pending.copy().composition.forward
        os.write(opening, b"x")  # the second batch was in the teacher's hands already, the third was not
        assert bridge.exchange(wanted[0]).composition.forward <= before + 2


def test_a_loop_that_is_dropped_in_another_thread_moves_no_cursor_there():
    """A collector runs finalisers in whatever thread it likes; the rank's own thread may be in the middle of a move."""
    with running("ring.depth=4") as (it, bridge):
        ring = it.owner.lanes[0].ring
        dropped = [bridge.prefetch(batches(9))]
        dropped.append(next(dropped[0])[1])
        until(lambda: ring.replied == 4, "all answered")
        other = threading.Thread(target=dropped.clear)
        other.start()
        other.join()
        assert (ring.released, ring.abandoned) == (0, 0)
        assert bridge.free_slots == 4, "noted, and done when the bridge is used"
        nothing_in_flight(bridge)


def test_a_new_loop_over_the_rest_loses_and_doubles_nothing_that_was_handed_out():
    """`state` is that of the batch in the loop's hands, not of the loader, which is ahead."""

    class Stateful:
        """As torchdata's StatefulDataLoader: iterates from where its state says."""

        def __init__(self, at: int = 0) -> None:
            self.at = at

        def __iter__(self):
            while self.at < len(wanted):
                self.at += 1
                yield wanted[self.at - 1]

        def state_dict(self):
            return {"at": self.at}

    wanted = batches(8)
    with running("ring.depth=3") as (_, bridge):
        loader = Stateful()
        seen = []
        with bridge.prefetch(loader, state=loader.state_dict) as ahead:
            assert ahead.state is None
            for batch, pending in ahead:
                right(pending, batch)
                seen.append(batch)
                assert ahead.state == {"at": len(seen)}
                if len(seen) == 3:
                    break
            assert loader.state_dict() == {"at": 5}, "the loader is ahead"
        for batch, pending in bridge.prefetch(Stateful(**ahead.state)):
            right(pending, batch)
            seen.append(batch)
        assert torch.equal(torch.stack(seen), torch.stack(wanted))


# What else happens in a loop


STREAMED = "payload.stream={chunk_positions: 3, chunks: 2}"


def test_a_function_to_the_tokens_is_called_once_for_each_batch_and_may_use_the_bridge():
    """Also for one that was withdrawn: it may draw a random mask of positions."""
    with running("ring.depth=3") as (_, bridge):
        wanted, asked = batches(6), []

        def tokens(batch: torch.Tensor) -> torch.Tensor:
            asked.append(batch)
            assert len(asked) <= len(wanted)
            if len(asked) % 2 == 0:
                right(bridge.submit(batch + 1), batch + 1)
            return batch

        for step, (batch, pending) in enumerate(bridge.prefetch(wanted, tokens)):
            assert torch.equal(batch, wanted[step])
            right(pending, batch)
            bridge.exchange(batch)
        assert torch.equal(torch.stack(asked), torch.stack(wanted))
        nothing_in_flight(bridge)


def test_two_loops_by_turns_on_one_ring():
    with running("ring.depth=3") as (_, bridge):
        one, other = batches(6, seed=1), batches(6, seed=2)
        pairs = zip(bridge.prefetch(one, ahead=0), bridge.prefetch(other, ahead=0), strict=True)
        for i, ((first, its), (second, theirs)) in enumerate(pairs):
            assert torch.equal(first, one[i])
            assert torch.equal(second, other[i])
            right(its, first)
            right(theirs, second)
        nothing_in_flight(bridge)


def test_a_request_of_the_loops_own_does_not_queue_behind_what_was_prefetched():
    """Slots come free in order: behind a prefetched request its slot would stay taken until the loop has read that one."""
    with running("ring.depth=4") as (_, bridge):
        ahead = bridge.prefetch(batches(4), ahead=1)
        _, pending = next(ahead)
        assert pending.sequence == 0
        pending.cancel()
        own = bridge.submit(batches(1)[0])
        assert own.sequence == 2, "batch 1 was ahead"
        with pytest.raises(RequestRefused):
            bridge.submit("nothing is withdrawn for what is not sent")
        until(lambda: bridge.free_slots == 3, "the slots of what was cancelled")
        _, pending = next(ahead)
        assert pending.sequence == 3, "batch 1 again, behind the loop's own"
        assert next(ahead)[1].sequence == 4, "which no other request withdrew"
        ahead.close()


HELD = 4  # micro-batches


@pytest.mark.parametrize(
    "depth", [1, 5, 7, *(pytest.param(depth, marks=pytest.mark.matrix) for depth in (2, 3, 4, 6, 8))]
)
def test_an_evaluation_of_any_length_between_steps_that_hold_four_micro_batches(depth):
    """All four replies of a step are held at once, as far as the ring is deep enough for that."""
    held = min(HELD, depth)
    wanted = batches(4 * HELD * (depth + 2))
    with running(f"ring.depth={depth}") as (_, bridge):
        ahead = bridge.prefetch(wanted)
        turn = iter(wanted)
        for step in range(4 * (depth + 2)):
            for count in [held] * (HELD // held) + [1] * (HELD % held):
                if step % 2:
                    for batch, pending in [next(ahead) for _ in range(count)]:
                        assert torch.equal(batch, next(turn))
                        right(pending, batch)
                else:
                    leases = []
                    for batch, pending in (next(ahead) for _ in range(count)):
                        assert torch.equal(batch, next(turn))
                        leases.append((pending.wait(), batch))
                    for lease, batch in leases:
                        assert torch.equal(lease.reply["ids"], batch)
                        lease.release()
            held_out = batches(step // 4, seed=step + 1)
            if step % 4 < 2:
                for batch in held_out:
                    assert torch.equal(bridge.exchange(batch)["ids"], batch)
            else:
                for batch, pending in bridge.prefetch(held_out):
                    right(pending, batch)
        assert next(turn, None) is None
        nothing_in_flight(bridge)


def test_a_full_ring_tells_who_holds_it():
    gate, opening = os.pipe()
    with running("ring.depth=6", teacher=Gated(gate)) as (_, bridge):
        waits = batches(1)[0]
        waits[0, 0] = WAITS
        given = [*batches(4), waits, waits]
        pendings = [bridge.submit(batch, step=step) for step, batch in enumerate(given[:5], 7)]
        pendings.append(bridge.submit(given[5]))
        lease = pendings[0].wait()
        for released in (1, 3):
            right(pendings[released], given[released])
        with pytest.raises(RingFull) as caught:
            bridge.submit(given[0])
        waits, unread, computed = "waits for the slots before it", "answered and not read", "being computed"
        held = re.findall(r"sequence (\d) \((step \d+|no step)\) ([^,.]+)", str(caught.value))
        assert held == [
            *(("0", "step 7", "leased"), ("1", "step 8", waits), ("2", "step 9", unread), ("3", "step 10", waits)),
            *(("4", "step 11", computed), ("5", "no step", computed)),
        ]
        os.write(opening, b"xx")
        lease.release()
        for kept in (2, 4, 5):
            right(pendings[kept], given[kept])
        nothing_in_flight(bridge)


def test_leases_held_in_the_loop_leave_the_teacher_less_ahead_until_the_ring_is_full():
    with running("ring.depth=3") as (it, bridge):
        ring = it.owner.lanes[0].ring
        wanted = batches(6)
        ahead = bridge.prefetch(wanted)
        leases = []
        for turn in range(3):
            batch, pending = next(ahead)
            leases.append(pending.wait())
            assert torch.equal(leases[-1].reply["ids"], batch)
            assert ring.requested == 3, f"nothing is free for batch {turn + 3}"
        batch, pending = next(ahead)
        with pytest.raises(RingFull, match=r"3 requests are in flight and the ring has ring\.depth=3 slots: .* leased"):
            pending.wait()
        for lease, held in zip(leases, wanted, strict=False):
            assert torch.equal(lease.reply["ids"], held), "held replies are untouched"
            lease.release()
        right(pending, batch)
        ahead.close()
        nothing_in_flight(bridge)


# Drawn and not sent yet


def by_lease(pending: Pending) -> torch.Tensor:
    with pending.wait() as reply:
        return reply["ids"].clone()


def by_copy(pending: Pending) -> torch.Tensor:
    return pending.copy()["ids"]


def by_chunks(pending: Pending) -> torch.Tensor:
    return torch.cat([chunk["ids"].clone() for _, chunk in pending.chunks()])


READING = {"lease": by_lease, "copy": by_copy, "chunks": by_chunks, "streamed copy": by_copy, "streamed": by_chunks}


@contextmanager
def reading(how: str, depth: int) -> Iterator[tuple[Any, Bridge]]:
    """The ring as its owner sees it, and the bridge."""
    overrides = [STREAMED] if how.startswith("streamed") else []
    with running(f"ring.depth={depth}", *overrides, teacher=lambda batch: {"ids": batch.input_ids}) as (it, bridge):
        yield it.owner.lanes[0].ring, bridge


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("how", READING)
def test_a_loop_draws_four_micro_batches_and_reads_them_in_order(how, depth):
    """With a ring of any depth; the end of each reply sends the next request, and each one is sent once."""
    wanted = batches(11)
    with reading(how, depth) as (ring, bridge):
        ahead, read = bridge.prefetch(wanted), 0
        while drawn := list(islice(ahead, 4)):
            for batch, pending in drawn:
                assert torch.equal(READING[how](pending).flatten(), wanted[read].flatten())
                assert torch.equal(batch, wanted[read])
                read += 1
                taken = min(11, 4 * ((read - 1) // 4 + 1) + depth - 1)
                assert ring.requested == min(taken, read + depth), "in the ring, without a call of the loop"
                until(
                    lambda: ring.replied == ring.requested or ring.streamed > ring.consumed,
                    "the next replies, or a chunk of one, while the loop does something else",
                )
        assert (read, ring.requested) == (11, 11)
        nothing_in_flight(bridge)


@pytest.mark.parametrize("how", ["lease", "chunks", "streamed"])
def test_a_reply_that_is_left_by_an_exception_sends_nothing(how):
    with reading(how, 1) as (ring, bridge):
        with bridge.prefetch(batches(3), ahead=0) as ahead:
            (_, first), (batch, second) = islice(ahead, 2)
            assert (first.sequence, second.sequence, second.done) == (0, None, False)
            if how == "lease":
                with pytest.raises(KeyError), first.wait():
                    raise KeyError("in the loop")
            else:
                reply = first.chunks()
                next(reply)
                with pytest.raises(KeyError):
                    reply.throw(KeyError("in the loop"))
            assert (ring.requested, second.sequence) == (1, None)
            assert torch.equal(READING[how](second).flatten(), batch.flatten())
            assert second.sequence == 1
        nothing_in_flight(bridge)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("how", READING)
def test_an_evaluation_between_drawn_micro_batches_withdraws_them_and_none_is_lost_or_taken_twice(how, depth):
    wanted, held_out = batches(8), batches(3, seed=5)
    with reading(how, depth) as (_, bridge):
        taken: list[int] = []
        ahead = bridge.prefetch((taken.append(i) or batch for i, batch in enumerate(wanted)), state=lambda: len(taken))
        read = []
        for evaluated in (0, 2):  # replies of the step that the loop has read before
            drawn = [(*next(ahead), ahead.state) for _ in range(4)]
            for place, (batch, pending, state) in enumerate(drawn):
                if place == evaluated:
                    for other in held_out:
                        assert torch.equal(bridge.exchange(other)["ids"], other)
                    for other, reply in bridge.prefetch(held_out):
                        assert torch.equal(READING[how](reply).flatten(), other.flatten())
                    assert pending.sequence is None, "withdrawn, and sent again when it is waited for"
                assert torch.equal(READING[how](pending).flatten(), batch.flatten())
                read.append(batch)
                assert state == len(read)
        assert torch.equal(torch.stack(read), torch.stack(wanted))
        assert next(ahead, None) is None
        assert taken == list(range(8))
        nothing_in_flight(bridge)


def test_what_is_waited_for_or_held_is_not_withdrawn():
    gate, opening = os.pipe()
    wanted = batches(3)
    wanted[1][0, 0] = WAITS
    with running("ring.depth=4", teacher=Gated(gate)) as (_, bridge):
        ahead = bridge.prefetch(wanted)
        (_, held), (_, late), (_, third) = ahead
        lease = held.wait()
        with pytest.raises(DeadlineExceeded):
            late.wait(timeout=0)
        own = bridge.submit(wanted[0])
        assert (late.sequence, third.sequence, own.sequence) == (1, None, 3)
        assert torch.equal(lease.reply["ids"], wanted[0])
        lease.release()
        os.write(opening, b"x")
        right(late, wanted[1])
        right(own, wanted[0])
        right(third, wanted[2])
        nothing_in_flight(bridge)


def test_unsent_requests_that_are_cancelled_or_dropped_are_not_sent():
    with running("ring.depth=1") as (it, bridge):
        wanted = batches(5)
        drawn = [pending for _, pending in bridge.prefetch(wanted)]
        drawn[1].cancel()
        with pytest.raises(Closed, match="this request was waited for or cancelled before"):
            drawn[1].wait()
        drawn[2] = drawn[1]
        for place in (0, 3, 4):
            right(drawn[place], wanted[place])
        assert it.owner.lanes[0].ring.requested == 3
        nothing_in_flight(bridge)


def test_reading_out_of_order_is_refused_where_the_ring_is_full():
    with running("ring.depth=2") as (_, bridge):
        wanted = batches(4)
        drawn = [pending for _, pending in bridge.prefetch(wanted)]
        right(drawn[1], wanted[1])
        with pytest.raises(
            RingFull,
            match=r"ring\.depth=2 .*release sequence 0.*others that are not read: 2\. .* in that order",
        ):
            drawn[3].wait()
        for place in (0, 2, 3):
            right(drawn[place], wanted[place])
        nothing_in_flight(bridge)


def test_what_was_drawn_is_answered_after_the_prefetch_is_closed():
    with running("ring.depth=1") as (_, bridge):
        wanted = batches(5)
        with bridge.prefetch(wanted, ahead=2) as ahead:
            drawn = [next(ahead)[1] for _ in range(2)]
        for pending, batch in zip(drawn, wanted, strict=False):
            right(pending, batch)
        nothing_in_flight(bridge)
        _, last = next(bridge.prefetch(wanted))
        bridge.close()
        with pytest.raises(Closed, match="the bridge is closed"):
            last.wait()


def test_a_loader_that_fills_one_buffer_again_and_again():
    """As nanochat's. The IDs are copied when a batch is taken, and what is withdrawn is sent as it was."""
    wanted = batches(6)
    buffer = torch.empty_like(wanted[0])
    with running("ring.depth=2") as (_, bridge):
        drawn = [pending for _, pending in bridge.prefetch(buffer.copy_(batch) for batch in wanted)]
        bridge.exchange(wanted[0])
        for pending, batch in zip(drawn, wanted, strict=True):
            right(pending, batch)


# Where a batch has its tokens


def test_tokens_are_found_in_every_kind_of_batch():
    sent = batches(1)[0]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    places = torch.tensor([[0, 1, 2, 2, 2], [0, 1, 2, 3, 4]])
    labels = sent.clone()
    full = {"input_ids": sent, "attention_mask": mask, "position_ids": places, "labels": labels}
    ones = torch.ones_like(sent)
    cases: list[tuple[Any, Any, torch.Tensor, torch.Tensor]] = [
        (sent, None, ones, -ones),
        (sent.numpy().astype(np.int32), None, ones, -ones),
        ({"input_ids": sent, "labels": labels}, None, ones, -ones),
        (full, None, mask, places),
        (BatchEncoding({"input_ids": sent, "attention_mask": mask}), None, mask, -ones),
        ({"tokens": sent, "attention_mask": mask}, "tokens", ones, -ones),
        ((sent, "what else there is"), lambda batch: batch[0], ones, -ones),
        ((sent, mask), lambda batch: {"input_ids": batch[0], "attention_mask": batch[1], "step": 3}, mask, -ones),
    ]
    with running("ring.depth=3", teacher=Gated(-1)) as (_, bridge):
        for given, tokens, wanted_mask, wanted_places in cases:
            [(batch, pending)] = list(bridge.prefetch([given], tokens))
            assert batch is given
            assert pending.step == (3 if callable(tokens) and given[1] is mask else None)
            reply = pending.copy()
            assert torch.equal(reply["ids"], sent)
            assert torch.equal(reply["mask"], wanted_mask), given
            assert torch.equal(reply["places"], wanted_places), given


def test_batches_on_a_gpu_are_copied_when_they_are_taken(monkeypatch):
    """Also where the loader fills one buffer of the GPU again and again."""
    wanted = batches(5)
    with running("ring.depth=2") as (_, bridge):
        gpu = LateGpu(monkeypatch)
        buffer = torch.zeros_like(wanted[0])
        given = gpu.tensor(buffer)
        for step, (batch, pending) in enumerate(
            bridge.prefetch(given for each in wanted if buffer.copy_(each) is buffer)
        ):
            assert batch is given
            right(pending, wanted[step])
        assert torch.equal(bridge.exchange(given)["ids"], wanted[4])
        assert gpu.syncs == 6
        nothing_in_flight(bridge)


def test_a_batch_without_tokens_is_refused_with_what_to_give():
    cases: list[tuple[Any, Any, str]] = [
        ({"tokens": 1, "labels": 2}, None, r"the batch has \['labels', 'tokens'\]; expected 'input_ids'. Give tokens="),
        ({"tokens": 1}, "ids", r"the batch has \['tokens'\]; expected 'ids'"),
        ((1, 2), None, r"the batch is a tuple; tokens is None: give a function .* tokens=lambda batch: batch\[0\]"),
        (torch.ones(1, 2), "ids", "the batch is a Tensor; tokens is 'ids': give a function"),
        ("text", None, "input_ids is a str; expected a torch.Tensor or a NumPy array"),
    ]
    with running() as (_, bridge):
        for batch, tokens, message in cases:
            with pytest.raises(RequestRefused, match=message):
                next(bridge.prefetch([batch], tokens))
        nothing_in_flight(bridge)


# Beside it


def test_a_closed_bridge_ends_the_loop_with_a_word():
    with running("ring.depth=3") as (_, bridge):
        ahead = bridge.prefetch(batches(9))
        next(ahead)
        bridge.close()
        with pytest.raises(Closed, match="bridge is closed"):
            list(ahead)


def test_a_bridge_that_is_off_runs_the_same_loop():
    given = [{"input_ids": batch, "n": i} for i, batch in enumerate(batches(4))]
    off = Bridge(None)
    taken = []
    seen = []
    with (
        off,
        off.prefetch((taken.append(i) or item for i, item in enumerate(given)), state=lambda: len(taken)) as ahead,
    ):
        for item, pending in ahead:
            assert len(taken) == len(seen) + 1, "nobody computes ahead, so nothing is taken ahead"
            assert ahead.state == len(taken)
            with pending.wait() as reply:
                assert reply.missing
            assert pending.copy().missing
            assert [chunk.missing for _, chunk in pending.chunks()] == [True]
            pending.cancel()
            seen.append(item)
        assert [pending.done for _, pending in off.prefetch(given, ahead=2)] == [True] * 4
    assert seen == given


def test_an_error_that_is_its_own_cause_is_raised_in_its_turn():
    def loader():
        error = ValueError("a circle")
        raise error from error
        yield

    with running() as (_, bridge), pytest.raises(ValueError, match="a circle"):
        next(bridge.prefetch(loader()))
