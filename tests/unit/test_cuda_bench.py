"""`bench.py cuda` without a GPU: refusals, tables and verdicts from made-up results."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import cuda  # noqa: E402
from benchmarks.cuda import Calls, Copy, Reading, Results  # noqa: E402
from benchmarks.tables import Facts  # noqa: E402

MIB = 2**20


def results(**changed: object) -> Results:
    made = {
        "copies": [Copy(MIB, 4e-5, 2e-5), Copy(256 * MIB, 1.02e-3, 1e-3)],
        "calls": Calls(cpu_us=23.3, bridge_us=90.0, call_us=40.0),
        "readings": [Reading(MIB, 1, 3e-5, 2e-5), Reading(MIB, 3, 4e-5, 6e-5)],
    }
    return Results(**{**made, **changed})


def test_the_largest_copy_and_the_cpu_time_are_judged():
    copy, cpu = results().targets()
    assert (copy.found, copy.reached) == ("0.980 (256 MB)", True)
    assert (cpu.found, cpu.reached) == ("23.3 us", True)
    slow = results(copies=[Copy(256 * MIB, 1.04e-3, 1e-3)], calls=Calls(31.0, 1.0, 1.0)).targets()
    assert [target.reached for target in slow] == [False, False]
    assert [target.reached for target in Results().targets()] == [None, None]


def test_every_figure_is_in_the_tables_and_in_the_json(tmp_path, capsys):
    gpus = {"teacher on": "H100 (0)", "rank on": "H100 (1)", "driver": "999.1", "CUDA": "13.0"}
    cuda.show(results(), Facts.now(), gpus, argparse.Namespace(json=tmp_path / "cuda.json"))
    printed = capsys.readouterr().out
    for text in (
        *("H100 (1)", "driver 999.1", "268 GB/s", "0.980", "50.0 us", "23.3 us"),
        *("in_place", "copy", "40 us", "60 us", "reached"),
    ):
        assert text in printed, text
    tree = json.loads((tmp_path / "cuda.json").read_text())
    assert tree["benchmark"] == "cuda"
    assert tree["gpus"] == gpus
    assert tree["calls"]["cpu_us"] == 23.3
    assert [target["reached"] for target in tree["targets"]] == [True, True]


def test_what_was_not_measured_has_no_table():
    assert list(Results().shown()) == []


@pytest.mark.matrix
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_nvidia_smi_the_driver_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: "NVIDIA H100")
    assert cuda.gpus_of(argparse.Namespace(teacher=1, rank=0))["driver"] == "unknown"


def test_without_cuda_it_says_so_and_exits_2():
    command = [sys.executable, "scripts/bench.py", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert len((done.stdout + done.stderr).strip().splitlines()) == 1
    assert "torch.cuda.is_available() is False" in done.stdout + done.stderr
