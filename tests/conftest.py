"""Every test leaves /dev/shm as it found it, and computes on one thread so that forked children may compute too."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shmbridge.shm import owner
from tests.promise import Promise

torch.set_num_threads(1)
# For children that import the launcher's modules: an installation gives the name `launcher` to nobody.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
)
# Children inherit what is ignored: SIGHUP under nohup, SIGINT where a shell's script has put the tests into the background.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "only the tests that keep this promise of docs/reliability.md; may be given several times"
    parser.addoption("--promise", type=int, action="append", default=[], metavar="ROW", help=told)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted, others = config.getoption("promise"), []
    for item in items:
        mark = item.get_closest_marker("promise")
        if mark:
            item.user_properties.append(("row", mark.args[0]))
        if wanted and not (mark and mark.args[0] in wanted):
            others.append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No session that this process owned outlives its test; other workers' sessions are none of its business."""
    owned: list[str] = []
    start = owner.Owner.start_generation

    def remember(self: owner.Owner, *lanes: int | None) -> owner.Token:
        owned.append(self.session_id)
        return start(self, *lanes)

    monkeypatch.setattr(owner.Owner, "start_generation", remember)
    yield
    left = set(owned) & set(owner.objects())
    assert not left, f"left in /dev/shm: {left}"


@pytest.fixture
def promise(request: pytest.FixtureRequest) -> Promise:
    """Reports what the test saw of the promise that its mark names."""
    return Promise(request.node)
