"""A custom teacher: where it is found, what it offers, and what cannot be sent."""

from __future__ import annotations

import pytest
import torch

from shmbridge import config
from shmbridge.errors import ConfigError, PlanError
from shmbridge.output_spec import OutputSpec
from shmbridge.teacher import output_discovery
from shmbridge.teacher.batch import Batch
from shmbridge.teacher.main import build

CPU = torch.device("cpu")


def offered(forward, *overrides: str):
    return output_discovery.make(forward, config.load(overrides=["teacher.model=m:own", *overrides]), CPU)[0].outputs


def test_a_probe_finds_dtype_shape_and_the_axis_of_the_sequence():
    def forward(batch):
        rows, seq = batch.input_ids.shape
        return {
            "logits": torch.zeros(rows, seq, 11, dtype=torch.bfloat16),
            "value": torch.zeros(rows),
            "square": torch.zeros(rows, 4, 5, dtype=torch.int8),  # 4 is the first probe's length, not the second's
        }

    assert offered(forward) == (
        OutputSpec("logits", "bfloat16", ("seq", 11)),
        OutputSpec("value", "float32", ()),
        OutputSpec("square", "int8", (4, 5)),
    )


def test_declared_outputs_are_held_to_their_word():
    forward = lambda batch: {"h": torch.zeros(*batch.input_ids.shape, 3)}  # noqa: E731
    declare = "teacher.outputs={h: {dtype: float16, shape: [seq, %d]}}"
    assert offered(forward, declare % 3) == (OutputSpec("h", "float16", ("seq", 3)),)
    with pytest.raises(PlanError, match="returned 'h' as torch.float32; int32 was offered"):
        offered(forward, "teacher.outputs={h: {dtype: int32, shape: [seq, 3]}}")
    with pytest.raises(PlanError, match=r"returned \['h'\]; expected a tensor 'v' among them"):
        offered(forward, "teacher.outputs={v: {dtype: float16, shape: [seq, 3]}}")
    with pytest.raises(PlanError, match=r"'h' of shape \(1, 4, 3\) for a batch of 1 x 4; expected \(1, 4, 5\)"):
        offered(forward, declare % 5)


def of_shape(*rest: int):
    return lambda batch: {"logits": torch.zeros(*batch.input_ids.shape, *rest)}


@pytest.mark.parametrize(
    ("forward", "overrides", "message"),
    [
        (lambda batch: torch.zeros(1), [], "returned a Tensor; expected a dict"),
        (lambda batch: torch.zeros(1), ["payload.logits={}"], "returned a Tensor; expected a dict"),
        (lambda batch: {}, [], "returned 0 outputs"),
        (lambda batch: {"x": torch.zeros(7)}, [], r"'x' is \(7,\) for 1 rows; expected a tensor with a leading batch"),
        (lambda batch: {"x": 3.0}, [], "'x' is float for 1 rows"),
        (lambda batch: {"x": batch.input_ids.to(torch.complex64)}, [], "dtype torch.complex64; a reply carries"),
        (
            lambda batch: {"x": torch.zeros(*batch.input_ids.shape, batch.input_ids.shape[1])},
            [],
            "only axis 0 may follow the batch and only axis 1 the sequence",
        ),
        (
            lambda batch: {"value": batch.input_ids.float()},
            ["payload.topk={}", "payload.logprobs={}"],
            r"the payload is topk, logprobs, which is made of logits .*; the teacher returned \['value'\]",
        ),
        (of_shape(), ["payload.topk={}"], r"the teacher returned \['logits'\]"),
        (of_shape(9), ["payload.hidden={}"], "cannot be had from this teacher: it has no attribute `head`"),
        (of_shape(9), ["payload.topk.k=10"], r"payload\.topk\.k is 10; the teacher's distribution has 9 words"),
        (of_shape(9), ["payload={logits: {}, vocab: 10}"], r"payload\.vocab is 10; the teacher's distribution has 9"),
        (
            lambda batch: {"x": batch.input_ids, "pooled": torch.zeros(len(batch.input_ids), 3)},
            ["payload.stream={}"],
            "output 'pooled' has no sequence axis and cannot be streamed; leave payload.stream out",
        ),
    ],
)
def test_what_a_teacher_cannot_give_is_refused_at_the_offer(forward, overrides, message):
    with pytest.raises(PlanError, match=message):
        offered(forward, *overrides)


def test_k_above_a_cut_vocabulary_is_refused_by_the_config():
    with pytest.raises(ConfigError, match=r"`topk\.k` is 64, above the 50 words of `vocab`"):
        config.load(overrides=["payload.topk={}", "payload.vocab=50"])


def test_a_custom_teacher_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_teacher.py").write_text(
        "def build(settings):\n    return lambda batch: {'x': batch.input_ids * settings.teacher.args['k']}\n"
        "nothing = None\ndef broken(settings): return 3\n"
    )
    monkeypatch.chdir(tmp_path)

    def make(model):
        return build(None, config.load(overrides=[f"teacher.model={model}", "teacher.args={k: 3}"]), CPU, 0)

    assert make("my_teacher:build")(Batch(torch.tensor([[2]]), None))["x"].item() == 6
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    with pytest.raises(ConfigError, match=rf"no module 'my_techer' in .* {tmp_path}, on PYTHONPATH \(/some/where\)"):
        make("my_techer:build")
    with pytest.raises(ConfigError, match="module my_teacher has no function 'nothing'"):
        make("my_teacher:nothing")
    with pytest.raises(ConfigError, match=r"returned a int; expected forward"):
        make("my_teacher:broken")
