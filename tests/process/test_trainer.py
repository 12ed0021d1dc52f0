"""DistillationMixin in Trainer and in TRL's SFTTrainer, step by step against controls that share no code with it.

Two ranks train under the launcher; one rank trains in a process of the test's own.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import get_last_checkpoint

import shmbridge
from shmbridge.rank.bridge import Bridge
from shmbridge.teacher import huggingface
from tests.distilling import TOLERANCE, VOCAB, WORDS, At, Case, compare, control, distilled, save_teacher
from tests.harness import Child, bench, until
from tests.process.test_host import finish, launch

with_trl = pytest.mark.skipif(
    find_spec("trl") is None or find_spec("peft") is None, reason="trl and peft are not installed"
)
pytestmark = pytest.mark.filterwarnings("default")  # those of the hosts

CASES: dict[str, dict[str, Any]] = {
    "padded": {"args": {"gradient_accumulation_steps": 4, "num_train_epochs": 2}, "evaluate": 2, "metrics": True},
    "top k with cross entropy": {"distillation": {"loss": "topk", "ce_weight": 0.5, "temperature": 2.0}, "evaluate": 3},
    "tied, without a length": {
        "tied": True,
        "distillation": {"loss": "jsd"},
        "iterable": True,
        "args": {"max_steps": 7, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    },
    "fsdp": {"fsdp": True, "args": {"gradient_accumulation_steps": 2}},
    "lora, packed": {
        "lora": True,
        "distillation": {"loss": "reverse_kl"},
        "trainer": "sft",
        "args": {"packing": True, "max_length": 32},
        "rows": 60,
        "evaluate": 3,
    },
    "on-policy": {
        "distillation": {"on_policy": 0.5, "max_new_tokens": 6, "look_ahead": 0},
        "args": {"gradient_accumulation_steps": 2},
        "evaluate": 2,
    },
}
MATRIX: dict[str, dict[str, Any]] = {
    f"{trainer}, {loss}, accumulation {accumulation}": {
        "trainer": trainer,
        "distillation": {"loss": loss, "ce_weight": 0.5 * (accumulation == 4)},
        "args": {"gradient_accumulation_steps": accumulation},
        "evaluate": 3,
        "tied": loss == "jsd",
    }
    for trainer in ("trainer", "sft")
    for loss in ("forward_kl", "reverse_kl", "jsd")
    for accumulation in (1, 4)
} | {
    "padding-free": {"trainer": "sft", "args": {"padding_free": True, "max_length": None}, "evaluate": 3},
    "packed, accumulation 4": {
        "trainer": "sft",
        "args": {"packing": True, "max_length": 32, "gradient_accumulation_steps": 4},
        "rows": 90,
        "metrics": True,
        "evaluate": 1,
    },
    **{
        f"on-policy, {trainer}, accumulation {accumulation}": {
            "trainer": trainer,
            "distillation": {"on_policy": 0.6, "max_new_tokens": 6, "look_ahead": 0, "loss": "jsd", "temperature": 2.0},
            "args": {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2},
            "evaluate": 3,
            "lora": trainer == "sft",
            "tied": True,
        }
        for trainer in ("trainer", "sft")
        for accumulation in (1, 4)
    },
    "top k": {"distillation": {"loss": "topk", "temperature": 2.0}, "args": {"gradient_accumulation_steps": 4}},
    "lora, padded": {"lora": True, "args": {"gradient_accumulation_steps": 4}},
    "fsdp, tied, accumulation 4": {"fsdp": True, "tied": True, "args": {"gradient_accumulation_steps": 4}},
    "fsdp, checkpointing": {"fsdp": True, "args": {"gradient_checkpointing": True}, "evaluate": 2, "metrics": True},
    "rows without a label": {
        "unlabelled": 2,
        "args": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "ddp_find_unused_parameters": False,
        },
    },
    "one row": {"rows": 1, "args": {"num_train_epochs": 3}},
    "no look-ahead": {"distillation": {"look_ahead": 0}, "args": {"gradient_accumulation_steps": 4}, "evaluate": 1},
    "far ahead": {"distillation": {"look_ahead": 7}, "args": {"num_train_epochs": 2}, "evaluate": 2},
    "unused parameters": {"args": {"ddp_find_unused_parameters": True, "gradient_accumulation_steps": 2}},
    "tokens of each rank": {"args": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}},
    "evaluated first": {"args": {"eval_on_start": True, "num_train_epochs": 2}, "evaluate": 2},
    "a loss that Trainer does not want": {"args": {"label_names": ["labels", "others"]}, "evaluate": 2},
    "workers": {"args": {"dataloader_num_workers": 2, "num_train_epochs": 2}},
}
HIDDEN = ("payload.hidden={}", f"payload.topk={{k: {WORDS}, temperatures: [1, 2]}}")
LOGITS = ("payload.logits={dtype: float32}", f"payload.topk={{k: {WORDS}, temperatures: [1, 2]}}")
STREAM = "payload.stream={chunk_positions: 16}"


def under_the_launcher(directory: Path, cases: Mapping[str, Any], *settings: str) -> list[str]:
    """The arguments of `launch` for tests/scripts/distil.py; a teacher is saved for it."""
    directory.mkdir(exist_ok=True)
    (directory / "cases.json").write_text(json.dumps(cases))
    model = ["--teacher", str(save_teacher(directory)), "teacher.dtype=float32", "ring.max_tokens=512"]
    return [*model, *settings, "--", "distil.py", str(directory)]


def check(directory: Path, cases: Mapping[str, Any]) -> None:
    """Each case of both ranks against its control."""
    for rank in range(2):
        found = json.loads((directory / f"rank-{rank}.json").read_text())
        assert list(found) == list(cases)
        for name, logs in found.items():
            compare(logs["distilled"], logs["control"], f"rank {rank}, {name}")


LONG = {"save_strategy": "steps", "save_steps": 1000, "num_train_epochs": 4, "gradient_accumulation_steps": 2}
KILLED = {
    "killed": {
        "resume": True,
        "at": [3, "die", "on_substep_end"],
        "args": {**LONG, "save_steps": 2, "num_train_epochs": 2},
        "dropout": 0.1,
        "evaluate": 2,
        "metrics": True,
    },
}


@with_trl
@pytest.mark.parametrize(
    ("number", "code", "accumulation", "at", "saved_at"),
    [
        (signal.SIGTERM, 143, 1, [3, "stop one", "on_step_begin"], 4),
        pytest.param(signal.SIGINT, 130, 2, [3, "wait", "on_substep_end"], 3, marks=pytest.mark.matrix),
    ],
    ids=["SIGTERM", "SIGINT"],
)
def test_two_ranks_train_as_their_controls_and_so_when_stopped_killed_and_resumed(
    tmp_path, number, code, accumulation, at, saved_at
):
    """Losses, gradient norms, learning rates and evaluations of every step, first with hidden states and one slot.

    The last case is stopped by a signal to the launcher. A second run, with a stream of logits, resumes it from the checkpoint of
    the stop, and then has a rank killed, which --train-restarts starts again.
    """
    stopped = {"args": {**LONG, "gradient_accumulation_steps": accumulation}, "dropout": 0.1}
    first = {**CASES, "stopped": {**stopped, "at": at}}
    with launch(tmp_path, *under_the_launcher(tmp_path, first, *HIDDEN, "ring.depth=1")) as job:
        for file in ("rank-1.json", "training-1"):  # the first case is done, and the last one has begun
            until(lambda file=file: (tmp_path / file).exists() or job.poll() is not None, file)
        job.send_signal(number)
        output, _ = job.communicate(timeout=40)  # less than timeouts.save_s
    assert job.returncode == code, output
    check(tmp_path, CASES)
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [f"checkpoint-{saved_at}"], output
    second = {"stopped": {**stopped, "resume": True}, **KILLED}
    settings = (*LOGITS, STREAM, "ring.depth=2")
    finish(tmp_path, "--train-restarts", "1", *under_the_launcher(tmp_path, second, *settings))
    check(tmp_path, second)


@with_trl
@pytest.mark.matrix
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((*HIDDEN, STREAM, "ring.depth=3"), id="hidden-streamed"),
        pytest.param((*LOGITS, "ring.depth=1"), id="logits"),
    ],
)
def test_two_ranks_train_as_their_controls(tmp_path, settings):
    finish(tmp_path, *under_the_launcher(tmp_path, MATRIX, *settings))
    check(tmp_path, MATRIX)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("models"))


def one_rank(saved: Path, body: Callable[[Any], Any], *settings: str) -> None:
    """body(bridge) in a process of its own, beside the teacher."""
    model = [f"teacher.model={saved}", "teacher.dtype=float32", "ring.max_tokens=512"]
    with bench(1, *model, *settings) as it:
        it.teacher(huggingface.HuggingFaceTeacher(it.settings, torch.device("cpu"), lambda *_: None))
        assert it.rank(0, body).join() == 0


PAYLOADS = {"hidden": HIDDEN[0], "logits": LOGITS[0], "topk": HIDDEN[1]}


@pytest.mark.matrix
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("stream", [(), (STREAM,)], ids=["whole", "streamed"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_one_rank_trains_evaluates_and_predicts_as_its_control(saved, tmp_path, payload, stream, depth):
    losses = ["topk"] if payload == "topk" else ["forward_kl", "reverse_kl", "jsd"]
    cases = {
        f"{loss}, accumulation {accumulation}": Case(
            distillation={"loss": loss, "ce_weight": 0.5, "temperature": 2.0},
            args={"gradient_accumulation_steps": accumulation, "num_train_epochs": 2},
            evaluate=2,
            metrics=True,
            dropout=0.1,
        )
        for loss in losses
        for accumulation in (1, 4)
    }

    def body(bridge):
        for name, case in cases.items():
            found = []
            for build in (partial(distilled, bridge=bridge), partial(control, teacher=saved)):
                trainer = build(case, tmp_path)  # seeds the random generators, which dropout draws from
                trainer.train()
                step = {"step": trainer.state.global_step}
                evaluated = trainer.evaluate(), trainer.predict(trainer.eval_dataset).metrics
                found.append([*trainer.state.log_history, *({**metrics, **step} for metrics in evaluated)])
            compare(*found, case=name)

    one_rank(saved, body, PAYLOADS[payload], *stream, f"ring.depth={depth}")


def test_interrupted_trainings_leave_nothing_in_flight_and_saved_ones_nothing_of_ours(saved, tmp_path):
    """An error in the loop, then a batch size that is found, and early stopping, over one bridge with one slot."""

    def out_of_memory():
        raise RuntimeError("CUDA out of memory. Raised by the test")

    def both(name: str, case: Case, callback: Callable[[], Any]) -> None:
        """The logs and the saved files of the two."""
        logs, files = [], []
        for trainer in (
            distilled(case, tmp_path / name, bridge=bridges[0]),
            control(case, tmp_path / f"{name}-control", saved),
        ):
            trainer.add_callback(callback())
            trainer.train()
            logs.append(trainer.state.log_history)
            out = Path(trainer.args.output_dir)
            files.append({path.relative_to(out) for path in out.rglob("*")})
        compare(*logs, case=name)
        assert files[0] == files[1]

    bridges = []

    def body(bridge):
        bridges.append(bridge)
        trainer = distilled(Case(args={"gradient_accumulation_steps": 2}), tmp_path, bridge=bridge)
        trainer.add_callback(At(2, lambda: 1 // 0, "on_substep_end"))
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        until(lambda: bridge.free_slots == 1, "the slot of the training's last request")

        finds = Case(args={"auto_find_batch_size": True, "num_train_epochs": 2})
        both("finds a batch size", finds, lambda: At(3, out_of_memory))
        best = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "num_train_epochs": 4}
        stops = Case(args=best, evaluate=2)
        both("stops early", stops, lambda: EarlyStoppingCallback(1, early_stopping_threshold=10.0))
        until(lambda: bridge.free_slots == 1, "the slot of the last training")

    one_rank(saved, body, HIDDEN[0], "ring.depth=1")


@pytest.mark.matrix
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("look_ahead", [None, 0])
@pytest.mark.parametrize(
    ("trainer", "iterable"), [("trainer", False), ("trainer", True), pytest.param("sft", False, marks=with_trl)]
)
def test_a_resumed_training_is_as_an_undisturbed_one(saved, tmp_path, trainer, iterable, look_ahead, accumulation):
    case = Case(
        trainer=trainer,
        args={
            "save_strategy": "steps",
            "save_steps": 2,
            "gradient_accumulation_steps": accumulation,
            **({"max_steps": 9} if iterable else {"num_train_epochs": 3}),
        },
        distillation={"look_ahead": look_ahead},
        rows=120
        if iterable
        else 29,  # Trainer cannot tell where an epoch of an unsized data set ends, and skips too much
        iterable=iterable,
        dropout=0.1,
        evaluate=3,
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


def test_a_training_stopped_in_an_evaluation_goes_on_as_an_undisturbed_one(saved, tmp_path):
    """The stop saves a checkpoint, though an earlier run has left one of the same step."""
    case = Case(args={"save_strategy": "steps", "save_steps": 100}, dropout=0.1, evaluate=2)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").touch()

    def losses(trainer: Trainer) -> list[dict[str, Any]]:
        return [logs for logs in trainer.state.log_history if "loss" in logs]

    def body(bridge):
        stopped = distilled(case, tmp_path, bridge=bridge)
        stopped.add_callback(At(4, partial(os.kill, os.getpid(), signal.SIGTERM), "on_prediction_step"))
        with pytest.raises(shmbridge.RunStopped, match="checkpoint-4"):
            stopped.train()
        resumed = distilled(case, tmp_path, bridge=Bridge(bridge.give_way()))
        resumed.train(resume_from_checkpoint=get_last_checkpoint(tmp_path))
        undisturbed = control(case, tmp_path / "control", saved)
        undisturbed.train()
        compare(losses(resumed), losses(undisturbed), "resumed")

    one_rank(saved, body, HIDDEN[0])


@with_trl
def test_without_a_teacher_the_loss_is_the_hosts_own(saved, tmp_path, monkeypatch):
    """As under shmbridge-launch --no-teacher; and where there is no launcher, the error says the command."""
    monkeypatch.setenv("SHMBRIDGE_SESSION", "off")

    def body():
        for host in ("trainer", "sft"):
            case = Case(trainer=host, args={"gradient_accumulation_steps": 4}, evaluate=1)
            trainers = distilled(case, tmp_path), control(case, tmp_path, None)
            for trainer in trainers:
                trainer.train()
            compare(*(trainer.state.log_history for trainer in trainers), case=host)

    assert Child(body).join() == 0
    monkeypatch.delenv("SHMBRIDGE_SESSION")
    with pytest.raises(shmbridge.NotLaunched, match="shmbridge-launch --teacher MODEL"):
        distilled(Case(), tmp_path)


def test_without_replies_the_loss_is_the_cross_entropy(saved, tmp_path):
    """on_teacher_lost=continue: a lost teacher leaves the host's own loss, and nothing is learned from a sample."""
    settings = (f"teacher.model={saved}", "teacher.dtype=float32", "ring.max_tokens=512", *HIDDEN)
    candidates = ("payload.logprobs={candidates: 4}", "on_teacher_lost=continue", "teacher.restarts=0")

    def body(bridge):
        bridge.wait_ready()
        until(lambda: bridge.exchange(torch.ones(1, 2, dtype=torch.int64)).missing, "the loss of the teacher")
        case = Case(distillation={"ce_weight": 0.5, "kd_weight": 3.0}, evaluate=2)
        logs = []
        for trainer in (distilled(case, tmp_path, bridge=bridge), control(case, tmp_path, None)):
            trainer.train()
            logs.append(trainer.state.log_history)
        compare(*logs, "forward_kl")
        for loss in ("reverse_kl", "candidate_reverse_kl"):
            samples = {"loss": loss, "on_policy": 1.0, "max_new_tokens": 4, "look_ahead": 0}
            trainer = distilled(Case(distillation=samples), tmp_path, bridge=bridge)
            trainer.train()
            first, *others = (logs["loss"] for logs in trainer.state.log_history if "loss" in logs)
            assert first == 0.0  # it was sampled before its reply was found to be missing
            assert min(others) > 0.0

    with bench(1, *settings, *candidates) as it:
        teacher = it.teacher(huggingface.HuggingFaceTeacher(it.settings, torch.device("cpu"), lambda *_: None))
        rank = it.rank(0, body)
        until(lambda: it.owner.lanes[0].records[0].sequence, "a reply")
        teacher.kill()
        teacher.join()
        it.owner.control.teachers[0].lost = True
        it.owner.ring_all()
        assert rank.join() == 0


