"""What several tests of the launcher stand on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.kept import Kept, keeping


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Iterator[Kept]:
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    with keeping(tmp_path) as one:
        yield one


@pytest.fixture
def gate(kept) -> Path:
    """A fifo; who reads it waits until the test writes."""
    path = kept.directory / "gate"
    os.mkfifo(path)
    return path
