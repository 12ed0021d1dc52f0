"""Modules of this folder in processes of their own, which have not imported torch."""

from __future__ import annotations

import subprocess
import sys


def module(name: str, *arguments: str) -> tuple[int, str]:
    """Run tests.protocol.NAME; its exit status and what it printed."""
    command = [sys.executable, "-m", f"tests.protocol.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout + done.stderr
