"""The walls of the house: which module may import which, and what the launcher must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shmbridge
from shmbridge import errors

FLOORS = [
    {"cuda_errors", "devices", "errors", "launch", "layout", "peer", "stacks"},
    {"schema"},
    {"overriding"},
    {"config", "batching", "trace", "model_path"},
    {"offer", "segment", "board"},
    {"doorbell", "ring", "heartbeat"},
    {"session"},
    {"owner", "payload", "head", "fingerprint", "stats", "cuda_ipc", "pinned", "publish", "stopwatch"},
    {"slots", "reply", "shared_head", "encode", "token_ids", "cuda_exchange", "cuda_reads"},
    {"host_plane", "cuda_plane"},
    {"combine", "parity", "planes", "cuda_probe"},
    {"stopping", "stuck", "rank_device"},
    {"requests"},
    {"streams", "probing", "pending"},
    {"collect", "prefetch", "offering"},
    {"bridge", "server"},
    {"disabled", "teacher"},
    {"connection", "teacher_job"},
]
THIRD_PARTY = ("transformers", "accelerate", "trl", "peft", "datasets", "lightning")
TRAINER = Path("shmbridge/integrations/transformers")  # the integration with transformers' Trainer


def imports(file: Path) -> set[str]:
    """What `file` imports anywhere of this project, torch and THIRD_PARTY, as `package.module` or `package.name`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    known = ("shmbridge", "launcher", "torch", *THIRD_PARTY)
    return {name for name in found if name.split(".")[0] in known}


def test_every_module_has_a_floor():
    assert {file.stem for file in Path("shmbridge").glob("*.py")} - {"__init__"} == set().union(*FLOORS)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_run_one_way(floor):
    above = {f"shmbridge.{name}" for names in FLOORS[floor:] for name in names} | {"launcher"}
    for name in FLOORS[floor]:
        wrong = imports(Path(f"shmbridge/{name}.py")) & above - {f"shmbridge.{name}"}
        assert not wrong, f"{name} imports {wrong}"


def test_losses_stand_alone():
    for file in Path("shmbridge/losses").glob("*.py"):
        others = {name for name in imports(file) if name.startswith("shmbridge.")}
        allowed = ("shmbridge.losses", "shmbridge.head", "shmbridge.errors")
        assert all(name.startswith(allowed) for name in others), f"{file} imports {others}"


def test_an_integration_outside_its_folder_imports_nothing_and_uses_what_the_process_has_imported():
    for file in Path("shmbridge/integrations").glob("*.py"):
        assert not imports(file), file


def test_the_trainers_integration_uses_what_a_user_may_use():
    public = {f"shmbridge.{name}" for name in (*shmbridge.__all__, "losses", "trace")}  # trace: the logger
    for file in TRAINER.rglob("*.py"):
        for name in imports(file):
            package, _, rest = name.partition(".")
            assert package in ("shmbridge", "torch", "transformers", "accelerate"), f"{file} imports {name}"
            own = name.startswith(("shmbridge.integrations.transformers", "shmbridge.losses."))
            assert package != "shmbridge" or not rest or own or name in public, f"{file} imports {name}"


def test_third_party_packages_are_imported_where_they_are_needed_alone():
    for package in ("shmbridge", "launcher"):
        for file in Path(package).rglob("*.py"):
            if TRAINER not in file.parents:
                found = imports(file)
                third = {name.split(".")[0] for name in found} & set(THIRD_PARTY)
                assert third == ({"transformers"} if file == Path("shmbridge/teacher.py") else set()), file
                assert not any(name.startswith("shmbridge.integrations.transformers") for name in found), file


def test_the_public_names_are_these():
    assert sorted(shmbridge.__all__) == shmbridge.__all__
    assert set(shmbridge.__all__) <= set(dir(shmbridge))
    for name in shmbridge.__all__ * 2:  # again: a module of the same name would now have taken its place
        assert getattr(shmbridge, name).__name__ == name
    assert [name for name in shmbridge.__all__ if not name.endswith(("Error", "Died", "Lost", "Full", "Closed"))] == [
        "Batch",
        "Bridge",
        "DeadlineExceeded",
        "Head",
        "Lease",
        "NotLaunched",
        "Pending",
        "Prefetch",
        "Reply",
        "RequestRefused",
        "RunStopped",
        "SessionInUse",
        "Stats",
        "TornReply",
        "connect",
    ]


def test_every_exception_is_exported():
    names = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert names <= set(shmbridge.__all__)


def test_dir_shows_the_lazy_names_without_importing_torch():
    look = "import sys, shmbridge; assert {'connect', 'Bridge', 'TornReply'} <= set(dir(shmbridge)); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", look]).returncode == 0
