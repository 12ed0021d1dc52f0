"""Tests of what a reply carries run over every plane; the CUDA plane over a stand-in for the GPU.

`make test` runs all of them over the host plane, and over the other planes those that are marked `every_plane`.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests import harness
from tests.fake_cuda import FakeCuda

PLANES = {
    "host": [],
    "cuda": ["plane=cuda_ipc"],
    "cuda-in-place": ["plane=cuda_ipc", "cuda.read=in_place"],
}
OVER_EVERY_PLANE = ("test_payload", "test_stream", "test_bridge", "test_restarts", "test_connect")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in OVER_EVERY_PLANE:
        metafunc.fixturenames.append("plane")
        metafunc.parametrize("plane", planes_of(metafunc.definition), indirect=True)


def planes_of(test: pytest.Function) -> list[Any]:
    if test.get_closest_marker("one_plane"):
        return ["host"]
    marks = [] if test.get_closest_marker("every_plane") else [pytest.mark.matrix]
    return ["host", *(pytest.param(name, marks=marks) for name in PLANES if name != "host")]


@pytest.fixture
def plane(request, monkeypatch) -> str:
    """The plane of every bench in the test."""
    name: str = request.param
    monkeypatch.setattr(harness, "PLANE", PLANES[name])
    if name != "host":
        FakeCuda().install(monkeypatch)
    return name
