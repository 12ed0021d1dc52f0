"""The launcher starts fast and survives its jobs: no module of it loads what computes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher

HOUSE = Path(launcher.__file__).parent
FILES = {
    ".".join(("launcher", *file.relative_to(HOUSE).with_suffix("").parts)): file
    for file in sorted(HOUSE.rglob("*.py"))
    if not file.stem.startswith("__")
}
MODULES = list(FILES)
HEAVY = ("torch", "numpy", "transformers", "safetensors", "accelerate", "gguf", "huggingface_hub", "rich")
TORCH_FREE = {
    *("errors", "layout", "config", "offer", "segment", "peer", "board", "doorbell", "ring", "session", "owner"),
    *("stacks", "launch", "schema", "model_path", "__version__"),
    *("cuda_probe", "devices"),  # import torch where they run, in processes of their own
}


def test_no_module_loads_anything_heavy():
    """One process imports them all, in turn, and tells after which one something heavy is there."""
    code = f"""
import importlib, sys
for module in {MODULES}:
    importlib.import_module(module)
    heavy = [name for name in {HEAVY} if name in sys.modules]
    if heavy:
        sys.exit(f"{{module}} loads {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_the_torch_free_half_alone(module):
    names = set(imported(ast.parse(FILES[module].read_text())))
    of_shmbridge = {name.split(".")[1] for name in names if name.startswith("shmbridge.")}
    assert "shmbridge" not in names
    assert of_shmbridge <= TORCH_FREE
    if module != "launcher.elastic":  # runs in the training job's own process
        assert not {name.split(".")[0] for name in names} & {"torch", "numpy", "transformers"}


def imported(tree: ast.Module) -> Iterator[str]:
    """`package.module` of every import, wherever it stands; of `from shmbridge import x` both parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0
            joined = node.module == "shmbridge"
            yield from (f"shmbridge.{alias.name}" for alias in node.names) if joined else [node.module]
