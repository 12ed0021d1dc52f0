"""The processes of the CUDA trial, with stand-ins for CUDA: what they say of what they find."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import msgspec
import pytest
import torch

from shmbridge.errors import AttachError, PlanError
from shmbridge.plane import cuda_ipc, cuda_slab
from shmbridge.plane import probe as cuda_probe
from shmbridge.plane.probe import Exported, Facts, Task, Tried
from tests.fake_cuda import FakeCuda

CPU = torch.device("cpu")
OURS = Facts("2.9.0", 7, ("GPU-train", "GPU-teacher"))
THEIRS = Facts("2.9.0", 7, ("GPU-teacher", "GPU-train"))


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    """CUDA whose memory is files, on two GPUs that both see."""
    made = FakeCuda().install(monkeypatch)
    monkeypatch.setattr(cuda_ipc, "unusable", lambda device: None)
    monkeypatch.setattr(cuda_probe, "facts", lambda: THEIRS)
    monkeypatch.setattr(cuda_probe, "_device", lambda index: CPU)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: True)
    return made


def said(capture, kind: type) -> list:
    lines = capture.readouterr().out.encode().split(b"\n")
    return [msgspec.json.decode(text, type=kind) for text in cuda_probe.messages(lines)]


def exported(capture, monkeypatch, importers: int = 1) -> Exported:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    cuda_probe.export(importers)
    (message,) = said(capture, Exported)
    return message


def tasks_of(message: Exported) -> list[Task]:
    return [Task(0, message.facts, export) for export in message.exports]


def test_what_one_exports_the_other_opens_reads_and_checks(fake, capsys, monkeypatch):
    slabs: list[object] = []
    message = cuda_probe._export(2, slabs)
    assert message.facts == THEIRS
    assert message.refused is None
    handles = {msgspec.json.decode(export, type=cuda_slab.Export).memory.handle for export in message.exports}
    assert len(handles) == 2, "each importing GPU has a slab of its own"
    assert len(slabs) == 2
    monkeypatch.setattr(cuda_probe, "facts", lambda: OURS)
    cuda_probe.try_all(tasks_of(message))
    assert said(capsys, Tried) == [Tried(None), Tried(None)]


def test_an_exporter_has_spoken_and_keeps_its_memory_until_it_is_told(fake, capsys, monkeypatch):
    kept = weakref.WeakSet()
    real = cuda_slab.Slab

    def slab(*args: object, **kwargs: object) -> cuda_slab.Slab:
        made = real(*args, **kwargs)
        kept.add(made)
        return made

    def told() -> bytes:
        (message,) = said(capsys, Exported)
        events.append((message.refused, len(message.exports), len(kept)))
        return b""

    events: list[tuple[object, ...]] = []
    monkeypatch.setattr(cuda_slab, "Slab", slab)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=told)))
    cuda_probe.export(2)
    assert events == [(None, 2, 2)]


def test_a_message_is_told_from_what_else_is_printed():
    lines = (b"half a line" + cuda_probe.encode(Tried("x")) + b"noise\n" + cuda_probe.encode(Tried(None))).split(b"\n")
    assert list(cuda_probe.messages(lines)) == [
        msgspec.json.encode(Tried("x")),
        msgspec.json.encode(Tried(None)),
    ]


@pytest.mark.parametrize(
    ("part", "replacement", "refused"),
    [
        ("unusable", lambda device: "the allocator is cudaMallocAsync", "the allocator is cudaMallocAsync"),
        ("Slab", PlanError("no room here.\nMore lines."), "PlanError: no room here"),
        ("facts", RuntimeError("CUDA driver initialization failed"), "RuntimeError: CUDA driver initialization failed"),
        ("facts", lambda: Facts("2.9.0", 7, ()), "torch 2.9.0 finds no CUDA device in the teacher's environment"),
    ],
)
def test_an_exporter_says_why_it_cannot(fake, capsys, monkeypatch, part, replacement, refused):
    module = {"unusable": cuda_ipc, "Slab": cuda_slab, "facts": cuda_probe}[part]
    monkeypatch.setattr(module, part, raising(replacement) if isinstance(replacement, Exception) else replacement)
    message = exported(capsys, monkeypatch)
    assert message.refused == refused
    assert message.exports == ()


def raising(error: Exception):
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AttachError("reads 3 where 5 was written. Set plane=host, which goes by."), "reads 3 where 5 was written"),
        (
            AttachError("GPU-x cannot be read: CUDA error: boom\nCUDA kernel errors"),
            "GPU-x cannot be read: CUDA error: boom",
        ),
        (ValueError("odd"), "ValueError: odd"),
        (ValueError(), "ValueError: "),
    ],
)
def test_an_importer_says_why_it_cannot(fake, capsys, monkeypatch, error, reason):
    message = cuda_probe._export(2, [])
    real = cuda_slab.Opened
    monkeypatch.setattr(cuda_slab, "Opened", lambda *args: raising(error)() if not fake.tried else real(*args))
    fake.tried = 0
    cuda_probe.try_all(tasks_of(message)[:1])
    fake.tried = 1
    cuda_probe.try_all(tasks_of(message)[1:])
    assert said(capsys, Tried) == [Tried(reason), Tried(None)]


def test_gpus_without_peer_access_are_not_opened(fake, capsys, monkeypatch):
    message = cuda_probe._export(2, [])
    monkeypatch.setattr(cuda_probe, "facts", lambda: OURS)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: (device, other) != (0, 1))
    monkeypatch.setattr(cuda_slab, "Opened", raising(AssertionError("it was opened")))
    cuda_probe.try_all(tasks_of(message)[:1])
    assert said(capsys, Tried) == [Tried("no peer access (`nvidia-smi topo -p2p r` shows which GPUs have it)")]


def test_a_gpu_needs_no_access_to_itself(fake, capsys, monkeypatch):
    message = cuda_probe._export(1, [])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: False)
    cuda_probe.try_all(tasks_of(message))
    assert said(capsys, Tried) == [Tried(None)]


def test_an_importer_without_cuda_says_so_once(fake, capsys, monkeypatch):
    message = cuda_probe._export(2, [])
    monkeypatch.setattr(cuda_probe, "facts", raising(RuntimeError("no driver")))
    cuda_probe.try_all(tasks_of(message))
    assert said(capsys, Tried) == [Tried("RuntimeError: no driver", of_jobs=True)]


@pytest.mark.parametrize(
    ("teacher", "training", "device", "reason"),
    [
        ({}, {}, 0, None),
        ({}, {}, 1, None),
        ({}, {"gpus": ()}, 0, "torch 2.9.0 finds no CUDA device in training's environment"),
        (
            {"torch": "2.10.0"},
            {},
            0,
            "the teacher has torch 2.10.0, training has torch 2.9.0; .* .install the same in both",
        ),
        ({"torch": "2.9.0+cu128"}, {"torch": "2.9.0+cu126"}, 0, "the teacher has torch 2.9.0.cu128"),
        ({"pid_namespace": 8}, {}, 0, "different PID namespaces, .* --pid=host"),
        ({}, {"gpus": ("GPU-train", "GPU-x")}, 0, "training sees 2 GPUs, and not GPU-teacher; all GPUs of the run"),
        ({"gpus": ("GPU-teacher",)}, {}, 0, "the teacher sees 1 GPU, and not GPU-train; all"),
        ({}, {}, 2, "training sees 2 GPUs, and not its own cuda:2; all"),
    ],
)
def test_what_two_jobs_must_have_alike(fake, capsys, monkeypatch, teacher, training, device, reason):
    theirs, ours = msgspec.structs.replace(THEIRS, **teacher), msgspec.structs.replace(OURS, **training)
    found = cuda_probe.disagreement(theirs, ours, device)
    if reason is None:
        assert found is None
        return
    monkeypatch.setattr(cuda_probe, "facts", lambda: ours)
    monkeypatch.setattr(cuda_slab, "Opened", raising(AssertionError("it was opened")))
    cuda_probe.try_all([Task(device, theirs, msgspec.Raw(b"{}"))])
    assert said(capsys, Tried) == [Tried(found, of_jobs=True)]
    assert re.search(reason, found)


# The command, where torch finds no GPU


def probe(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "shmbridge.plane.probe", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_the_exporting_process_ends_when_it_is_told():
    with probe("export", "2") as process:
        text = next(iter(cuda_probe.messages(process.stdout)))
        message = msgspec.json.decode(text, type=Exported)
        assert message.refused == f"torch {torch.__version__} finds no CUDA device in the teacher's environment"
        assert message.facts == Facts(str(torch.__version__), cuda_ipc.pid_namespace(), ())
        process.stdin.close()
        assert process.wait(60) == 0


def test_the_importing_process_ends_once_it_has_answered():
    with probe("import") as process:
        task = Task(0, THEIRS, msgspec.Raw(b"{}"))
        process.stdin.write(b"noise\n" + cuda_probe.encode([task]))
        process.stdin.flush()
        (text,) = cuda_probe.messages(process.stdout)
        assert "finds no CUDA device in training's environment" in msgspec.json.decode(text, type=Tried).reason
        assert process.wait(60) == 0


def test_an_importing_process_that_is_told_nothing_ends():
    with probe("import") as process:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert list(cuda_probe.messages(out.split(b"\n"))) == []
