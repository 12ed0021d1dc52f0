"""The processes of the CUDA trial, with stand-ins for CUDA: what they say of what they find."""

from __future__ import annotations

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
from shmbridge.plane import cuda_ipc, cuda_ipc_probe, cuda_slab
from shmbridge.plane.cuda_ipc_probe import Answer, Exported, Facts
from tests.fake_cuda import FakeCuda

CPU = torch.device("cpu")
OURS = Facts("2.9.0", 7, ("GPU-train", "GPU-teacher"))
THEIRS = Facts("2.9.0", 7, ("GPU-teacher", "GPU-train"))


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    """CUDA whose memory is files, on two GPUs that both see."""
    made = FakeCuda().install(monkeypatch)
    monkeypatch.setattr(cuda_ipc, "unusable", lambda device: None)
    monkeypatch.setattr(cuda_ipc_probe, "facts", lambda: THEIRS)
    monkeypatch.setattr(cuda_ipc_probe, "_device", lambda index: CPU)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: True)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    return made


def said(capture, kind: type) -> list:
    lines = capture.readouterr().out.encode().split(b"\n")
    return [msgspec.json.decode(text, type=kind) for text in cuda_ipc_probe.messages(lines)]


def exported(monkeypatch, capture, *devices: int) -> Exported:
    """What an exporter says; its memory is there as long as the stand-in for CUDA."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: b"")))
    cuda_ipc_probe.export(devices)
    (message,) = said(capture, Exported)
    return message


def answers(capture, message: Exported) -> list[str | None]:
    """What an importer says of it."""
    cuda_ipc_probe.import_(msgspec.json.encode(message))
    return [answer.reason for answer in said(capture, Answer)]


def raising(error: Exception):
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


def test_what_one_exports_the_other_opens_reads_and_checks(fake, capsys, monkeypatch):
    message = exported(monkeypatch, capsys, 0, 1)
    assert (message.refused, message.facts, list(message.exports)) == (None, THEIRS, [0, 1])
    handles = {msgspec.json.decode(one, type=cuda_slab.Export).memory.handle for one in message.exports.values()}
    assert len(handles) == 2, "each importing GPU has a slab of its own"
    monkeypatch.setattr(cuda_ipc_probe, "facts", lambda: OURS)
    assert answers(capsys, message) == [None, None, None, None]


def test_an_exporter_has_spoken_and_keeps_its_memory_until_it_is_told(fake, capsys, monkeypatch):
    kept, events = weakref.WeakSet(), []
    real = cuda_slab.Slab

    def slab(*args: object, **kwargs: object) -> cuda_slab.Slab:
        made = real(*args, **kwargs)
        kept.add(made)
        return made

    def told() -> bytes:
        events.append((len(said(capsys, Exported)), len(kept)))
        return b""

    monkeypatch.setattr(cuda_slab, "Slab", slab)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=told)))
    cuda_ipc_probe.export((0, 1))
    assert events == [(1, 2)]


def test_a_message_is_told_from_what_else_is_printed():
    lines = (
        b"half a line" + cuda_ipc_probe.encode(Answer("x")) + b"noise\n" + cuda_ipc_probe.encode(Answer(None))
    ).split(b"\n")
    assert list(cuda_ipc_probe.messages(lines)) == [msgspec.json.encode(Answer("x")), msgspec.json.encode(Answer(None))]


@pytest.mark.parametrize(
    ("part", "replacement", "refused"),
    [
        ("unusable", lambda device: "the allocator is cudaMallocAsync", "the allocator is cudaMallocAsync"),
        ("Slab", raising(PlanError("no room here.\nMore lines.")), "PlanError: no room here"),
        ("facts", raising(RuntimeError("no CUDA driver")), "RuntimeError: no CUDA driver"),
        ("facts", lambda: Facts("2.9.0", 7, ()), "torch 2.9.0 finds no CUDA device in the teacher's environment"),
    ],
)
def test_an_exporter_says_why_it_cannot(fake, capsys, monkeypatch, part, replacement, refused):
    monkeypatch.setattr({"unusable": cuda_ipc, "Slab": cuda_slab, "facts": cuda_ipc_probe}[part], part, replacement)
    message = exported(monkeypatch, capsys, 0)
    assert (message.refused, message.exports) == (refused, {})
    assert answers(capsys, message) == [refused]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AttachError("reads 3 where 5 was written. Set plane=host, which goes by."), "reads 3 where 5 was written"),
        (AttachError("GPU-x cannot be read: CUDA error: boom\nCUDA kernel"), "GPU-x cannot be read: CUDA error: boom"),
        (ValueError("odd"), "ValueError: odd"),
        (ValueError(), "ValueError: "),
    ],
)
def test_an_importer_says_why_it_cannot_and_tries_the_next(fake, capsys, monkeypatch, error, reason):
    real, tried = cuda_slab.Opened, []

    def opened(export: cuda_slab.Export, device: torch.device) -> cuda_slab.Opened:
        tried.append(export)
        if len(tried) == 1:
            raise error
        return real(export, device)

    monkeypatch.setattr(cuda_slab, "Opened", opened)
    assert answers(capsys, exported(monkeypatch, capsys, 0, 1)) == [None, None, reason, None]


def test_gpus_without_peer_access_are_not_opened_and_a_gpu_needs_none_to_itself(fake, capsys, monkeypatch):
    message = exported(monkeypatch, capsys, 0, 1)
    monkeypatch.setattr(cuda_ipc_probe, "facts", lambda: OURS)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: False)
    monkeypatch.setattr(cuda_slab, "Opened", lambda export, device: opened.append(export))
    opened: list[object] = []
    reason = "no peer access (`nvidia-smi topo -p2p r` shows which GPUs have it)"
    assert answers(capsys, message) == [None, None, reason, None]
    assert len(opened) == 1


def test_an_importer_without_cuda_or_with_another_shmbridge_says_so_once(fake, capsys, monkeypatch):
    message = exported(monkeypatch, capsys, 0, 1)
    monkeypatch.setattr(cuda_ipc_probe, "facts", raising(RuntimeError("no driver")))
    assert answers(capsys, message) == [None, "RuntimeError: no driver"]
    cuda_ipc_probe.import_(b"[]")
    (answer,) = said(capsys, Answer)
    assert "garbled" in answer.reason and "teacher.python" in answer.reason


@pytest.mark.parametrize(
    ("teacher", "training", "device", "reason"),
    [
        ({}, {"gpus": ()}, 0, "torch 2.9.0 finds no CUDA device in training's environment"),
        (
            {"torch": "2.10.0"},
            {},
            0,
            "the teacher has torch 2.10.0, training has torch 2.9.0; .*install the same in both",
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
    monkeypatch.setattr(cuda_ipc_probe, "facts", lambda: ours)
    monkeypatch.setattr(cuda_slab, "Opened", lambda *_: pytest.fail("it was opened"))
    heard, found = answers(capsys, Exported(None, theirs, {device: msgspec.Raw(b"{}")}))
    assert heard is None
    assert re.search(reason, found)


# The command, where torch finds no GPU


def test_the_exporting_process_ends_when_it_is_told():
    with subprocess.Popen(
        [sys.executable, "-m", "shmbridge.plane.cuda_ipc_probe", "export", "0", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        message = msgspec.json.decode(next(iter(cuda_ipc_probe.messages(process.stdout))), type=Exported)
        assert message.refused == f"torch {torch.__version__} finds no CUDA device in the teacher's environment"
        assert message.facts == Facts(str(torch.__version__), cuda_ipc.pid_namespace(), ())
        process.stdin.close()
        assert process.wait(60) == 0
