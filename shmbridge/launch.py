"""The command `shmbridge-launch`, also as `python -m shmbridge.launch`.

The launcher's code is the package `launcher`. A user's project may have a module of that name, so it is loaded by its
path and never searched on sys.path. An installed wheel holds it inside this package, a checkout beside this package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def folder(name: str) -> Path:
    """The folder `launcher` or `configs` of this installation: inside this package in a wheel, beside it in a
    checkout."""
    inside = Path(__file__).with_name(name)
    return inside if inside.is_dir() else inside.parent.with_name(name)


def main() -> int:
    """Run the command line of this process; the exit code."""
    load_launcher()
    import_module("launcher.process.signals").exit_on_interrupt()
    code: int = import_module("launcher.cli.main").main()
    return code


def load_launcher() -> None:
    """Make `import launcher` in this process import the launcher of this installation."""
    home = folder("launcher")
    if getattr(sys.modules.get("launcher"), "__path__", None) == [str(home)]:
        return  # its modules are loaded, and keep their package
    spec = spec_from_file_location("launcher", home / "__init__.py", submodule_search_locations=[str(home)])
    assert spec is not None and spec.loader is not None
    sys.modules["launcher"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.exit(main())
