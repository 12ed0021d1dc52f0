"""The HuggingFace teacher and teachers of one's own, up to the offer and over the bridge."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from shmbridge import config
from shmbridge.config import TeacherConfig
from shmbridge.errors import ConfigError, PlanError
from shmbridge.output_spec import OutputSpec
from shmbridge.teacher import discovery, huggingface
from shmbridge.teacher.batch import Batch
from shmbridge.teacher.main import build
from tests import gguf_file
from tests.harness import Child, bench
from tests.process.test_bridge import ids, tiny_model

CPU = torch.device("cpu")


def load(model: str, *overrides: str) -> huggingface.HuggingFaceTeacher:
    return huggingface.HuggingFaceTeacher(
        config.load(overrides=[f"teacher.model={model}", *overrides]), CPU, lambda *_: None
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ([], {}),
        (["teacher.dtype=bfloat16", "teacher.attn_implementation=eager"], {"dtype": torch.bfloat16}),
    ],
)
def test_a_local_model_answers_as_in_one_process(saved, overrides, options):
    attention = "eager" if options else "sdpa"
    reference = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=attention, **options).eval()
    with bench(1, "payload.logits.dtype=float32") as it:
        it.settings = config.load(
            overrides=["ring.max_tokens=256", "payload.logits.dtype=float32", f"teacher.model={saved}", *overrides]
        )
        loaded = load(saved, "payload.logits.dtype=float32", *overrides)
        assert loaded.model.config._attn_implementation == attention
        it.teacher(loaded)
        bridge = it.bridge()
        assert (bridge.teacher.vocab_size, bridge.teacher.max_seq, bridge.teacher.path) == (1000, 128, saved)
        with bridge.submit(ids(2, 9)).wait() as reply, torch.inference_mode():
            assert torch.equal(reply.logits, reference(input_ids=ids(2, 9)).logits.float())
        bridge.close()


def test_a_gguf_file_is_converted_once_and_tells_its_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    gguf_file.write(file)
    progress = []
    settings = config.load(overrides=[f"teacher.model={file}"])
    first = huggingface.HuggingFaceTeacher(settings, CPU, lambda done, total: progress.append((done, total)))
    if hasattr(transformers.utils.logging, "set_tqdm_hook"):  # not in transformers 4
        assert progress[-1][0] == progress[-1][1] > 0
    assert first.vocab_size == gguf_file.VOCAB
    text = "def f(x): return x"
    tokenizer = AutoTokenizer.from_pretrained(first.path)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    monkeypatch.setattr(huggingface, "_write_conversion", lambda *_: pytest.fail("converted again"))
    again = load(str(file))
    with torch.inference_mode():
        batch = Batch(ids(1, 7) % gguf_file.VOCAB, None)
        assert torch.equal(again(batch)["hidden"], first(batch)["hidden"])


def test_a_conversion_that_was_killed_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    gguf_file.write(file)

    def convert_and_die():
        """The weights are saved, the tokenizer is not."""
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        huggingface.local_copy(TeacherConfig(model=str(file)))

    assert Child(convert_and_die).join() == -signal.SIGKILL
    path = Path(huggingface.local_copy(TeacherConfig(model=str(file))))
    assert load(str(file)).tokenizer is not None
    assert {each.name for each in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "nowhere.gguf"])
def test_a_missing_local_model_is_named(model):
    with pytest.raises(ConfigError, match="there is no file or directory /"):
        load(model)


def offered(forward, *overrides: str):
    return discovery.make(forward, config.load(overrides=["teacher.model=m:own", *overrides]), CPU)[0].outputs


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


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda batch: torch.zeros(1), "returned a Tensor; expected a dict"),
        (lambda batch: {}, "returned 0 outputs"),
        (lambda batch: {"x": torch.zeros(7)}, r"'x' is \(7,\) for 1 rows; expected a tensor with a leading batch axis"),
        (lambda batch: {"x": 3.0}, "'x' is float for 1 rows"),
        (lambda batch: {"x": batch.input_ids.to(torch.complex64)}, "dtype torch.complex64; a reply carries"),
        (
            lambda batch: {"x": torch.zeros(*batch.input_ids.shape, batch.input_ids.shape[1])},
            "only axis 0 may follow the batch and only axis 1 the sequence",
        ),
    ],
)
def test_outputs_that_cannot_travel_are_named(forward, message):
    with pytest.raises(PlanError, match=message):
        offered(forward)


def test_a_teacher_of_ones_own_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_teacher.py").write_text(
        "def build(settings):\n    return lambda batch: {'x': batch.input_ids * settings.teacher.args['k']}\n"
        "nothing = None\ndef broken(settings): return 3\n"
    )
    monkeypatch.chdir(tmp_path)

    def make(model):
        return build(None, config.load(overrides=[f"teacher.model={model}", "teacher.args={k: 3}"]), CPU, 0)

    assert torch.equal(make("my_teacher:build")(Batch(ids(1, 2), None))["x"], ids(1, 2) * 3)
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    with pytest.raises(ConfigError, match=rf"no module 'my_techer' in .* {tmp_path}, on PYTHONPATH \(/some/where\)"):
        make("my_techer:build")
    with pytest.raises(ConfigError, match="module my_teacher has no function 'nothing'"):
        make("my_teacher:nothing")
    with pytest.raises(ConfigError, match=r"returned a int; expected forward"):
        make("my_teacher:broken")
