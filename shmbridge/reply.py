"""What a rank holds of one request: Pending, then a Lease on its Reply, or its chunks.

References run one way, lease -> pending -> bridge, so that a loop which runs with the garbage collector off holds neither
a slot nor a mapping longer than its own variables do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from shmbridge.errors import Closed
from shmbridge.offer import Extent
from shmbridge.ring import Composition

if TYPE_CHECKING:
    from shmbridge.bridge import Bridge


class Reply:
    """What the teacher answered: named tensors with the axes (batch, seq) in front, (batch, seq, vocab) for `logits`; with
    (positions,) in their place where the request chose positions, and in a chunk.

    `missing` is True where there is no answer because the bridge is off; there are no tensors then. `composition` tells
    where the request stood in the teacher's forward, which the bits of the reply depend on; None in a chunk.
    """

    __slots__ = ("_released", "_tensors", "composition", "missing", "sequence", "step")

    def __init__(
        self, tensors: dict[str, torch.Tensor], sequence: int, step: int | None, composition: Composition | None
    ) -> None:
        self._tensors = tensors
        self._released = False
        self.missing = not tensors
        self.sequence = sequence
        self.step = step
        self.composition = composition

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def logits(self) -> torch.Tensor:
        """(batch, seq, vocab); row i is the distribution after token i."""
        return self["logits"]

    @property
    def hidden(self) -> torch.Tensor:
        """(batch, seq, width) in the model's dtype; bridge.head(reply.hidden) gives the logits."""
        return self["hidden"]

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._released:
            raise Closed(f"the lease on sequence {self.sequence} was released; use the reply inside its `with` block.")
        if name not in self._tensors:
            has = "no tensors, because the bridge is off" if self.missing else ", ".join(self._tensors)
            raise KeyError(f"the reply has no {name!r}; it has {has}")
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def _owned(self) -> Reply:
        """The same reply outside of any lease. On a GPU the tensors are this rank's own already."""
        owned = {name: t.clone() if t.device.type == "cpu" else t for name, t in self._tensors.items()}
        return Reply(owned, self.sequence, self.step, self.composition)

    def _forget(self) -> None:
        self._tensors = {}
        self._released = True


class Lease:
    """The right to read one reply in place. Used as `with pending.wait() as reply:`; released at the end of the block.

    The tensors lie in memory that the teacher writes again after the release: finish the backward inside the block.
    """

    __slots__ = ("_bridge", "_since_ns", "reply")

    def __init__(self, bridge: Bridge | None, reply: Reply) -> None:
        self._bridge = bridge
        self._since_ns = time.monotonic_ns()
        self.reply = reply

    def release(self) -> None:
        """Give the slot back. Once is enough; more does nothing."""
        if self._bridge is not None:
            bridge, self._bridge = self._bridge, None
            self.reply._forget()
            bridge._release(self.reply, self._since_ns)

    def __enter__(self) -> Reply:
        return self.reply

    def __exit__(self, *_: object) -> None:
        self.release()


class Pending:
    """A request that was submitted and not yet answered."""

    __slots__ = ("_arrays", "_bridge", "_extent", "sequence", "step")

    def __init__(
        self, bridge: Bridge, sequence: int, step: int | None, extent: Extent, arrays: frozenset[str] = frozenset()
    ) -> None:
        self._bridge: Bridge | None = bridge
        self.sequence = sequence
        self.step = step
        self._extent = extent
        self._arrays = arrays  # what travelled beside the IDs

    @property
    def done(self) -> bool:
        """True once `wait` would not have to."""
        return self._bridge is None or self._bridge._answered(self.sequence)

    def wait(self, timeout: float | None = None) -> Lease:
        """Sleep until the teacher has answered; a lease on the reply.

        Args:
            timeout: seconds. None: timeouts.request_s of the config.

        Raises:
            TeacherError: the forward raised for this request; the slot is free again and the teacher lives.
            TeacherDied, TrainerDied, LauncherDied: somebody else ended; names the step and the sequence.
            DeadlineExceeded: nobody died and nobody answered. `wait` may be called again.
            Closed: this Pending was waited for before, or its bridge is closed.
            RequestRefused: the session streams its replies; use `chunks` or `copy`.
        """
        bridge = self._waiting()
        bridge._await(self, timeout)
        self._bridge = None  # from here on the slot is the lease's, or given back
        return bridge._lease(self)

    def chunks(self, timeout: float | None = None) -> Iterator[tuple[slice, Reply]]:
        """The reply piece by piece: `for rows, chunk in pending.chunks()`.

        `rows` is a slice of the request's positions (batch x seq, or those it chose) in row-major order, and the tensors of
        `chunk` have that many rows. Chunks come in order; each is given back when the next is asked for. Where the
        session does not stream there is one, the whole reply. A loop that is left early abandons the rest.

        Args:
            timeout: seconds for each chunk. None: timeouts.request_s of the config.

        Raises:
            RequestRefused: an older reply of this rank is still to be read; they are streamed in order.
            What `wait` raises.
        """
        bridge = self._waiting()
        bridge._check_turn(self)
        self._bridge = None
        yield from bridge._chunks(self, timeout)

    def copy(self, timeout: float | None = None) -> Reply:
        """Wait, and copy the reply out of its slot or its chunks: tensors of one's own, no lease. Raises what `wait` and
        `chunks` raise."""
        bridge = self._waiting()
        if bridge._streams:
            return bridge._assemble(self, timeout)
        with self.wait(timeout) as reply:
            return reply._owned()

    def cancel(self) -> None:
        """Nobody will read the reply: the teacher need not compute it, and its slot is free again soon."""
        if self._bridge is not None:
            bridge, self._bridge = self._bridge, None
            bridge._cancel(self.sequence)

    def __del__(self) -> None:
        """Dropped without a lease: cancelled when the bridge is next used. (Any thread may run this.)"""
        if self._bridge is not None:
            self._bridge._dropped.append(self.sequence)

    def _waiting(self) -> Bridge:
        if self._bridge is None:
            raise Closed(f"sequence {self.sequence} was waited for before; a reply is leased once.")
        return self._bridge
