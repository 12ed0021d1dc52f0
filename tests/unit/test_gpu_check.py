"""scripts/gpu_check.sh without a GPU: its runner over stages that are stand-ins, its verdicts, and the block of Markdown."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu import check, ipc  # noqa: E402
from gpu.check import STAGES, Stage, Where  # noqa: E402

from tests.fake_cuda import FakeCuda  # noqa: E402

WHERE = Where(["NVIDIA H100", "NVIDIA H100"], "999.1", {"Python": "3.12.1", "torch": "2.13.0"}, "0123456789ab")
REPORT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_one_gpu" name="test_a[copy]"/>
<testcase classname="tests.gpu.test_one_gpu" name="test_a[host]">{first}</testcase>
<testcase classname="tests.gpu.test_launched" name="test_b">{second}</testcase>
</testsuite></testsuites>"""
SECOND_CARD = '<skipped message="needs 2 GPUs, there is 1"/>'


def stage(name: str, code: str, limit_s: float = 60.0) -> Stage:
    """A stage that runs `code` in {out} and tells on a file how often it ran."""
    counted = f"open(r'{{out}}/{name}.ran', 'a').write('x')\n{code}"
    return Stage(name, f"stub {name}", ("{python}", "-c", counted), limit_s)


def ran(out: Path, name: str) -> int:
    file = out / f"{name}.ran"
    return len(file.read_text()) if file.exists() else 0


def go(out: Path, stages: list[Stage], *arguments: str, where: Where = WHERE) -> int:
    return check.main(["--out", str(out), *arguments], stages, lambda: where)


def test_a_stage_that_passed_does_not_run_again_unless_it_is_asked_for(tmp_path, capsys):
    broken = stage("b", "import os, sys; sys.exit(not os.path.exists(r'{out}/mended'))")
    stages = [stage("a", "pass"), broken, stage("c", "pass")]
    assert go(tmp_path, stages, "a", "b") == 1
    assert [ran(tmp_path, name) for name in "abc"] == [1, 1, 0]
    shown = capsys.readouterr().out
    rows = [line.split(" | ")[:2] for line in shown.splitlines() if line.startswith("| ")]
    assert rows[-3:] == [["| a", "passed"], ["| b", "failed"], ["| c", "not run"]]
    (tmp_path / "mended").touch()
    assert go(tmp_path, stages) == 0
    assert [ran(tmp_path, name) for name in "abc"] == [1, 2, 1]
    assert go(tmp_path, stages, "--again", "a") == 0
    assert [ran(tmp_path, name) for name in "abc"] == [2, 2, 1]


def test_a_name_in_dev_shm_may_go_while_they_are_listed(monkeypatch):
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [*real(path), "gone-meanwhile"])
    assert "gone-meanwhile" not in check._shared_memory()


def test_a_result_counts_for_its_code_and_machine_alone(tmp_path):
    stages = [stage("a", "pass")]
    for where in (WHERE, Where(WHERE.cards, "999.2", WHERE.versions, WHERE.code)):
        assert go(tmp_path, stages, where=where) == 0
    assert ran(tmp_path, "a") == 2


def test_a_stage_that_takes_too_long_is_ended_with_all_its_processes_and_the_next_one_runs(tmp_path, capsys):
    child = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    began = time.monotonic()
    assert go(tmp_path, [stage("slow", child, limit_s=1), stage("next", "pass")]) == 1
    assert time.monotonic() - began < check.GRACE_S
    pid = int(next(line for line in (tmp_path / "slow.log").read_text().splitlines() if line.isdecimal()))
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z", "it runs still"
    shown = capsys.readouterr().out
    assert "timed out" in shown
    assert "longer than 1 s" in shown
    assert ran(tmp_path, "next") == 1


def test_a_failed_stage_shows_the_end_of_its_log(tmp_path, capsys):
    assert go(tmp_path, [stage("a", "raise RuntimeError('this and that')")]) == 1
    assert "RuntimeError: this and that" in capsys.readouterr().out


def test_what_a_stage_leaves_in_shared_memory_is_told(tmp_path, capsys):
    name = f"gpu-check-test-{os.getpid()}"
    assert go(tmp_path, [stage("a", f"open('/dev/shm/{name}', 'w')")]) == 0
    os.unlink(f"/dev/shm/{name}")
    assert f"new in /dev/shm: {name}" in capsys.readouterr().out


# Verdicts


