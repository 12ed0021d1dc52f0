"""The rules of the house: which folder may import which, what the launcher must not load, and what is public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import shmbridge
from shmbridge import errors

# What each folder of shmbridge, or module beside them, may import of shmbridge.
_SHARED = {"errors", "config", "log", "output_spec"}
ROOMS: dict[str, set[str]] = {
    **{name: set() for name in ("errors", "launch", "log", "head")},
    "model_path": {"errors"},
    "config": {"errors", "launch"},
    "output_spec": {"errors", "config"},
    "fingerprint": {"output_spec"},
    "shm": _SHARED,
    "plane": {*_SHARED, "head", "shm"},
    "teacher": {*_SHARED, "head", "shm", "plane", "fingerprint", "model_path"},
    "rank": {*_SHARED, "head", "shm", "plane", "fingerprint"},
    "losses": {"errors", "head"},
    "integrations": {"losses", "log"},  # and the public names
}
# The launcher's folders, and its modules beside them. Each may import what stands before it.
FLOORS = (
    *("exit_codes", "registry", "console", "planning", "process", "hang", "sessions", "doctor", "supervisor", "keeper"),
    *("cli", "__main__"),
)
TORCH_FREE = {"errors", "launch", "model_path", "config", "log", "output_spec", "shm"}
EXCEPTIONS = {
    (
        "shmbridge.rank.prefetch",
        "shmbridge.integrations.accelerate",
    ): "imports nothing; knows the loaders of accelerate",
    **{
        (module, f"shmbridge.plane.{name}"): "imports torch where it runs, in a process of its own"
        for module, name in (
            ("launcher.planning.gpus", "devices"),
            ("launcher.doctor.gpu", "devices"),
            ("launcher.process.cuda_ipc_trial", "cuda_ipc_probe"),
        )
    },
}
# The only places that import a package.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "torch": ("shmbridge", "launcher.process.elastic"),  # which runs in the training job's own process
    "numpy": ("shmbridge",),
    "transformers": ("shmbridge.teacher.huggingface", "shmbridge.integrations.transformers"),
    "huggingface_hub": ("shmbridge.model_path",),
    "posix_ipc": ("shmbridge.shm",),
    "yaml": ("shmbridge.config", "launcher.cli.config"),
    "shtab": ("launcher.cli.completion",),
    **dict.fromkeys(("accelerate", "trl", "peft", "datasets", "lightning", "gguf", "safetensors", "rich"), ()),
}
HEAVY = ("torch", "numpy", "transformers", "safetensors", "accelerate", "gguf", "huggingface_hub", "rich")

ROOT = Path(shmbridge.__file__).parents[1]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("shmbridge", "launcher")
    for file in sorted((ROOT / package).rglob("*.py"))
}


@cache
def imports(module: str, typing_too: bool = True) -> set[str]:
    """The modules that `module` imports, wherever the import stands; a name of a package's __init__ as `package.name`."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module} has a relative import"
            inside = node.module == "shmbridge" or node.module not in MODULES or MODULES[node.module].stem == "__init__"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
        elif typing_too or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            todo += ast.iter_child_nodes(node)
    return found


def room(name: str) -> str:
    """`shm` for shmbridge.shm.ring; empty for a name of shmbridge itself, and outside of it."""
    package, *rest = name.split(".")
    return rest[0] if package == "shmbridge" and rest and rest[0] in ROOMS else ""


def test_folders_import_one_way():
    public = {f"shmbridge.{name}" for name in shmbridge.__all__} | {"shmbridge"}
    wrong = set()
    for module in (name for name in MODULES if name.startswith("shmbridge.")):
        own = room(module)
        assert own, f"{module} is in no folder of ROOMS"
        for name in imports(module) - (public if own == "integrations" else set()):
            of_house = name.split(".")[0] in ("shmbridge", "launcher")
            if of_house and room(name) not in {own, *ROOMS[own]} and (module, name) not in EXCEPTIONS:
                wrong.add(f"{module} imports {name}")
    assert not wrong


