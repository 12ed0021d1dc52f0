"""Everything in this folder has the marker `gpu`, and is skipped where torch finds no CUDA device.

The process of pytest itself never touches a GPU: teachers and ranks are started as processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.session import Session

HERE = Path(__file__).parent


def reason(count: int) -> str | None:
    """Why tests that need `count` GPUs cannot run here."""
    if not torch.cuda.is_available():
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return f"needs a GPU: torch.cuda.is_available() is False ({build}, torch {torch.__version__})"
    found = torch.cuda.device_count()
    return None if found >= count else f"needs {count} GPUs, there is {found}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        several = item.get_closest_marker("gpus")
        why = reason(several.args[0] if several else 1)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(shape).save_pretrained(directory)
    return directory


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Session] | object]:
    """start(lanes, *overrides): a session; its processes end with the test."""
    made: list[Session] = []

    def begin(lanes: int, *overrides: str) -> Session:
        made.append(Session(lanes, *overrides, log=tmp_path))
        return made[-1]

    yield begin
    for session in made:
        session.close()
