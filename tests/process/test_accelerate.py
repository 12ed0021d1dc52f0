"""bridge.prefetch over loaders that accelerate prepared: the loop sees what it would see without prefetch."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from accelerate import Accelerator, skip_first_batches
from accelerate.state import GradientState
from torch.utils.data import DataLoader
from tqdm import tqdm

from tests.harness import Echo, bench
from tests.process.test_host import finish
from tests.process.test_prefetch import batches

STRONG: dict[str, dict[str, Any]] = {
    "sharded": {"accumulate": 2, "dispatch": False, "rows": 13, "evaluation": "exchange"},
    "dispatched": {"accumulate": 4, "dispatch": True, "rows": 13, "evaluation": "prefetch"},
    "lopsided": {"accumulate": 2, "dispatch": True, "rows": 38, "evaluation": "", "lopsided": True},
}
MATRIX: dict[str, dict[str, Any]] = {
    str(case): dict(zip(("accumulate", "dispatch", "rows", "evaluation"), case, strict=True))
    for case in itertools.product((1, 2, 4), (False, True), (3, 13, 40), ("", "exchange", "prefetch"))
}


@pytest.mark.parametrize("cases", [STRONG, pytest.param(MATRIX, marks=pytest.mark.matrix)], ids=["strong", "matrix"])
def test_two_ranks_train_and_evaluate_as_without_prefetch(tmp_path, cases):
    """Under the launcher: sync flags, learning rates, losses and gathered rows of every micro-step, over two epochs."""
    finish(
        tmp_path,
        *("--teacher", "teachers:build", "payload.logits={dtype: float32}", "ring.depth=4"),
        *("--", "accelerated.py", str(tmp_path), json.dumps(cases)),
    )
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        for name in cases:
            control, ahead = found[name]
            assert ahead == control, f"rank {rank}, {name}"
        assert found["refused"] == [[0, 1, 2, 3], [4, 5, 6, 7], *(["a bad row"] if rank else [])]


class Stateful(DataLoader):
    """As torchdata's StatefulDataLoader: tells how many batches it has given."""

    given = 0

    def __iter__(self):
        for self.given, batch in enumerate(super().__iter__(), 1):
            yield batch

    def state_dict(self):
        return {"given": self.given}


def begun(loader: Any) -> Iterable[Any]:
    iterator = iter(loader)
    next(iterator)
    return iterator


SOURCES: dict[str, Callable[[Any], Iterable[Any]]] = {
    "a loader": lambda loader: loader,
    "a progress bar": lambda loader: tqdm(loader, file=open(os.devnull, "w")),  # noqa: SIM115
    "a generator over three epochs": lambda loader: (batch for _ in range(3) for batch in loader),
    "a generator that stops early": lambda loader: itertools.islice(loader, 3),
    "an iterator that has begun": begun,
    "skip_first_batches": lambda loader: skip_first_batches(loader, 2),
}


def test_one_rank_sees_the_loaders_state_as_without_prefetch():
    """Sources that the loader is found behind, loops that break, evaluations inside, and where a checkpoint would resume."""

    def body(bridge):
        accelerator = Accelerator(cpu=True)

        def prepared(rows: int) -> Any:
            loader = accelerator.prepare(DataLoader(batches(1, rows)[0], batch_size=2))
            loader.base_dataloader.__class__ = Stateful
            return loader

        def tell(ahead: bool, rows: int, source: Callable[[Any], Iterable[Any]], breaks_at: int | None) -> list[Any]:
            GradientState._reset_state()
            loader, held_out = prepared(rows), prepared(3)
            state, told = GradientState(), []

            def see(what: Any) -> None:
                of_loop = state.end_of_dataloader, state.remainder
                own = loader.end_of_dataloader, loader.remainder, getattr(loader, "dl_state_dict", None)
                told.append((what, state.active_dataloader is loader, of_loop, own))

            def over(batches: Iterable[Any]) -> Iterable[Any]:
                if not ahead:
                    return batches
                pairs = bridge.prefetch(batches)
                return (pending.cancel() or batch for batch, pending in pairs)

            for _ in range(2):
                for place, batch in enumerate(over(source(loader))):
                    see(batch.tolist())
                    if place % 2:
                        for other in over(held_out):
                            see(other.tolist())
                        for other in over(batches(3)):
                            see(other.tolist())
                    see("evaluated")
                    if place == breaks_at:
                        break
                see("after")
            return told

        for name, source in SOURCES.items():
            for rows, breaks_at in itertools.product((1, 2, 9), (None, 1, 3)):
                wanted = tell(False, rows, source, breaks_at)
                assert tell(True, rows, source, breaks_at) == wanted, f"{name}, {rows} rows, break at {breaks_at}"

    with bench(1, "ring.depth=3") as it:
        it.teacher(Echo())
        assert it.rank(0, body).join() == 0
