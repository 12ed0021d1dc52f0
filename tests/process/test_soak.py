"""A short soak: ranks come and go, are killed and drop requests, under one teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import soak  # noqa: E402


@pytest.mark.parametrize(("requests", "each"), [pytest.param(4000, 250, marks=pytest.mark.slow), (800, 100)])
def test_nothing_grows_over_many_requests(requests, each, tmp_path):
    command = [sys.executable, "scripts/soak.py", "--requests", str(requests), "--each", str(each), "--idle-s", "0"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "soak.json")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every reply was right" in done.stdout
    samples = json.loads((tmp_path / "soak.json").read_text())["samples"]
    assert samples[-1]["requests"] >= requests
    assert len({sample["objects"] for sample in samples}) == 1


def test_what_grows_is_named():
    flat = soak.Sample(1, 1.0, 150 << 20, 20, 2, 100 << 20, 10, 1, 8, 4096)
    assert soak.verdict([flat] * 8) == []
    files = [replace(flat, teacher_files=20 + i) for i in range(8)]
    assert soak.verdict(files) == ["GROWS: teacher_files from 22 to 26"]
    memory = [replace(flat, owner_bytes=(100 + i) << 20) for i in range(8)]
    assert len(soak.verdict(memory)) == 1
