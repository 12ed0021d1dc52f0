"""Adds shell completion to wheels. Everything else about the package is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithCompletion(build_py):
    """Writes a completion script for each shell, made by shtab from the parsers of shmbridge-launch."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        sys.path.insert(0, str(Path(__file__).parent))
        from launcher.cli import completion, parsers

        directory = Path(self.build_lib, "shmbridge", "completions")
        self.mkpath(str(directory))
        for shell in parsers.SHELLS:
            (directory / shell).write_text(completion.generate(shell))


setup(cmdclass={"build_py": WithCompletion})
