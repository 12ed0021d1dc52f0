"""Which GPUs the launcher finds, with a made-up nvidia-smi and without one, and which it refuses."""

from __future__ import annotations

import time

import pytest

from launcher.cli.main import main
from launcher.planning import gpus, plane_choice
from launcher.planning.gpus import Gpu
from shmbridge import config
from shmbridge.errors import ConfigError
from tests.launcher import fake_gpus
from tests.launcher.test_planning import MACHINE, make


def test_nvidia_smi_tells_gpus_with_their_mode(tmp_path):
    found = gpus.discover(fake_gpus.nvidia_smi(tmp_path, fake_gpus.rows(2, "Exclusive_Process", mig=[1])))
    assert [(gpu.visible, gpu.free_bytes, gpu.compute_mode, gpu.mig) for gpu in found] == [
        ("0", 81000 * 2**20, "Exclusive_Process", False),
        ("1", 81000 * 2**20, "Exclusive_Process", True),
    ]


def test_an_nvidia_smi_that_hangs_is_no_machine_without_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "NVIDIA_SMI_LIMIT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"nvidia-smi gave no answer within 0.3 s.*persistence mode.*nvidia-smi -pm 1"
    ):
        gpus.discover(fake_gpus.nvidia_smi(tmp_path, "sleep 600"))
    assert time.monotonic() - began < 10
    monkeypatch.undo()
    assert gpus.NVIDIA_SMI_LIMIT_S == 60


def test_without_nvidia_smi_torch_finds_the_gpus(tmp_path):
    found = gpus.discover(fake_gpus.torch(tmp_path, 2))
    assert [(gpu.number, gpu.visible, gpu.total_bytes, gpu.free_bytes) for gpu in found] == [
        (0, "GPU-0000-0", 80 * 2**30, 79 * 2**30),
        (1, "GPU-0000-1", 80 * 2**30, 79 * 2**30),
    ]


def test_where_nvidia_smi_fails_and_torch_finds_none_its_words_are_told(tmp_path):
    environment = fake_gpus.torch(tmp_path, 0)
    fake_gpus.nvidia_smi(tmp_path, "echo Failed to initialize NVML: Driver/library version mismatch; exit 18")
    with pytest.raises(ConfigError, match=r"nvidia-smi failed \(exit code 18\): .*Driver/library version mismatch"):
        gpus.discover(environment)


EIGHT = tuple(Gpu(i, str(i), 80, 79, compute_mode="Exclusive_Process") for i in range(8))


@pytest.mark.parametrize(
    ("train", "changed", "message"),
    [
        ("7", {}, r"GPU 7 is in compute mode Exclusive_Process.*2 processes.*`sudo nvidia-smi -i 7 -c 0`"),
        ("0,0", {}, r"GPU 0 is in compute mode Exclusive_Process.*2 processes"),
        ("0", {"compute_mode": "Prohibited"}, r"GPU 7 is in compute mode Prohibited"),
        ("0", {"mig": True}, r"GPU 7 has MIG enabled.*`sudo nvidia-smi -i 7 -mig 0`"),
    ],
)
def test_a_gpu_that_a_run_cannot_use_is_refused_with_the_remedy(train, changed, message):
    with pytest.raises(ConfigError, match=message):
        make(
            "teacher.gpus='7'",
            f"train.gpus='{train}'",
            machine=MACHINE._replace(gpus=[gpu._replace(**changed) for gpu in EIGHT]),
        )


def test_the_command_refuses_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    for name, value in fake_gpus.nvidia_smi(tmp_path, fake_gpus.rows(1, "Exclusive_Process")).items():
        monkeypatch.setenv(name, value)
    assert main(["--teacher", "toy:build", "--teacher-gpu", "0", "--train-gpus", "0", "--", "train.py"]) == 2
    assert "teacher.gpus names GPU 0. GPU 0 is in compute mode Exclusive_Process" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_one_process_on_an_exclusive_gpu_is_allowed_and_named_where_the_trial_fails():
    make("teacher.gpus='7'", "train.gpus=0-6", machine=MACHINE._replace(gpus=EIGHT))
    chosen = plane_choice.by_trial(
        config.load(), plane_choice.gpu_pairs([EIGHT[7:]], EIGHT[:7]), lambda: "cudaErrorDevicesUnavailable"
    )
    assert "cudaErrorDevicesUnavailable; GPU 7 is in compute mode Exclusive_Process" in chosen.reason
