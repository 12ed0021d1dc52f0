"""The command itself on a machine whose /dev/shm is full from the N-th object on, while the file FAKE_FULL holds a number N."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from launcher.cli.main import main

NUMBER = Path(os.environ["FAKE_FULL"])
reserve = os.posix_fallocate


def reserved(fd: int, offset: int, nbytes: int) -> None:
    if NUMBER.exists():
        left = int(NUMBER.read_text()) - 1
        NUMBER.write_text(str(left))
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
    reserve(fd, offset, nbytes)


os.posix_fallocate = reserved
sys.exit(main(sys.argv[1:]))
