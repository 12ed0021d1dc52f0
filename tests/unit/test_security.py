"""What docs/security.md says and no other test holds."""

from __future__ import annotations

import ast
import os
import secrets
import stat
from pathlib import Path

import pytest

from launcher import sessions
from shmbridge import config
from shmbridge.output_spec import HeadSpec, Offer, OutputSpec
from shmbridge.shm import owner
from shmbridge.shm.owner import SHM_DIRECTORY, Owner

CODE = sorted([*Path("shmbridge").rglob("*.py"), *Path("launcher").rglob("*.py")])
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "copyreg", "multiprocessing"}
CALLS = {"eval", "exec", "compile", "__import__", "load_module", "os.system", "os.popen"}
CALLS |= {"torch.load", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def dangers(tree: ast.AST) -> set[str]:
    """What runs or unpacks somebody else's bytes as code."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.add(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {name} & CALLS
            found |= {"shell=True" for one in node.keywords if one.arg == "shell"}
    return found


@pytest.mark.parametrize("file", CODE, ids=str)
def test_nothing_that_is_read_is_run(file):
    assert dangers(ast.parse(file.read_text())) == set()


@pytest.mark.parametrize(
    "text", ["import pickle", "from pickle import loads", "eval(x)", "torch.load(x)", "run(x, shell=True)"]
)
def test_the_search_finds(text):
    assert dangers(ast.parse(text))


def test_every_object_is_the_users_alone_whatever_the_umask_and_its_name_is_no_guess(monkeypatch):
    drawn = []
    token_hex = secrets.token_hex
    monkeypatch.setattr(secrets, "token_hex", lambda count: drawn.append(count) or token_hex(count))
    settings = config.load(overrides=["teacher.model=tests:teacher", "ring.max_tokens=64"])
    before = os.umask(0)
    try:
        with Owner(settings, lanes=2) as session:
            session.start_generation()
            session.create_replies(
                Offer((OutputSpec("out", "float32", ("seq", 8)),), "m", head=HeadSpec("float32", 8, 4))
            )
            names = owner.objects(session.session_id)[session.session_id]
            modes = {stat.S_IMODE((SHM_DIRECTORY / name).stat().st_mode) for name in names}
    finally:
        os.umask(before)
    assert len(names) == 9  # control, head, two lanes with their replies, three doorbells
    assert modes == {0o600}
    assert drawn == [16]


@pytest.mark.promise(20)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_what_another_user_left_under_our_names_is_not_touched(promise):
    settings = config.load(overrides=["teacher.model=tests:teacher", "ring.max_tokens=64"])
    with Owner(settings, lanes=1) as session:
        name = owner.objects(session.session_id)[session.session_id][0]
        os.chown(SHM_DIRECTORY / name, 65534, 65534)
        assert session.session_id not in dict(sessions.reclaim())
        assert (SHM_DIRECTORY / name).exists()
    promise.kept("another user's session is never reclaimed")
