"""The output head of a language model as data, which can be sent, sharded or cut into rows. It turns hidden states into
logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Head:
    """The last layer: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    weight: (vocab, dim), any float dtype; may be a DTensor.
    bias: (vocab,), or None.
    softcap: bounds the logits to +-softcap (final_logit_softcapping of Gemma 2), or None.
    scale: multiplied onto the logits before the softcap (logit_scale of Cohere; 1 / logits_scaling of Granite).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab) of `hidden` (..., dim), in hidden's dtype, on the weight's device.

        With neither scale nor softcap the bits are those of nn.Linear.
        """
        hidden = hidden.to(self.weight.device)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = F.linear(hidden, self.weight.to(hidden.dtype), bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def first(self, words: int) -> Head:
        """The head of the first `words` words. It shares this head's memory."""
        return replace(self, weight=self.weight[:words], bias=None if self.bias is None else self.bias[:words])
