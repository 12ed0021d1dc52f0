"""The loops of docs/hosts/: with the bridge each of them trains as a control that computes the teacher's logits itself."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from tests.process.test_host import finish

LOOPS = ("fabric", "nanochat", "torchtitan")


@pytest.mark.parametrize(
    ("depth", "loops"),
    [
        (1, LOOPS),
        pytest.param(2, (*LOOPS, "lightning"), marks=pytest.mark.matrix),
    ],
)
def test_each_trainers_loop_trains_as_its_control(tmp_path, depth, loops):
    """Rows and losses of every micro-step of two ranks, to the last bit; torchtitan's takes three batches before the first forward."""
    if not find_spec("lightning"):
        loops = [name for name in loops if name not in ("fabric", "lightning")]
    finish(
        tmp_path,
        *("--teacher", "teachers:build", "payload.logits={dtype: float32}", f"ring.depth={depth}"),
        *("--", "trainers.py", str(tmp_path), *loops),
    )
    for rank in range(2):
        told = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert sorted(told) == sorted(loops)
        for name, (control, found) in told.items():
            assert len(control) >= 6
            assert found == control, f"{name}, rank {rank}"
