"""Tensors that are lent: whether somebody still looks into their memory when they are taken back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]


class Loan:
    """Named tensors for a borrower, each with a storage of its own over the lender's memory: the storage lives as long as a
    variable, a view or an autograd graph refers to it."""

    __slots__ = ("_watched", "tensors")

    def __init__(self, lent: Mapping[str, torch.Tensor]) -> None:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                self.tensors = _aliases(lent)
        else:
            self.tensors = _aliases(lent)
        self._watched = [(name, StorageWeakRef(tensor.untyped_storage())) for name, tensor in self.tensors.items()]

    def still_used(self) -> list[str]:
        """Names of tensors that the borrower still refers to. Our own reference goes."""
        self.tensors = {}
        return [name for name, storage in self._watched if not storage.expired()]


def _aliases(lent: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: from_dlpack(to_dlpack(tensor)) for name, tensor in lent.items()}
