"""torchrun's command line, as the launcher builds it, and the flags of torchrun that it refuses."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from shmbridge.errors import ConfigError

ELASTIC = Path(__file__).parents[1] / "process" / "elastic.py"

_REFUSED = {
    "--nproc-per-node": "the ranks are counted by --train-gpus or --cpu",
    "--max-restarts": "a restart of torchrun's would change every rank under the bridge",
    "--nnodes": "a session lives on one node",
    "--virtual-local-rank": "it gives every rank LOCAL_RANK 0, and the bridge tells ranks apart by it",
}
_HARMLESS = {"--max-restarts": ("0",), "--nnodes": ("1", "1:1")}
_OWN_LOGS = ("--log-dir", "--redirects", "--tee", "--logs-specs")  # and -r, -t
_MODULE = ("-m", "--module")


def split(text: str) -> list[str]:
    """The user's torchrun flags.

    Raises:
        ConfigError: the quoting is broken, or a flag sets what the launcher has to set.
    """
    try:
        args = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"train.torchrun_args is {text!r}: {error}.") from None
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        value = arg.partition("=")[2] or following
        for flag, why in _REFUSED.items():
            if _means(arg, flag) and value not in _HARMLESS.get(flag, ()):
                raise ConfigError(f"train.torchrun_args has {arg}, which shmbridge-launch refuses: {why}.")
    return args


def command(args: Sequence[str], ranks: int, script: Sequence[str], logs: Path, patience_s: float) -> list[str]:
    """The arguments of the interpreter: elastic.py, its record file, the ranks' time to stop, torchrun's flags, the
    training command.

    --local-addr keeps torchrun from resolving the host name, which in containers often does not resolve; all ranks are
    on this node. A --local-addr in `args` comes later and wins.
    """
    own = ["--record", str(logs / "failures.json"), "--patience", str(math.ceil(patience_s))]
    flags = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node", str(ranks)]
    if not any(re.match("-[rt]", arg) or _means(arg, *_OWN_LOGS) for arg in args):
        flags += ["--log-dir", str(logs), "--redirects", "3"]
    return ["-P", str(ELASTIC), *own, "--", *flags, *args, *script]


def check_script(script: Sequence[str], args: Sequence[str]) -> None:
    """Raises ConfigError if torchrun cannot run the training command."""
    if not script:
        raise ConfigError(
            "the training command is missing; it follows `--`: shmbridge-launch ... -- train.py --lr 1e-4"
        )
    first = script[0]
    if "-m" in args or any(_means(arg, "--module", "--no-python") for arg in args):
        return
    if Path(first).name in ("torchrun", "python", "python3", "accelerate", "deepspeed"):
        raise ConfigError(
            f"the training command begins with {first}; give the script alone (`-- train.py ...` or `-- -m package.module`): "
            "shmbridge-launch starts torchrun itself."
        )
    if Path(first).is_dir():
        raise ConfigError(
            f"the training script {first!r} is a directory; name the script in it, such as {first}/train.py."
        )
    if not first.startswith("-") and not Path(first).is_file():
        raise ConfigError(f"the training script {first!r} does not exist in {Path.cwd()}.")
    if first in _MODULE and len(script) < 2:
        raise ConfigError("the training command is `-m` without a module.")


def check_module(script: Sequence[str]) -> None:
    """Raises ConfigError where the training command is `-m MODULE` and the ranks' interpreter has no such package. It
    looks for the top package only, and imports nothing."""
    if script[0] not in _MODULE or len(script) < 2:
        return
    top = script[1].partition(".")[0]
    path = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    if PathFinder.find_spec(top, path) is None and (not top or find_spec(top) is None):
        raise ConfigError(
            f"the training module {script[1]!r} was not found: {top!r} is neither in {path[0]} nor on PYTHONPATH nor in the "
            f"packages of {sys.executable}. Run from the folder that holds it, or install it there."
        )


def _means(arg: str, *flags: str) -> bool:
    """Whether argparse would take `arg` for one of `flags`: in full, with underscores, shortened, or with `=` and a value.

    A shortening that means several flags counts too; torchrun refuses it anyway.
    """
    name = arg.partition("=")[0].replace("_", "-")
    return name.startswith("--") and len(name) > 2 and any(flag.startswith(name) for flag in flags)
