"""What the teacher answered, as a rank reads it."""

from __future__ import annotations

import torch

from shmbridge.errors import Closed
from shmbridge.shm.ring import Composition


class Reply:
    """What the teacher answered: named tensors with the axes (batch, seq) in front, (batch, seq, vocab) for `logits`; with
    (positions,) in their place where the request chose positions, and in a chunk.

    `missing` is True where there is no answer, because the bridge is off or the teacher is lost; there are no tensors then.
    `composition` tells where the request stood in the teacher's forward, which the bits of the reply depend on; None in a chunk.

    Where the tensors are lent (a lease or a chunk on the CPU, or with cuda.read=in_place), they lie in memory that the teacher
    writes again once the lease or the chunk has ended. A backward that needs a lent tensor, a view of it or a detach() of it
    after that raises a RuntimeError of autograd, and Bridge adds a note with the sequence and the remedy. A variable that
    merely outlives the block does no harm. What autograd does not save it cannot watch: reading such a variable after the
    block, a tensor that a checkpointed function takes from its closure, an attribute of `ctx` in an autograd function of
    your own (use ctx.save_for_backward), `.data`, `.numpy()`, DLPack and raw pointers. Use pending.copy() for these.
    """

    __slots__ = ("_dropped", "_lent", "_released", "_tensors", "composition", "missing", "sequence", "step")

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        sequence: int,
        step: int | None,
        composition: Composition | None,
        *,
        lent: bool = False,
        dropped: list[int] | None = None,
    ) -> None:
        """`lent`: the tensors lie in a slot. `dropped`: where the sequence is noted if nobody calls `forget`."""
        self.sequence = sequence
        self._dropped = dropped
        self._lent = lent
        self._tensors = tensors
        self._released = False
        self.missing = not tensors
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
            raise KeyError(self._why_not(name))
        return self._tensors[name]

    def _why_not(self, name: str) -> str:
        """Why there is no tensor `name`, and the remedy."""
        if self.missing:
            return (
                f"the reply has no {name!r}: it is missing, because the bridge is off or the teacher is lost; look at "
                "reply.missing first and use the script's own loss then, as scripts/example.py does"
            )
        told = f"the reply has no {name!r}; it has {', '.join(self._tensors)}"
        if name == "logits" and "hidden" in self:
            return f"{told}; with payload.hidden={{}} read LazyLogits(reply.hidden, bridge.head)"
        return f"{told}; set payload.hidden={{}}" if name == "hidden" else told

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def owned(self) -> Reply:
        """The same reply outside of any lease."""
        owned = {name: tensor.clone() if self._lent else tensor for name, tensor in self._tensors.items()}
        return Reply(owned, self.sequence, self.step, self.composition)

    def forget(self) -> None:
        """The tensors are not to be read any more."""
        self._tensors = {}
        self._released = True
        self._dropped = None

    def __del__(self) -> None:
        """Dropped, and its lease with it: the slot is given back when the bridge is next used. (Any thread may run this.)"""
        dropped = getattr(self, "_dropped", None)  # absent where a KeyboardInterrupt came within __init__
        if dropped is not None:
            dropped.append(self.sequence)
