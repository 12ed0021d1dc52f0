"""OnPolicyDistillationMixin: what tests/process/test_trainer.py's cases do not show."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import get_last_checkpoint

import shmbridge
from shmbridge.integrations.transformers import OnPolicyDistillationConfig
from tests.distilling import CANDIDATES, At, Case, compare, control, distilled, save_teacher
from tests.process.test_trainer import HIDDEN, STREAM, one_rank

pytestmark = pytest.mark.filterwarnings("default")  # those of the hosts

LOGPROBS = f"payload.logprobs={{candidates: {CANDIDATES}}}"
CANDIDATE_LOSS = {"loss": "candidate_reverse_kl", "on_policy": 0.5, "max_new_tokens": 6, "look_ahead": 0}
STEPS: dict[str, Any] = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("models"))


def test_the_loss_on_the_students_candidates_is_that_of_its_control(saved, tmp_path):
    """With the sampled token in the steps that sample, without it in the others and in evaluations. The second training samples
    one window ahead; its student does not change, so that the control needs no student of an earlier step."""
    still = {**STEPS, "learning_rate": 0.0}
    cases = {
        "in turn": Case(args=STEPS, distillation=CANDIDATE_LOSS, evaluate=2),
        "ahead": Case(args=still, distillation={**CANDIDATE_LOSS, "look_ahead": None, "on_policy": 1.0}),
    }

    def body(bridge):
        for name, case in cases.items():
            logs = []
            for build in (partial(distilled, bridge=bridge), partial(control, teacher=saved)):
                trainer = build(case, tmp_path)
                trainer.train()
                logs.append(trainer.state.log_history)
            compare(*logs, case=name)
            steps = [entry for entry in logs[0] if "loss" in entry]
            sampled = [entry for entry in steps if "on_policy/kl" in entry]
            assert len(sampled) == len(steps) if name == "ahead" else 0 < len(sampled) < len(steps)
            assert (
                sum(entry.get("on_policy/generate_s", 0.0) for entry in steps) > 0
            )  # when it is spent, which may be a step ahead
            for entry in sampled:
                assert entry["on_policy/kl"] == pytest.approx(entry["loss"], rel=1e-5)
                assert 1 <= entry["on_policy/new_tokens"] <= 6

    one_rank(saved, body, LOGPROBS, "ring.depth=1")


@pytest.mark.matrix
def test_a_resumed_training_samples_what_an_undisturbed_one_samples(saved, tmp_path):
    case = Case(
        args={**STEPS, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3},
        distillation={"on_policy": 0.7, "max_new_tokens": 6, "look_ahead": 0},
        dropout=0.1,
    )

    def body(bridge):
        killed = distilled(case, tmp_path, bridge=bridge)
        killed.add_callback(At(5, lambda: 1 // 0))
        with pytest.raises(ZeroDivisionError):
            killed.train()
        resumed = distilled(case, tmp_path, bridge=bridge)
        resumed.train(resume_from_checkpoint=get_last_checkpoint(tmp_path))
        undisturbed = control(case, tmp_path / "control", saved)
        undisturbed.train()
        compare(resumed.state.log_history, undisturbed.state.log_history, "resumed")

    one_rank(saved, body, HIDDEN[0])


ON_POLICY = {"on_policy": 1.0, "max_new_tokens": 4}
REFUSED: list[tuple[Case, tuple[str, ...], str]] = [
    (Case(trainer="sft", args={"packing": True, "max_length": 32}, distillation=ON_POLICY), (HIDDEN[0],), "packing"),
    (Case(distillation=ON_POLICY, prompts=False), (HIDDEN[0],), "has no prompt"),
    (Case(distillation=CANDIDATE_LOSS), (HIDDEN[0],), "payload.logprobs"),
    (Case(distillation=CANDIDATE_LOSS), (LOGPROBS, STREAM), "payload.stream"),
]


@pytest.mark.parametrize(("case", "settings", "named"), REFUSED, ids=[named for _, _, named in REFUSED])
def test_what_cannot_be_sampled_is_refused_and_named(saved, tmp_path, case, settings, named):
    def body(bridge):
        with pytest.raises((ValueError, shmbridge.RequestRefused), match=named):
            distilled(case, tmp_path, bridge=bridge).train()

    one_rank(saved, body, *settings)


@pytest.mark.parametrize(
    ("setting", "value", "others"),
    [
        ("on_policy", 1.5, {}),
        ("max_new_tokens", 0, {}),
        ("sampling_temperature", 0.0, {}),
        ("loss", "kl", {}),
        ("ce_weight", 0.5, {"loss": "candidate_reverse_kl"}),
        ("temperature", 2.0, {"loss": "candidate_reverse_kl"}),
        ("sampling_temperature", 0.9, {"loss": "candidate_reverse_kl"}),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_and_named(setting, value, others):
    with pytest.raises(ValueError, match=f"OnPolicyDistillationConfig.{setting} is {value!r}"):
        OnPolicyDistillationConfig(**{setting: value, **others})
