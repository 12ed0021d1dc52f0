"""The promises of docs/reliability.md and the tests that keep them; scripts/faults.py, which prints what they saw."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import faults  # noqa: E402

PROMISES = faults.promises()


def marked() -> Iterator[tuple[ast.FunctionDef, ast.Call]]:
    """Every test with a mark `promise`, its own or of one of its cases."""
    for file in (ROOT / "tests").rglob("test_*.py"):
        for test in ast.walk(ast.parse(file.read_text())):
            if isinstance(test, ast.FunctionDef):
                for node in (node for decorator in test.decorator_list for node in ast.walk(decorator)):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.promise":
                        yield test, node


def test_every_promise_has_a_test_that_reports_it_and_every_mark_a_promise():
    limits: dict[int, set[str | None]] = {}
    for test, mark in marked():
        assert "promise" in {argument.arg for argument in test.args.args}, f"{test.name} reports nothing"
        (row,) = map(ast.literal_eval, mark.args)
        within = {keyword.arg: ast.literal_eval(keyword.value) for keyword in mark.keywords}.get("within")
        assert row in PROMISES, f"{test.name} names {row}"
        assert within in (None, PROMISES[row].within), f"{test.name} is within {within}"
        limits.setdefault(row, set()).add(within)
    assert sorted(limits) == sorted(PROMISES)
    timed = {number for number, row in PROMISES.items() if row.within.endswith(" s")}
    assert {row for row, found in limits.items() if found != {None}} == timed


TESTS = """
import pytest
@pytest.mark.promise(1, within="1 s")
def test_kept(promise):
    promise.kept("its traceback", 0.5, exit_code=1)
@pytest.mark.promise(3, within="D+2 s", D=4)
def test_late(promise):
    promise.kept("named", 7.0)
@pytest.mark.promise(3, within="D+2 s", D=4)
def test_far_too_late(promise):
    promise.kept("named", 25.0)
@pytest.mark.promise(4)
def test_broken(promise):
    assert False, "nobody is named"
@pytest.mark.promise(5)
def test_silent(promise):
    pass
"""


@pytest.fixture
def broken(tmp_path, monkeypatch) -> Path:
    """Tests of which some do not keep their promise."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *")
    (tmp_path / f"test_{tmp_path.name}.py").write_text(TESTS)  # a name of its own: pytest imports it into this process
    monkeypatch.setattr(faults, "TESTS", tmp_path)
    return tmp_path


def test_rows_that_do_not_hold_are_told_and_make_the_exit_code_1(broken, capsys):
    assert faults.main(["1", "3", "4", "5", "--jobs", "1", "--json", str(broken / "faults.json")]) == 1
    told = {row["number"]: row for row in json.loads((broken / "faults.json").read_text())["rows"]}
    assert {number: row["holds"] for number, row in told.items()} == {1: True, 3: False, 4: False, 5: False}
    assert told[1]["seen"] == [{"text": "its traceback", "took_s": 0.5, "limit_s": 1.0, "exit_code": 1}]
    late, far_too_late = told[3]["wrong"]
    assert late == "named: 7.00 s, promised within 6 s"
    assert "25.00 s, promised within 6 s" in far_too_late
    assert "nobody is named" in told[4]["wrong"][0]
    out = capsys.readouterr().out
    table = out[out.index("faults  ") :]
    assert "3, 4, 5 did not hold" in table
    assert max(map(len, table.splitlines())) <= 120


def test_a_row_that_holds_is_exit_0_and_slack_is_for_slow_machines(broken):
    assert faults.main(["1", "--jobs", "1"]) == 0
    rows = faults.promises()
    faults.run({3: rows[3]}, slack=4, jobs=1)
    assert len(rows[3].wrong) == 1, "the test itself fails what is four times too late"


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        faults.main(["25"])
    assert "25 is not a row of 1 to 24" in capsys.readouterr().err
