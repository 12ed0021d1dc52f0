"""The student's side of the loss, computed in place of its output head.

The loss needs the student's hidden states and its head, but not the logits of all tokens at once. It is computed inside
the forward of the wrapped model, where DDP finds the head's weight in the graph of the outputs and FSDP has gathered
it. In the model's outputs the loss is in the place of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shmbridge.losses import Head, LazyLogits

_PROBE_TOKENS = 8


class StudentHead:
    """The output head of a causal language model, which a loss may replace for one forward."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module

    @contextmanager
    def replaced_by(self, compute: Callable[[LazyLogits], Tensor]) -> Iterator[None]:
        """In the block, the head's forward gives compute(hidden states under the head) with three axes of length 1.

        Args:
            compute: from LazyLogits of hidden states (batch, seq, width) to a scalar.
        """
        module = self._module

        def forward(hidden: Tensor) -> Tensor:
            return compute(LazyLogits(hidden, Head(module.weight, module.bias))).reshape(1, 1, 1)

        own = vars(module).get("forward")  # of another library that replaces it
        vars(module)["forward"] = forward
        try:
            yield
        finally:
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The output head of a transformers model; None if it has none, or if the model is of another library."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None


def find_head(model: nn.Module) -> StudentHead | None:
    """The head of `model`, or None if its logits are not exactly the head applied to the hidden states, for example
    because they are scaled or capped, or the head has an adapter. It is tried on a few tokens if the weights are on
    this rank."""
    module = output_embeddings(model)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return None
    head = StudentHead(module)
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors) or type(module.weight.data) is not Tensor:
        return head  # sharded, or to be loaded later
    return head if _is_exact(model, module, head) else None


def _is_exact(model: nn.Module, module: nn.Linear, head: StudentHead) -> bool:
    seen: list[LazyLogits] = []

    def note(lazy: LazyLogits) -> Tensor:
        seen.append(lazy)
        return lazy.hidden.new_zeros(())

    ids = torch.arange(_PROBE_TOKENS, device=module.weight.device).remainder(module.weight.shape[0])[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = _logits(model, ids)
            with head.replaced_by(note):
                _logits(model, ids)
    finally:
        model.train(training)
    if len(seen) != 1 or seen[0].hidden.shape[:2] != ids.shape:
        return False
    return torch.allclose(seen[0].head(seen[0].hidden).to(logits.dtype), logits, rtol=1e-3, atol=1e-3)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    outputs: Any = model(input_ids=ids)
    found: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return found