def test_folders_of_the_launcher_import_one_way():
    wrong = set()
    for module in (name for name in MODULES if name.startswith("launcher.")):
        for name in imports(module):
            package, folder, *_ = f"{name}.".split(".")
            if package == "launcher" and FLOORS.index(folder) > FLOORS.index(module.split(".")[1]):
                wrong.add(f"{module} imports {name}")
    assert not wrong


def test_the_launcher_imports_what_is_free_of_torch():
    wrong = set()
    for module in (name for name in MODULES if name.split(".")[0] == "launcher"):
        for name in imports(module) - {"shmbridge.__version__"}:
            if name.split(".")[0] == "shmbridge" and room(name) not in TORCH_FREE and (module, name) not in EXCEPTIONS:
                wrong.add(f"{module} imports {name}")
    assert not wrong


def test_nothing_heavy_is_loaded_with_the_launcher():
    """One process imports all that must be free of torch, and tells after which module something heavy is there."""
    free = [name for name in MODULES if name.startswith("launcher") or room(name) in TORCH_FREE or name == "shmbridge"]
    free = [name for name in free if not name.endswith("__main__")]
    code = f"""
import importlib, sys
for module in {free}:
    importlib.import_module(module)
    heavy = [name for name in {HEAVY} if name in sys.modules]
    if heavy:
        sys.exit(f"{{module}} loads {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_exception_is_left_over():
    assert [pair for pair in EXCEPTIONS if pair[1] not in imports(pair[0])] == []


def test_modules_import_each_other_in_no_circle():
    def target(name: str) -> str:
        return name if name in MODULES else name.rpartition(".")[0]

    TopologicalSorter({module: set(map(target, imports(module, typing_too=False))) for module in MODULES}).prepare()


def test_packages_are_imported_where_they_are_needed_alone():
    wrong = set()
    for module in MODULES:
        for package in {name.split(".")[0] for name in imports(module)} & set(THIRD_PARTY):
            if not f"{module}.".startswith(tuple(f"{place}." for place in THIRD_PARTY[package])):
                wrong.add(f"{module} imports {package}")
    assert not wrong


def test_an_integration_outside_its_folder_uses_what_the_process_has_imported():
    known = {"shmbridge", "launcher", "torch", *THIRD_PARTY}
    for name, file in MODULES.items():
        if file.parent == ROOT / "shmbridge" / "integrations":
            assert not {found.split(".")[0] for found in imports(name)} & known, name


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


def test_a_decision_is_found_by_its_title():
    folder = ROOT / "docs" / "decisions"
    listed = dict(re.findall(r"^- \[(.+)\]\((.+)\)$", (folder / "README.md").read_text(), re.MULTILINE))
    assert sorted(listed.values()) == sorted(file.name for file in folder.iterdir() if file.name != "README.md")
    for title, name in listed.items():
        lines = (folder / name).read_text().splitlines()
        assert lines[0] == f"# {title}" and len(lines) <= 15, name
        assert name == re.sub("[^a-z0-9]+", "-", title.lower().replace("'", "")) + ".md"


def drawn(package: str, indent: str = "") -> list[str]:
    """The tree below `package`, made of the lists in the docstrings of its folders."""
    tree = []
    listed = re.findall(r"^ *(\w+) {2,}(.+)$", ast.get_docstring(ast.parse(MODULES[package].read_text())) or "", re.M)
    for name, about in listed:
        is_folder = MODULES[f"{package}.{name}"].stem == "__init__"
        tree.append(f"{indent + name + '/' * is_folder:<28}{about}")
        tree += drawn(f"{package}.{name}", indent + "    ") if is_folder else []
    inside = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package} - {"__main__"}
    assert sorted(name for name, _ in listed) == sorted(inside), f"the docstring of {package} lists its modules"
    return tree


def test_the_design_draws_the_tree():
    tree = "\n".join(["shmbridge/", *drawn("shmbridge", "    "), "launcher/", *drawn("launcher", "    ")])
    drawing = (ROOT / "docs" / "design.md").read_text().partition("```text\n")[2].partition("\n```")[0]
    assert drawing == tree, f"docs/design.md has to draw this tree:\n{tree}"
