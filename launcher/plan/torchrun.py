"""torchrun's command line, as the launcher builds it, and the flags of torchrun that it refuses."""

from __future__ import annotations

import math
import os
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
_OWN_LOGS = ("--log-dir", "--redirects", "--tee", "--logs-specs")
_OWN_LOGS_SHORT = ("-r", "-t")
_MODULE = ("-m", "--module")
_NOT_A_FILE = ("--module", "--no-python")


def split(text: str) -> list[str]:
    """The user's torchrun flags.

    Raises:
        ConfigError: the quoting is broken, or a flag sets what the launcher has to set.
    """
    try:
        args = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"train.torchrun_args is {text!r}: {error}.") from None
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        for flag, why in _REFUSED.items():
            value = value or (args[i + 1] if i + 1 < len(args) else "")
            if _means(name, flag) and value not in _HARMLESS.get(flag, ()):
                raise ConfigError(f"train.torchrun_args has {arg}, which shmbridge-launch refuses: {why}.")
    return args


def command(
    args: Sequence[str], ranks: int, script: Sequence[str], logs: Path, record: Path, patience_s: float = 30
) -> list[str]:
    """The arguments of the interpreter: elastic.py, its record file, the ranks' time to stop, torchrun's flags, the
    training command.

    --local-addr keeps torchrun from resolving the host name, which in containers often does not resolve; all ranks are
    on this node. A --local-addr in `args` comes later and wins.
    """
    own_logs = [] if _logs_itself(args) else ["--log-dir", str(logs), "--redirects", "3"]
    flags = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node", str(ranks), *own_logs, *args]
    patience = str(math.ceil(patience_s))
    return ["-P", str(ELASTIC), "--record", str(record), "--patience", patience, "--", *flags, *script]


def check_script(script: Sequence[str], args: Sequence[str]) -> None:
    """Raises ConfigError if torchrun cannot run the training command."""
    if not script:
        raise ConfigError(
            "the training command is missing; it follows `--`: shmbridge-launch ... -- train.py --lr 1e-4"
        )
    first = script[0]
    if any(_means(arg, flag) for arg in args for flag in _NOT_A_FILE) or "-m" in args:
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


def _logs_itself(args: Sequence[str]) -> bool:
    return any(
        any(_means(arg.partition("=")[0], flag) for flag in _OWN_LOGS)
        or (arg.startswith(_OWN_LOGS_SHORT) and not arg.startswith("--"))
        for arg in args
    )


def _means(name: str, flag: str) -> bool:
    """Whether argparse would take `name` for `flag`: in full, with underscores, or shortened.

    A shortening that means several flags counts too; torchrun refuses it anyway.
    """
    return name.startswith("--") and len(name) > 2 and flag.startswith(name.replace("_", "-"))
