"""The trial of plane cuda_ipc: the real messages, limits and ends, over processes that stand in for those with CUDA."""

from __future__ import annotations

import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.plan import plane_choice
from launcher.plan.gpus import Gpu
from launcher.process import trial
from launcher.process.signals import Signals
from launcher.process.trial import Command
from tests.harness import until
from tests.launcher.test_plan import EIGHT, make

FAKE = str(Path(__file__).with_name("fake_probe.py"))
TWO = plane_choice.pairs([(EIGHT[7],)], EIGHT[:2])
MARK = "SHMBRIDGE_TEST_MARK"


class Fakes:
    """Trials whose processes bear a mark in their environment."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.mark = uuid.uuid4().hex

    def command(self, who: str, *arguments: str) -> Command:
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": str(Path.cwd())}
        return Command(who, (sys.executable, FAKE, *arguments), environment)

    def run(self, exporter: str = "ok", importer: str = "ok", limit_s: float = 60.0) -> str | None:
        exporters = [self.command("the exporter", "export", "2", exporter)]
        return trial.run(TWO, exporters, self.command("the importer", "import", importer), self.signals, limit_s)

    def processes(self) -> list[str]:
        """Command lines of what lives."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if f"{MARK}={self.mark}".encode() in Path(f"/proc/{name}/environ").read_bytes():
                    found.append(Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


def children() -> set[str]:
    """Pids of this process's children, zombies included."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(name)
    return found


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    before = children()
    with Signals() as signals:
        made = Fakes(signals)
        yield made
    assert made.processes() == []
    assert children() <= before, "one was not reaped"


def test_a_trial_that_passes(fakes):
    assert fakes.run() is None


@pytest.mark.parametrize(("exporter", "importer"), [("chatters", "ok"), ("ok", "chatters")])
def test_what_else_is_printed_is_no_message(fakes, exporter, importer):
    assert fakes.run(exporter, importer) is None


@pytest.mark.parametrize(
    ("exporter", "reason"),
    [
        ("refuses", "its allocator is cudaMallocAsync"),
        ("crashes", "the exporter was killed by SIGSEGV"),
        ("crashes later", "the exporter was killed by SIGBUS"),
        ("crashes at its end", "the exporter was killed by SIGSEGV"),
        ("exits", "the exporter ended with exit code 1 (no module named shmbridge)"),
        ("leaves", "the exporter ended before it had answered"),
        ("exports less", "1 exports came for 2 pairs of GPUs"),
    ],
)
def test_an_exporter_that_fails_is_the_reason(fakes, exporter, reason):
    hung = "hangs" if exporter == "crashes later" else "ok"
    assert fakes.run(exporter, hung) == reason


@pytest.mark.parametrize(
    ("importer", "reason"),
    [
        ("fails one", "GPU 7 and GPU 1: no peer access"),
        ("fails all", "GPU 7 and GPU 0: no peer access (and 1 of 2 pairs more)"),
        ("finds jobs unlike", "the teacher has another torch"),
        ("crashes", "GPU 7 and GPU 1: the importer was killed by SIGSEGV"),
        ("exits", "GPU 7 and GPU 1: the importer ended with exit code 1 (no module named shmbridge)"),
        ("leaves", "GPU 7 and GPU 1: the importer ended before it had answered"),
    ],
)
def test_an_importer_that_fails_is_the_reason_with_its_pair(fakes, importer, reason):
    assert fakes.run(importer=importer) == reason


@pytest.mark.parametrize(("exporter", "importer"), [("garbles", "ok"), ("ok", "garbles")])
def test_a_garbled_message_is_the_reason(fakes, exporter, importer):
    assert "sent a garbled message: Expected `object`" in fakes.run(exporter, importer)


@pytest.mark.parametrize(
    ("exporter", "importer", "reason"),
    [
        ("hangs", "ok", "the exporter gave no answer within 2 s"),
        ("ok", "hangs", "GPU 7 and GPU 1: the importer gave no answer within 2 s"),
        ("hangs at its end", "ok", "the exporter was told to end and gave no answer within 2 s"),
    ],
)
def test_whoever_hangs_is_killed_with_all_it_started(fakes, exporter, importer, reason):
    assert fakes.run(exporter, importer, limit_s=2) == reason


def test_the_end_has_a_limit_of_its_own(fakes, monkeypatch):
    monkeypatch.setattr(trial, "_END_S", 0.5)
    assert fakes.run("hangs at its end") == "the exporter was told to end and gave no answer within 0.5 s"


def test_each_pair_has_an_export_of_its_replica(fakes):
    pairs = plane_choice.pairs([(EIGHT[6],), (EIGHT[7],)], (EIGHT[0], EIGHT[1], EIGHT[2]))
    exporters = [fakes.command("a", "export", "2", "ok"), fakes.command("b", "export", "1", "ok")]
    reason = trial.run(pairs, exporters, fakes.command("the importer", "import", "tells"), fakes.signals)
    # devices 0 and 2 are of replica 0, device 1 is of replica 1, as the importer was told
    assert reason == ('the importer ended with exit code 1 (02.9.0{"number":0} 22.9.0{"number":1} 12.9.0{"number":0})')


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("exporter", "importer"), [("hangs", "ok"), ("ok", "hangs")])
def test_a_signal_ends_both_at_once(fakes, number, exporter, importer):
    def stop() -> None:
        until(lambda: any("sleep 600" in line for line in fakes.processes()), "the process that hangs")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(trial.Stopped, match=f"stopped by {number.name}") as caught:
        fakes.run(exporter, importer)
    thread.join()
    assert caught.value.number == number


def test_a_signal_for_the_ranks_ends_nothing(fakes):
    os.kill(os.getpid(), signal.SIGUSR1)
    assert fakes.run() is None


def test_the_processes_are_the_jobs_own():
    planned = make("teacher.gpus=6-7", "train.gpus=0-2", "teacher.python=/opt/env/bin/python")
    pairs = plane_choice.pairs(planned.teachers, planned.train_gpus)
    base = {"RANK": "3", "HF_HOME": "x", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    exporters, importer = trial.commands(planned, pairs, base)
    assert [(one.who, one.argv) for one in exporters] == [
        (f"the trial in teacher {i}'s environment", ("/opt/env/bin/python", "-m", "shmbridge.plane.probe", "export", n))
        for i, n in enumerate(("2", "1"))
    ]
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in exporters] == ["6,0,1,2", "7,0,1,2"]
    assert not {"RANK", "PYTORCH_CUDA_ALLOC_CONF"} & set(exporters[0].environment)
    assert importer.argv == (sys.executable, "-m", "shmbridge.plane.probe", "import")
    assert importer.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,6,7"
    assert importer.environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    exporters, _ = trial.commands(make("teacher.gpus='7'", "train.gpus=0-2"), TWO, base)
    assert exporters[0].who == "the trial in the teacher's environment"


def test_ranks_that_share_a_gpu_are_one_pair():
    gpu = Gpu(0, "0", 80, 80)
    assert [(pair.device, str(pair)) for pair in plane_choice.pairs([(gpu,)], (gpu, gpu))] == [(0, "GPU 0 and GPU 0")]
