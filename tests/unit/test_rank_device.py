"""On which device a rank reads, and what it is told where that is another process's."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from shmbridge import config, log
from shmbridge.rank import device


def session(lane: int, gpus: str = "0-3", plane: object = None) -> SimpleNamespace:
    settings = config.load(overrides=["teacher.model=m", f"train.gpus={gpus}"])
    return SimpleNamespace(settings=settings, lane=SimpleNamespace(index=lane), plane=plane)


@pytest.mark.parametrize(
    ("lane", "gpus", "current", "visible", "plane", "warned"),
    [
        (2, "0-3", 2, 8, None, False),
        (2, "0-3", 0, 8, None, True),  # set_device was not called
        (0, "0-3", 5, 8, None, True),  # the teacher's
        (3, "0,1,0,1", 1, 2, None, False),
        (3, "0,1,0,1", 0, 2, None, True),
        (2, "0-3", 0, 1, None, False),  # the script hides the others
        (2, "0-3", 0, 8, "opened", False),
    ],
)
def test_a_rank_is_told_once_when_its_device_is_not_its_own(
    lane, gpus, current, visible, plane, warned, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(log.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert device.choose(session(lane, gpus, plane), None) == torch.device("cuda", current)
    told = [record.getMessage() for record in caplog.records]
    own = lane % len(set(config_gpus(gpus)))
    assert len(told) == warned
    assert all(f"torch.cuda.set_device({own})" in line and f"cuda:{current}" in line for line in told)


def config_gpus(text: str) -> list[str]:
    return ["0", "1", "2", "3"] if text == "0-3" else text.split(",")


def test_a_device_that_was_given_is_taken_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert device.choose(session(2), torch.device("cuda:3")) == torch.device("cuda:3")
    assert device.choose(session(2), torch.device("cpu")) == torch.device("cpu")
    assert not caplog.records
