"""The benchmarks run, and every reply in them is the right one; what they find is for docs/benchmarks.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> str:
    """What bench.py prints."""
    done = subprocess.run(
        [sys.executable, "scripts/bench.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_overlap(tmp_path):
    found = bench("overlap", "--quick", "--json", str(tmp_path / "overlap.json"))
    figures = json.loads((tmp_path / "overlap.json").read_text())
    # 8 cases of 8 steps of 3 ranks; two are without a teacher
    assert "144 of 144 replies are the answer to their request" in found
    ways = [(case["way"], case["collect"]) for case in figures["cases"]]
    assert ways == [
        ("alone", "greedy"),
        ("exchange", "greedy"),
        ("submit", "greedy"),
        ("prefetch", "greedy"),
        ("prefetch", "lockstep"),
        ("alone", "greedy"),
        ("prefetch", "greedy"),
        ("prefetch", "lockstep"),
    ]
    assert all(turn["step_s"] > 0 for case in figures["cases"] for turn in case["turns"])
    for title in ("the step, by the teacher's time t", "ranks that ask up to so much apart", "targets"):
        assert title in found


@pytest.mark.slow
def test_trainer(tmp_path):
    found = bench("trainer", "--quick", "--json", str(tmp_path / "trainer.json"))
    cases = json.loads((tmp_path / "trainer.json").read_text())["cases"]
    assert [(case["depth"], case["accumulation"]) for case in cases] == [(0, 1), (0, 4), *[(1, 1)] * 3, *[(1, 4)] * 3]
    for case in cases:
        assert min(case["steps_s"]) >= case["accumulation"] * case["student_ms"] / 1000
    assert "x host" in found


@pytest.mark.slow
def test_replicas(tmp_path):
    found = bench("replicas", "--quick", "--json", str(tmp_path / "replicas.json"))
    figures = json.loads((tmp_path / "replicas.json").read_text())
    # 7 steps of each case: 3 ways, 1 and 2 replicas, 4 and 3 ranks; nobody runs freely where the lanes are uneven
    replies = 7 * (4 * 6 + 3 * 5)
    assert f"{replies} of {replies} replies are the answer to their request" in found
    lanes = {(case["ranks"], case["way"], case["replicas"]) for case in figures["cases"]}
    assert lanes == {(r, way, n) for r in (4, 3) for way in ("exchange", "free", "prefetch") for n in (1, 2)} - {
        (3, "free", 2)
    }
    assert "2+1" in found
    assert "throughput of the whole group" in found


@pytest.mark.slow
def test_roundtrip_measures_this_bridge():
    found = bench("roundtrip", "--quick", "--sizes", "1KB", "--placement", "same", "--requests", "20")
    assert "failed: shmbridge" not in found
    assert "shmbridge exchange" in found
