"""The ready settings: they load, they can be planned, and what their comments count is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.console.text import size
from launcher.planning import jobs, memory
from launcher.planning.memory import SHM
from launcher.planning.model_card import ModelCard
from shmbridge import config
from tests.launcher.test_planning import MACHINE

CONFIGS = Path("configs")
LLAMA = ModelCard(128_256, 16 * 2**30, 4096, "bfloat16")
MIB = 2**20


def planned(name: str, *overrides: str) -> tuple[jobs.Plan, memory.MemoryPlan]:
    """The plan of a file, and its memory for a model of 128,256 words."""
    settings = config.load(str(CONFIGS / name), ["teacher.model=toy:build", *overrides])
    made = jobs.plan(settings, ("-m", "package.train"), MACHINE)
    settings = config.load(str(CONFIGS / name), ["teacher.model=m", *overrides])
    return made, memory.plan(settings, LLAMA, made.teachers, MACHINE, made.train_gpus)


def rows(counted: memory.MemoryPlan) -> dict[str, str]:
    return {item.what.split(":")[0]: size(item.nbytes) for item in counted.items if item.where == SHM}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_it_loads_and_replies_are_hidden_states(path):
    """They are exact, and a small part of the logits' size."""
    assert config.load(str(path)).payload.named == ("hidden",)


def test_eight_gpus():
    made, counted = planned("eight-gpus.yaml")
    assert (len(made.teachers), made.ranks) == (1, 7)
    assert (rows(counted)["replies"], rows(counted)["output head"]) == ("1.8 GiB", "1.0 GiB")
    _, logits = planned("eight-gpus.yaml", "payload={logits: {}}")
    assert rows(logits)["replies"] == "54.8 GiB"


def test_long_context():
    made, counted = planned("long-context.yaml")
    assert ([[gpu.number for gpu in own] for own in made.teachers], made.ranks) == ([[4], [5], [6], [7]], 4)
    assert rows(counted)["replies"] == "2.0 GiB"
    assert rows(counted)["output head"] == "1.0 GiB"
    requests = 4 * 2 * 32_768 * 18
    assert round(requests / MIB, 1) == 4.5
    assert requests < counted.items[1].nbytes < requests + MIB, "and 64 KiB or so of heads and records each"
    _, logits = planned("long-context.yaml", "payload={logits: {}}")
    assert rows(logits)["replies"] == "62.6 GiB"
    _, streamed = planned("long-context.yaml", "payload.stream={}")
    assert rows(streamed)["replies"] == "24.0 MiB"


def test_the_cpu():
    made, counted = planned("cpu.yaml")
    assert (made.teachers, made.ranks) == (((),), 2)
    assert made.config.ring.max_tokens >= 4 * 512, "a batch of scripts/example.py"
    assert rows(counted)["replies"] == "128 MiB"