@pytest.mark.parametrize(
    ("first", "second", "code", "result"),
    [
        ("", "", 0, "passed"),
        ("", SECOND_CARD, 0, "passed"),
        ("", '<skipped message="something else"/>', 0, "failed"),
        ('<failure message="wrong"/>', "", 1, "failed"),
        ("", '<error message="setup"/>', 1, "failed"),
    ],
)
def test_every_test_must_pass_but_those_that_need_a_second_card(first, second, code, result, tmp_path):
    tested = Stage("t", "tests", ("pytest", "--junitxml", "t.xml"))
    assert check.judge(tmp_path, tested, 0)[0] == "failed", "there is no report"
    (tmp_path / "t.xml").write_text(REPORT.format(first=first, second=second))
    found = check.judge(tmp_path, tested, code)
    assert found[0] == result
    if first.startswith("<failure"):
        assert any("1 failed: test_a[host]" in line for line in found[1])


@pytest.mark.parametrize(
    ("reached", "code", "result"),
    [
        (True, 0, "passed"),
        (False, 1, "target missed"),
        (None, 1, "target missed"),
        (True, 1, "failed"),
        (False, -9, "failed"),
    ],
)
def test_a_missed_target_is_told_from_a_failure(reached, code, result, tmp_path):
    target = {"text": "CPU time", "limit": "30 us", "found": "33.3 us", "reached": reached}
    (tmp_path / "bench.json").write_text(json.dumps({"targets": [target]}))
    found = check.judge(tmp_path, Stage("bench", "", ()), code)
    assert found[0] == result
    assert any("CPU time: 33.3 us" in line for line in found[1])


# The record


def test_the_markdown_says_date_cards_driver_versions_commands_and_results(tmp_path, capsys):
    train = stage("train", "open(r'{out}/train.md', 'w').write('| step |\\n|---|\\n| 11 ms |\\n'); print('a|b')")
    assert go(tmp_path, [train, stage("later", "pass")], "train") == 0
    text = (tmp_path / "record.md").read_text()
    assert str(tmp_path / "record.md") in capsys.readouterr().out
    heading, *lines = text.splitlines()
    assert heading.startswith("### 20")
    assert heading.endswith(": 2 x NVIDIA H100")
    assert "| driver | 999.1 |" in lines
    assert "| versions | Python 3.12.1, torch 2.13.0 |" in lines
    assert any(line.startswith("| train | passed | ") and "`python -c" in line for line in lines)
    assert "| later | not run |  |  |  |" in lines
    assert text.endswith("| step |\n|---|\n| 11 ms |\n")
    assert str(tmp_path) not in text
    assert sys.executable not in text


# The real stages


@pytest.mark.parametrize("memory", ["right", "stale"])
def test_the_program_of_stage_ipc_over_a_stand_in(memory, tmp_path, monkeypatch, capsys):
    """Its processes, pipes and verdicts; of CUDA itself nothing is shown here."""
    fake = FakeCuda()
    if memory == "stale":
        fake.open_memory = lambda handle, device: torch.full((8,), ipc.BEFORE, dtype=torch.uint8)
    monkeypatch.setattr(ipc, "cuda_ipc", fake)
    monkeypatch.setattr(ipc, "START", "fork")
    monkeypatch.setattr(ipc, "NBYTES", 2**16)
    for name in ("set_device", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    assert ipc.main(["--json", str(tmp_path / "ipc.json")]) == (memory == "stale")
    found = json.loads((tmp_path / "ipc.json").read_text())["found"]
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(shown) == ["pending", "finished", "killed", "gone"]
    assert [line.partition(": ")[2] for line in found] == list(shown.values())
    if memory == "right":
        assert all(shown[case].startswith("came, right") for case in ("pending", "finished", "killed"))
        assert shown["gone"].startswith("CUDA error")
    else:
        assert shown["pending"].startswith("came, wrong: the copy holds 7;")


def test_each_test_of_tests_gpu_is_in_one_stage_and_each_stage_of_tests_has_some():
    """By pytest's own reading of -k, over the names in the files."""
    from _pytest.mark.expression import Expression

    chosen = {stage.name: Expression.compile(stage.command[-1]) for stage in STAGES if "-k" in stage.command}
    counts = dict.fromkeys(chosen, 0)
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names = (file.name, node.name)
                found = [
                    each
                    for each, expression in chosen.items()
                    if expression.evaluate(lambda part: any(part in n for n in names))  # noqa: B023
                ]
                assert len(found) == 1, (node.name, found)
                counts[found[0]] += 1
    assert list(counts) == ["protocol", "deaths", "rest"]
    assert all(counts.values())


def test_files_that_stages_name_exist():
    for each in STAGES:
        for part in each.command:
            if part.startswith(("scripts/", "tests/")):
                assert (ROOT / part).exists(), part


@pytest.mark.matrix
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_and_exits_2(tmp_path):
    variables = os.environ | {"PYTHON": sys.executable}
    command = ["scripts/gpu_check.sh", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert len((done.stdout + done.stderr).strip().splitlines()) == 1
    assert "torch.cuda.is_available() is False" in done.stderr
    assert not (tmp_path / "out").exists()
