"""The fault table's own machinery, on its quickest rows; the whole table is `python scripts/faults.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import faults  # noqa: E402
from faultlines import rows  # noqa: E402
from faultlines.promises import ROWS  # noqa: E402
from faultlines.rows import Row, Stage  # noqa: E402
from faultlines.runs import until  # noqa: E402


@pytest.fixture(autouse=True)
def kept_directories(tmp_path, monkeypatch):
    """A row that does not hold keeps its directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_every_promise_has_its_row():
    assert list(ROWS) == list(range(1, 25))


def test_a_row_that_holds_is_exit_0_and_told_as_json(tmp_path, capfd):
    assert faults.main(["19", "--slack", "4", "--json", str(tmp_path / "faults.json")]) == 0
    told = json.loads((tmp_path / "faults.json").read_text())
    assert [(row["number"], row["holds"]) for row in told["rows"]] == [(19, True)]
    assert all(0 <= row["seconds"] <= row["limit_s"] for row in told["rows"])
    assert {"machine", "versions", "date", "load_at_start", "load_at_end"} <= set(told)
    out = capfd.readouterr().out
    assert "all hold" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_row_holds():
    assert faults.main(["--slack", "4"]) == 0


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (lambda stage: stage.took("the end", 3.0, 1.0), "the end took 3.00 s, promised within 1 s"),
        (lambda stage: stage.expect(False, "nobody is named"), "nobody is named"),
        (lambda stage: (stage.directory / "missing").read_text(), "FileNotFoundError"),
    ],
    ids=["late", "wrong", "broken"],
)
def test_a_row_that_does_not_hold_tells_what_was_seen(fails, told, monkeypatch, capfd):
    monkeypatch.setitem(ROWS, 18, Row(18, "a fault", "a promise", "1 s", fails, alone=True))
    assert faults.main(["18"]) == 1
    out = " ".join(capfd.readouterr().out.split())
    assert "NOT: " in out
    assert told in out
    assert "row 18 does not hold" in out


def test_what_waits_in_vain_is_ended_and_nothing_is_left():
    runs = []

    def play(stage: Stage) -> None:
        runs.append(stage.start([sys.executable, "-c", "import time; time.sleep(600)"]))
        until(lambda: False, "the moon", 0.2)

    result = rows.play(Row(1, "a fault", "a promise", "1 s", play, alone=True))
    assert not result.holds
    assert "the moon did not come" in result.wrong[0]
    assert runs[0].process.poll() is not None


def test_an_unknown_row_is_refused():
    done = subprocess.run(
        [sys.executable, "scripts/faults.py", "25"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "'25' is not a row of 1 to 24" in done.stderr
