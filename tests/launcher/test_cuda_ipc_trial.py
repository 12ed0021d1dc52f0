"""The trial of plane cuda_ipc: the real messages, limits and ends, over processes that stand in for those with CUDA."""

from __future__ import annotations

import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from launcher.planning import plane_choice
from launcher.planning.gpus import Gpu
from launcher.process import cuda_ipc_trial
from launcher.process.cuda_ipc_trial import Command
from launcher.process.signals import Signals, Stopped
from tests.harness import until
from tests.launcher.test_planning import EIGHT, make

FAKE = str(Path(__file__).with_name("fake_probe.py"))
TWO = plane_choice.gpu_pairs([(EIGHT[7],)], EIGHT[:2])
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
        exports = self.command("the exporter", "export", exporter)
        return cuda_ipc_trial.run(
            TWO, [exports], self.command("the importer", "import", importer), self.signals, limit_s
        )

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


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    children = Path(f"/proc/self/task/{os.getpid()}/children")  # zombies included
    before = set(children.read_text().split())
    with Signals() as signals:
        made = Fakes(signals)
        yield made
    assert made.processes() == []
    assert set(children.read_text().split()) <= before, "one was not reaped"


@pytest.mark.parametrize(("exporter", "importer"), [("ok", "ok"), ("chatters", "ok"), ("ok", "chatters")])
def test_a_trial_that_passes_whatever_else_is_printed(fakes, exporter, importer):
    assert fakes.run(exporter, importer) is None


@pytest.mark.parametrize(
    ("exporter", "importer", "reason"),
    [
        ("refuses", "ok", "its allocator is cudaMallocAsync"),
        ("crashes", "ok", "the exporter was killed by SIGSEGV"),
        ("crashes later", "hangs", "the exporter was killed by SIGBUS"),
        ("crashes at its end", "ok", "the exporter was killed by SIGSEGV"),
        ("exits", "ok", "the exporter ended with exit code 1 (no module named shmbridge)"),
        ("leaves", "ok", "the exporter ended before it had answered"),
        ("ok", "fails one", "GPU 7 and GPU 1: no peer access"),
        ("ok", "fails all", "GPU 7 and GPU 0: no peer access (and 1 of 2 pairs more)"),
        ("ok", "finds jobs unlike", "the teacher has another torch"),
        ("ok", "crashes", "GPU 7 and GPU 1: the importer was killed by SIGSEGV"),
        ("ok", "exits", "GPU 7 and GPU 1: the importer ended with exit code 1 (no module named shmbridge)"),
        ("ok", "leaves", "GPU 7 and GPU 1: the importer ended before it had answered"),
        ("ok", "garbles", "the importer sent a garbled message: Expected `object`, got `str`"),
    ],
)
def test_what_fails_is_the_reason(fakes, exporter, importer, reason):
    assert fakes.run(exporter, importer) == reason


class ExporterLast:
    """A queue of events in which the end of an exporter comes behind that of its importer."""

    def __init__(self) -> None:
        self._events, self._held, self._importer_ended = SimpleQueue(), [], False

    def put(self, event):
        process, message = event
        if message is None and "exporter" in process.who and not self._importer_ended:
            self._held.append(event)
            return
        self._events.put(event)
        if message is None:
            self._importer_ended = True
            for held in self._held:
                self._events.put(held)

    def get(self, timeout):
        return self._events.get(timeout=timeout)


def test_an_exporter_is_the_reason_where_its_importer_is_seen_to_end_first(fakes, monkeypatch):
    monkeypatch.setattr(cuda_ipc_trial.queue, "SimpleQueue", ExporterLast)
    assert fakes.run("crashes", "ok") == "the exporter was killed by SIGSEGV"


