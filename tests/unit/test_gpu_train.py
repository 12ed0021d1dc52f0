"""scripts/gpu/train.py without a GPU: its layouts, verdicts and tables from made-up results, its commands, a run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu import distil, train  # noqa: E402

from tests.launcher import fake_gpus  # noqa: E402


def arm(step_s: float, loss: float, **more: float) -> dict[str, object]:
    return {"step_s": step_s, "tokens_per_s": 4096 / step_s, "losses": [2 * loss, loss], "rank_gib": 9.5, "cards_gib": [20.0, 31.5], **more}  # fmt: skip


def found(layout: train.Layout, ahead_s: float = 0.102, loss: float = 1.0) -> train.Found:
    """Teacher 80 ms, student 100 ms."""
    arms = {
        train.AHEAD: arm(ahead_s, loss, teacher_s=0.08, waited_share=0.01),
        "bridge, teacher not ahead": arm(0.12, 1.0),
        train.IN_PROCESS: arm(0.18, 1.0),
        train.ALONE: arm(0.1, 5.0),
    }
    return train.Found(layout, arms)


@pytest.mark.parametrize(
    ("ahead_s", "loss", "reached"),
    [
        (0.102, 1.0, [True, True]),
        (0.104, 1.0, [True, False]),
        (0.1, 1.03, [False, True]),
        (0.1, float("nan"), [False, True]),
    ],
)
def test_losses_are_judged_by_the_control_and_the_step_by_the_slower_side(ahead_s, loss, reached):
    apart = train.Layout("apart", teacher="1", train="0")
    assert [aim["reached"] for aim in train.targets([found(apart, ahead_s, loss)])] == reached


def test_the_step_is_not_judged_where_the_teacher_shares_a_card():
    for shared in (
        train.Layout("one card", "0", "0"),
        train.Layout("the second's", "1", "0,1"),
        train.Layout("CPU", "", ""),
    ):
        (losses,) = train.targets([found(shared, ahead_s=0.18)])
        assert losses["text"].startswith("losses")


def test_the_layouts_of_a_machine():
    shown = {
        count: [(each.teacher, each.train, each.backend) for each in train.layouts_of(count)] for count in (1, 2, 3, 8)
    }
    one, two = ("0", "0", "gloo"), ("2", "0,1", "nccl")
    assert shown == {
        1: [one],
        2: [one, ("1", "0", "gloo"), ("1", "0,1", "nccl")],
        3: [one, two],
        8: [one, two, ("7", "0,1,2,3,4,5,6", "nccl")],
    }


def test_the_table_of_a_distillation_has_every_figure():
    shown = train.markdown("Distillation (made up)", [found(train.Layout("apart", "1", "0"))])
    assert "apart. A step: teacher 80.0 ms, student 100.0 ms; with the teacher ahead a rank waits 1% of it." in shown
    assert "| bridge, teacher ahead | 102.0 ms | 40,157 | 1.02 | 9.50 GiB | 20.0, 31.5 GiB | 2.0000, 1.0000 |" in shown


def test_without_nvidia_smi_what_is_in_use_on_the_cards_is_not_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert distil.cards_gib() == []


def test_the_launcher_takes_the_commands_of_every_layout(tmp_path):
    """Its plan for eight cards of a made-up nvidia-smi, with models from configurations."""
    options = train.parse(["--models", "tiny", "--out", str(tmp_path), "--device", "cpu"])
    train.make(tmp_path, options)
    models = train.Models(tmp_path / "teacher", tmp_path / "student", tmp_path / "tokens.pt")
    variables = fake_gpus.nvidia_smi(tmp_path, fake_gpus.rows(8))
    *_, layout = train.layouts_of(8)
    for bridge in (True, False):
        python, m, module, *rest = train.command(layout, models, options, tmp_path / "out.json", bridge=bridge)
        done = subprocess.run(
            [python, m, module, "--dry-run", *rest],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "--nproc-per-node=7" in done.stdout.replace(" ", "=")
        assert ("shmbridge.teacher.main" in done.stdout) == bridge


@pytest.mark.slow
def test_the_distillation_runs_on_the_cpu(tmp_path):
    """Through the launcher: the bridge, then the controls; every arm has the same losses."""
    command = [
        sys.executable,
        "scripts/gpu/train.py",
        "--device",
        "cpu",
        "--steps",
        "4",
        "--warmup",
        "1",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "train.json").read_text())
    (layout,) = figures["layouts"]
    arms = layout["arms"]
    assert list(arms) == [train.AHEAD, "bridge, teacher not ahead", train.IN_PROCESS, train.ALONE]
    for name in list(arms)[:3]:
        assert arms[name]["losses"] == pytest.approx(arms[train.IN_PROCESS]["losses"], rel=1e-4)
    assert all(arm["tokens_per_s"] > 0 and arm["rank_gib"] > 0 for arm in arms.values())
    assert (tmp_path / "train.md").read_text() in done.stdout