REFUSED = [
    (Case(args={"label_smoothing_factor": 0.1}), (), "label_smoothing_factor"),
    pytest.param(Case(trainer="sft", args={"loss_type": "dft"}), (), "loss_type", marks=with_trl),
    (
        Case(iterable=True, args={"max_steps": 2, "accelerator_config": {"dispatch_batches": True}}),
        (),
        "dispatch_batches",
    ),
    (Case(distillation={"loss": "topk"}), (), "payload.topk"),
    (Case(distillation={"loss": "topk", "temperature": 3.0}), (HIDDEN[1],), "payload.topk.temperatures"),
    (Case(), (HIDDEN[1],), "payload.hidden"),
    (Case(), ("payload.logprobs={}",), "payload.hidden"),
]


@pytest.mark.parametrize(("case", "settings", "named"), REFUSED)
def test_what_cannot_be_had_is_refused_and_named(saved, tmp_path, case, settings, named):
    def body(bridge):
        with pytest.raises((ValueError, shmbridge.RequestRefused), match=named):
            distilled(case, tmp_path, bridge=bridge).train()

    one_rank(saved, body, *settings)


def test_the_log_has_the_parts_of_the_loss_and_the_waits(saved, tmp_path):
    case = Case(distillation={"ce_weight": 0.5, "kd_weight": 2.0}, args={"gradient_accumulation_steps": 2}, evaluate=2)

    def body(bridge):
        trainer = distilled(case, tmp_path, bridge=bridge)
        trainer.train()
        for logs in trainer.state.log_history[:-1]:
            prefix = "eval_" if "eval_loss" in logs else ""
            whole = 2.0 * logs[f"{prefix}kd/kl"] + 0.5 * logs[f"{prefix}kd/ce"]
            if not prefix:  # of an evaluation the loss is a mean over micro-batches, and kd/kl one over tokens
                assert logs["loss"] == pytest.approx(whole, rel=TOLERANCE)
            assert logs[f"{prefix}shmbridge/wait_s"] >= 0
            assert 0 <= logs[f"{prefix}shmbridge/hidden_share"] <= 1

    one_rank(saved, body, HIDDEN[0])


def test_logits_of_a_batch_are_never_whole(saved, tmp_path):
    """With hidden states from the teacher, no tensor of the training is larger than the chunks and the heads."""
    case = Case(longest=100, rows=12, distillation={"chunk_rows": 4, "ce_weight": 0.5}, evaluate=2)
    largest = 48 * VOCAB  # the head of the teacher; a batch has more than twice as many tokens

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            made = operation(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB,):
                    assert tensor.numel() <= largest, f"{operation} made {tuple(tensor.shape)}"
                    seen.append(tensor.numel())
            return made

    seen: list[int] = []

    def body(bridge):
        trainer = distilled(case, tmp_path, bridge=bridge)
        bridge.wait_ready()
        with Watch():
            trainer.train()
        assert 4 * VOCAB in seen

    one_rank(saved, body, HIDDEN[0])
