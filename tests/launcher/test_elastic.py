"""torchrun inside a process of the launcher's: what it does to the other ranks when one ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launcher.process import elastic
from tests.harness import until

RANK = """
import os, sys, time
from pathlib import Path
here, rank = Path(sys.argv[1]), os.environ["LOCAL_RANK"]
(here / f"up{rank}").touch()
while not (here / f"end{rank}").exists():
    time.sleep(0.01)
(here / f"saved{rank}").touch()
sys.exit(int(rank == "0"))
"""


def test_a_rank_that_has_saved_and_ended_takes_no_other_along_while_the_run_stops(tmp_path: Path):
    """A rank with a save hook may end, with the exit code of its RunStopped, while others still save."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = ["--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1", "rank.py", str(tmp_path)]
    command = [sys.executable, "-P", elastic.__file__, "--record", str(tmp_path / "record"), "--patience", "30", "--"]
    log = tmp_path / "log"
    with open(log, "w") as out, subprocess.Popen([*command, *torchrun], cwd=tmp_path, stderr=out) as running:
        until(lambda: (tmp_path / "up0").exists() and (tmp_path / "up1").exists(), "both ranks")
        running.send_signal(elastic.HOLD)
        (tmp_path / "end0").touch()
        until(lambda: "closing signal SIGTERM" in log.read_text(), "torchrun's look at the rank that has ended")
        (tmp_path / "end1").touch()
        assert running.wait() == 1
    assert (tmp_path / "saved1").exists(), log.read_text()