@pytest.mark.parametrize(
    ("exporter", "importer", "who"),
    [
        ("hangs", "ok", "the exporter"),
        ("ok", "hangs", "GPU 7 and GPU 1: the importer"),
        ("ok", "hangs at its end", "the importer was told to end and"),
        ("hangs at its end", "ok", "the exporter was told to end and"),
    ],
)
def test_whoever_hangs_is_killed_with_all_it_started(fakes, exporter, importer, who):
    assert fakes.run(exporter, importer, limit_s=1) == f"{who} gave no answer within 1 s"


def test_the_end_has_a_limit_of_its_own(fakes, monkeypatch):
    monkeypatch.setattr(cuda_ipc_trial, "_END_S", 0.5)
    assert fakes.run("hangs at its end") == "the exporter was told to end and gave no answer within 0.5 s"


def test_each_pair_has_an_export_of_its_replica(fakes):
    pairs = plane_choice.gpu_pairs([(EIGHT[6],), (EIGHT[7],)], (EIGHT[0], EIGHT[1], EIGHT[2]))
    importer = fakes.command("the importer", "import", "tells")
    replicas = [fakes.command(name, "export", name) for name in "ab"]
    assert (
        cuda_ipc_trial.run(pairs, replicas, importer, fakes.signals)
        == 'GPU 6 and GPU 0: 0 "of a" (and 2 of 3 pairs more)'
    )
    assert cuda_ipc_trial.run(pairs[2:], replicas[1:], importer, fakes.signals) == 'GPU 7 and GPU 1: 1 "of b"'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("exporter", "importer"), [("hangs", "ok"), ("ok", "hangs")])
def test_a_signal_ends_both_at_once(fakes, number, exporter, importer):
    def stop() -> None:
        until(lambda: any("sleep 600" in line for line in fakes.processes()), "the process that hangs")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped, match=f"stopped by {number.name}") as caught:
        fakes.run(exporter, importer)
    thread.join()
    assert caught.value.number == number


def test_a_signal_for_the_ranks_ends_nothing(fakes):
    os.kill(os.getpid(), signal.SIGUSR1)
    assert fakes.run() is None


def test_the_real_processes_where_torch_finds_no_gpu(fakes):
    """The importer hears the exporter through the pipe between them, and passes on why it cannot."""
    environment = {**os.environ, MARK: fakes.mark, "CUDA_VISIBLE_DEVICES": ""}
    exports, imports = (
        Command(side, (sys.executable, "-m", "shmbridge.plane.cuda_ipc_probe", side), environment)
        for side in ("export", "import")
    )
    reason = cuda_ipc_trial.run(TWO, [exports], imports, fakes.signals)
    assert reason.endswith("finds no CUDA device in the teacher's environment")


def test_the_processes_are_the_jobs_own():
    planned = make("teacher.gpus=6-7", "train.gpus=0-2", "teacher.python=/bin/sh")
    pairs = plane_choice.gpu_pairs(planned.teachers, planned.train_gpus)
    base = {"RANK": "3", "HF_HOME": "x", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    exporters, importer = cuda_ipc_trial.commands(planned, pairs, base)
    assert [(one.who, one.argv) for one in exporters] == [
        (
            f"the trial in teacher {i}'s environment",
            ("/bin/sh", "-m", "shmbridge.plane.cuda_ipc_probe", "export"),
        )
        for i in range(2)
    ]
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in exporters] == ["6,0,1,2", "7,0,1,2"]
    assert not {"RANK", "PYTORCH_CUDA_ALLOC_CONF"} & set(exporters[0].environment)
    assert importer.argv == (sys.executable, "-m", "shmbridge.plane.cuda_ipc_probe", "import")
    assert importer.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,6,7"
    assert importer.environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    exporters, _ = cuda_ipc_trial.commands(make("teacher.gpus='7'", "train.gpus=0-2"), TWO, base)
    assert exporters[0].who == "the trial in the teacher's environment"


def test_ranks_that_share_a_gpu_are_one_pair():
    gpu = Gpu(0, "0", 80, 80)
    assert [(pair.device, str(pair)) for pair in plane_choice.gpu_pairs([(gpu,)], (gpu, gpu))] == [
        (0, "GPU 0 and GPU 0")
    ]
