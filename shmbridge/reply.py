"""What the teacher answered, as a rank reads it."""

from __future__ import annotations

import torch

from shmbridge.errors import Closed
from shmbridge.loan import Loan
from shmbridge.ring import Composition


class Reply:
    """What the teacher answered: named tensors with the axes (batch, seq) in front, (batch, seq, vocab) for `logits`; with
    (positions,) in their place where the request chose positions, and in a chunk.

    `missing` is True where there is no answer because the bridge is off; there are no tensors then. `composition` tells
    where the request stood in the teacher's forward, which the bits of the reply depend on; None in a chunk.
    """

    __slots__ = ("_loan", "_released", "_tensors", "composition", "missing", "sequence", "step")

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        sequence: int,
        step: int | None,
        composition: Composition | None,
        *,
        lent: bool = False,
    ) -> None:
        """`lent`: the tensors lie in a slot, to be given back with `forget`."""
        self._loan = Loan(tensors) if lent else None
        self._tensors = self._loan.tensors if self._loan else tensors
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

    def owned(self) -> Reply:
        """The same reply outside of any lease."""
        owned = {name: tensor.clone() if self._loan else tensor for name, tensor in self._tensors.items()}
        return Reply(owned, self.sequence, self.step, self.composition)

    def forget(self) -> list[str]:
        """The tensors are not to be read any more. Names of those that lie in a slot and are referred to all the same."""
        self._tensors = {}
        self._released = True
        return self._loan.still_used() if self._loan else []
