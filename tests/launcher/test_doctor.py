"""`shmbridge-launch doctor`: each check on simulated facts, the command on this machine, and its section in a failure report."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.cli.main import main
from launcher.doctor import checks, command, gpu, host
from launcher.doctor.checks import Fact, Finding
from launcher.planning import gpus
from launcher.process import cuda_ipc_trial
from launcher.process.signals import Stopped
from tests.launcher import fake_gpus
from tests.launcher.running import faked, launch
from tests.launcher.test_sessions import dead_session, own_world

__all__ = ["own_world"]

TRIED = "opened, read and checked between GPU 1 and GPU 0"


@pytest.fixture
def look(tmp_path, monkeypatch):
    """The facts of the GPUs by name, over a made-up torch and perhaps a made-up nvidia-smi. The trial says `reason`."""

    def look(torch_gpus: int, smi: str = "", *, strangers=(), reason: str | None = None, **variables: str):
        environment = fake_gpus.torch(tmp_path, torch_gpus, strangers)
        if smi:
            fake_gpus.nvidia_smi(tmp_path, smi)
            environment["PATH"] += ":/bin:/usr/bin"
        monkeypatch.setattr(cuda_ipc_trial, "run", lambda pairs, exporters, importer, signals: reason)
        return {one.name: one for one in gpu.facts(lambda note: None, {**environment, **variables})}

    return look


def test_two_gpus_in_order(look):
    found = look(2, fake_gpus.rows(2))
    assert {one.status for one in found.values()} == {"ok"}
    assert found["driver"].found == "550.54.15"
    assert found["cuda"].found == "torch is built for CUDA 12.8, and finds 2 GPUs"
    assert found["gpus"].found == "2 GPUs: NVIDIA H100 80GB HBM3 with 79.6 GiB; compute mode Default"
    assert found["peer_access"].found == "between all 2 GPUs"
    assert found["cuda_ipc"].found == TRIED


def test_without_nvidia_smi_torch_tells_the_gpus(look):
    found = look(1)
    assert found["gpus"] == Fact(
        "gpus", "ok", "1 GPU: NVIDIA H100 with 80.0 GiB; told by torch: there is no nvidia-smi"
    )
    assert found["cuda_ipc"].found == "opened, read and checked between GPU 0 and GPU 0", "one GPU, two processes"


@pytest.mark.parametrize(
    ("smi", "name", "status", "told", "remedy"),
    [
        ("sleep 600", "gpus", "fault", "nvidia-smi gave no answer within 0.5 s", "nvidia-smi -pm 1"),
        ("sleep 600", "cuda", "warning", "torch was not asked", "nvidia-smi -pm 1"),
        (
            "echo version mismatch; exit 18",
            "gpus",
            "fault",
            "nvidia-smi failed (exit code 18): version",
            "Mend the driver",
        ),
        (fake_gpus.rows(2, "Exclusive_Process"), "gpus", "warning", "Exclusive_Process", "sudo nvidia-smi -c 0"),
        (fake_gpus.rows(2, "Prohibited"), "gpus", "warning", "Prohibited", "sudo nvidia-smi -i 0 -c 0"),
        (fake_gpus.rows(2, mig=[1]), "gpus", "warning", "MIG on GPU 1", "sudo nvidia-smi -i 1 -mig 0"),
        (fake_gpus.rows(3), "cuda", "warning", "finds 2 GPUs where nvidia-smi finds 3", "Xid"),
    ],
)
def test_what_nvidia_smi_says_has_a_remedy(look, monkeypatch, smi, name, status, told, remedy):
    monkeypatch.setattr(gpus, "NVIDIA_SMI_LIMIT_S", 0.5)
    found = look(2, smi)[name]
    assert found.status == status
    assert told in found.found
    assert remedy in found.remedy


def test_a_torch_that_finds_no_gpu_beside_a_driver_is_a_fault(look):
    found = look(0, fake_gpus.rows(1))["cuda"]
    assert (found.status, found.found) == (
        "fault",
        "torch is built for CUDA 12.8, and finds no GPUs: it gives no reason",
    )
    assert "a torch for an older CUDA" in found.remedy


def test_a_torch_that_cannot_be_imported_is_a_fault(tmp_path):
    environment = fake_gpus.torch(tmp_path, 0)
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    found = {one.name: one for one in gpu.facts(lambda note: None, environment)}
    assert found["cuda"].status == "fault"
    assert "ImportError: libcudart.so.12: cannot open shared object file" in found["cuda"].found
    assert "-c 'import torch'" in found["cuda"].remedy
    assert found["cuda_ipc"].found == "not tried: no GPU"


def test_hidden_gpus_are_no_fault(look):
    found = look(0, fake_gpus.rows(2), CUDA_VISIBLE_DEVICES="")
    assert {one.status for one in found.values()} == {"ok"}
    assert "none that CUDA_VISIBLE_DEVICES='' allows" in found["gpus"].found


def test_gpus_without_peer_access_and_a_trial_that_fails_are_warnings(look):
    found = look(3, fake_gpus.rows(3), strangers=[[0, 2]], reason="GPU 2 and GPU 0: no peer access")
    assert found["peer_access"].found == "none between 1 pair of GPUs: 0-2"
    assert found["cuda_ipc"].found == "GPU 2 and GPU 0: no peer access"
    for name in ("peer_access", "cuda_ipc"):
        assert found[name].status == "warning"
        assert "host memory" in found[name].remedy


def test_the_trials_processes_see_what_those_of_a_run_would(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        cuda_ipc_trial, "run", lambda pairs, exporters, importer, signals: asked.extend([*exporters, importer])
    )
    environment = fake_gpus.torch(tmp_path, 2) | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    gpu.facts(lambda note: None, environment)
    exporter, importer = asked
    assert exporter.argv[1:] == ("-m", "shmbridge.plane.cuda_ipc_probe", "export")
    assert exporter.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0000-1,GPU-0000-0"
    assert importer.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0000-0,GPU-0000-1"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in exporter.environment


def test_a_signal_during_the_trial_ends_the_command(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(cuda_ipc_trial, "run", stop)
    for name, value in fake_gpus.torch(tmp_path, 2).items():
        monkeypatch.setenv(name, value)
    assert command.main(as_json=True) == 128 + signal.SIGINT
    assert not capsys.readouterr().out


def test_every_fact_is_documented_by_its_name():
    """docs/doctor.md, whose first column is what --json promises."""
    rows = [line.split("|")[1].strip(" `") for line in Path("docs/doctor.md").read_text().splitlines() if "|" in line]
    assert tuple(rows[2:]) == command.NAMES


# The machine


def test_a_small_or_foreign_shm_is_a_warning_and_none_is_a_fault(tmp_path, monkeypatch):
    mounts = tmp_path / "self" / "mounts"
    mounts.parent.mkdir()
    mounts.write_text("tmpfs /dev/shm tmpfs rw 0 0\n")
    monkeypatch.setattr(host, "_PROC", tmp_path)
    stat = SimpleNamespace(f_blocks=16384, f_bavail=16384, f_frsize=4096, f_flag=0)
    monkeypatch.setattr(os, "statvfs", lambda path: stat)
    found = host.shm()
    assert found[:2] == ("warning", "/dev/shm: 64.0 MiB, 64.0 MiB free, tmpfs")
    assert "docker run --shm-size" in found.remedy
    mounts.write_text("overlay / overlay rw 0 0\n")
    assert "tmpfs" in host.shm().remedy
    stat.f_flag = os.ST_RDONLY
    assert host.shm().status == "fault"


def test_a_host_name_that_does_not_resolve_is_a_warning(monkeypatch):
    def fail(*arguments):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostname", lambda: "pod-7")
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert host.host_name()[:2] == ("warning", "pod-7 does not resolve (Name or service not known)")
    assert "/etc/hosts" in host.host_name().remedy


def test_gpus_on_the_bus_without_a_driver_are_a_warning(tmp_path, monkeypatch):
    for number, (vendor, kind) in enumerate([("0x10de", "0x030200"), ("0x10de", "0x0c0330"), ("0x8086", "0x030000")]):
        device = tmp_path / "bus/pci/devices" / str(number)
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    monkeypatch.setattr(host, "_SYS", tmp_path)
    monkeypatch.setattr(host, "_PROC", tmp_path)
    monkeypatch.setattr(host, "_DEV", tmp_path)
    assert host.driver()[:2] == ("warning", "none, though the PCI bus has 1 NVIDIA GPU")
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    (tmp_path / "driver/nvidia/version").write_text(line)
    assert host.driver() == Finding("ok", "550.54.15")


def test_a_refused_pidfd_is_a_fault(monkeypatch):
    def refuse(pid):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert host.pidfd()[:2] == ("fault", "refused: Operation not permitted")


@pytest.mark.parametrize(("missing", "status"), [("accelerate", "warning"), ("PyYAML", "fault")])
def test_a_missing_package_is_named(monkeypatch, missing, status):
    version = host._version
    monkeypatch.setattr(host, "_version", lambda package: "" if package == missing else version(package))
    found = host.packages()
    assert (found.status, found.remedy) == (status, f"pip install {missing}")
    assert found.found.startswith(f"without {missing}; ")


def test_a_dead_session_is_a_warning_and_is_left_alone(own_world):
    assert host.sessions() == Finding("ok", "none dead")
    dead_session(own_world)
    for _ in range(2):
        assert host.sessions() == Finding("warning", "1 dead, with objects in /dev/shm", "shmbridge-launch clean")


# How checks are run, and told


def test_no_check_can_fail_or_hang_its_caller():
    def raises():
        raise ValueError("odd")

    def hangs():
        time.sleep(30)
        return Finding("ok", "late")

    def answers():
        return Finding("ok", "yes")

    began = time.monotonic()
    assert checks.gather([raises, hangs, answers], 0.3) == [
        Fact("raises", "warning", "not known: ValueError: odd"),
        Fact("hangs", "warning", "not known: no answer within 0.3 s"),
        Fact("answers", "ok", "yes"),
    ]
    assert time.monotonic() - began < 5


def test_the_table_is_aligned_wrapped_and_coloured_on_a_terminal_alone():
    facts = [Fact("python", "ok", "3.11"), Fact("pid_namespace", "warning", "a b " * 20, "c d " * 20)]
    plain = command.page(facts).splitlines()
    assert len(plain) == 3
    assert plain[0].index("3.11") == plain[1].index("a b") == plain[2].index("-> c d")
    wrapped = command.page(facts, width=80).splitlines()
    assert len(wrapped) > 4
    assert max(map(len, wrapped)) <= 80
    assert "\033" not in command.page(facts)
    assert "\033[33mwarning\033[0m  pid namespace" in command.page(facts, coloured=True)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("fault", 1)])
def test_the_exit_code_tells_of_a_fault_alone(monkeypatch, capsys, status, code):
    one = Fact("shm", status, "found", "" if status == "ok" else "remedy")
    monkeypatch.setattr(command, "_all", lambda: [one, Fact("python", "ok", "3.11")])
    assert main(["doctor", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == status
    assert told["facts"][0] == {"name": "shm", "status": status, "found": "found", "remedy": one.remedy}
    assert main(["doctor"]) == code
    assert capsys.readouterr().out.endswith(f"\n2 checks: {'all ok' if status == 'ok' else f'1 {status}'}\n")


def test_the_command_on_this_machine(tmp_path):
    with launch(tmp_path, "doctor", "--json", CUDA_VISIBLE_DEVICES="") as run:  # on GPUs the trial would take long
        code = run.wait()
        told = json.loads(run.text)
    assert [one["name"] for one in told["facts"]] == list(command.NAMES)
    assert code == (told["status"] == "fault")
    assert not [one for one in told["facts"] if "not known" in one["found"]]
    assert [one["name"] for one in told["facts"] if one["status"] != "ok" and not one["remedy"]] == []


def test_a_failure_report_has_the_facts_that_cost_nothing(tmp_path):
    with faked(tmp_path, training="exit7") as run:
        assert run.wait() == 7
        text = (run.path / "report.txt").read_text()
        told = json.loads((run.path / "report.json").read_text())
        assert [one["name"] for one in told["machine"]] == [check.__name__ for check in host.CHECKS]
        assert "\n    ok       python         3." in text
        assert "    ok       pidfd          works\n" in text
        assert "pidfd          works" not in run.text, "the terminal shows what is not ok"
        assert (tmp_path / told["path"]).read_text() == text
