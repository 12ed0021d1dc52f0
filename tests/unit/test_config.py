"""Settings: strict, overridable, dumped and read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from shmbridge import config
from shmbridge.errors import ConfigError


def test_overrides_win_over_the_file_and_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("ring: {depth: 3, max_tokens: 100}\nteacher: {model: a}\n")
    got = config.load(str(file), ["ring.depth=5", "teacher.args={k: [1, 2]}"], {"teacher.model": "b"})
    assert (got.ring.depth, got.ring.max_tokens, got.teacher.model) == (5, 100, "b")
    assert got.teacher.args == {"k": [1, 2]}
    assert config.load(str(file), values={"ring.depth": None}).ring == config.load(values={"ring.max_tokens": 100}).ring


def test_a_single_gpu_is_a_list_too():
    got = config.load(overrides=["teacher.gpus=0", "train.gpus=1-3"])
    assert (got.teacher.gpus, got.train.gpus) == ("0", "1-3")


def test_a_section_of_the_users_own_file(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("lr: 1\ndistillation:\n  bridge:\n    ring: {depth: 4}\n")
    assert config.load(f"{file}#distillation.bridge").ring.depth == 4
    with pytest.raises(ConfigError, match="has no section 'distil'"):
        config.load(f"{file}#distil")
    with pytest.raises(ConfigError, match="unknown setting `lr`"):
        config.load(str(file))


def test_the_dump_reads_back_the_same(tmp_path):
    file = tmp_path / "resolved.yaml"
    one = config.load(overrides=["teacher.outputs={v: {dtype: float32, shape: [seq, 3]}}", "name=run-1"])
    file.write_text(config.dump(one))
    assert config.load(str(file)) == one
    assert config.from_json(config.to_json(one)) == one


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ring.dept=3", r"unknown setting `ring\.dept`; did you mean `ring\.depth`"),
        ("zzz=1", "known here: enabled"),
        ("ring.depth=0", r"ring\.depth is 0; expected an integer of at least 1 \(requests\); the default is 2"),
        ("ring.depth=two", r"ring\.depth is 'two'; expected an integer of at least 1 \(requests\)"),
        ("teacher.vocab_size=many", r"is 'many'; expected an integer of at least 1 \(words\) or null"),
        ("payload=hidden", r"payload is 'hidden'; expected a section .*; write payload\.hidden=\{\}"),
        ("payload.logits=float32", r"payload\.logits is 'float32'; .*; write payload\.logits\.dtype=float32"),
        ("payload.topk=64", r"payload\.topk is 64; .*; write payload\.topk\.k=64"),
        ("payload.topk=true", r"payload\.topk is True; .*; write payload\.topk=\{\}"),
        ("ring=[1]", r"ring is \[1\]; expected a section .*; write ring=\{\}"),
        ("teacher=null", r"teacher is None; expected a section .*; write teacher=\{\}"),
        (
            "payload.logits.dtype=float8",
            r"payload\.logits\.dtype is 'float8'; expected one of bfloat16, float16, float32",
        ),
        ("payload={vocab: 3, topk: {}}", r"payload: `topk\.k` is 64, above the 3 words"),
        ("teacher.outputs={x: {dtype: int64}}", r"teacher\.outputs: .*`shape`"),
        (
            "timeouts.request_s=0",
            r"timeouts\.request_s is 0; expected a number above 0 and at most 1,000,000,000 \(sec",
        ),
        ("timeouts.request_s=.inf", r"timeouts\.request_s is inf; expected a number"),
        ("teacher.linger_ms=.nan", r"teacher\.linger_ms is nan; expected a number"),
        ("ring.depth", "found 'ring.depth' where a setting a.b=c was expected"),
        ("ring.depth.x=1", "'depth' is a value, not a section"),
        ("name=../../etc", "`name` is"),
        ("ring=[", r"is not YAML; quote it for the shell: 'payload\.logits=\{dtype: float32\}'$"),
        ("name='a", r"override \"name='a\" is not YAML: [^\n]*$"),
    ],
)
def test_bad_settings_are_named(override, message):
    overrides = ["ring.depth=2", override] if override == "ring.depth.x=1" else [override]
    with pytest.raises(ConfigError, match=message):
        config.load(overrides=overrides)


def test_an_override_that_the_shell_split_is_shown_whole():
    split = ["payload.topk={k:", "256,", "temperatures:", "[1,", "2]}", "ring.depth=4"]
    with pytest.raises(ConfigError, match=r"shell: 'payload\.topk=\{k: 256, temperatures: \[1, 2\]\}'$"):
        config.load(overrides=split)


def test_an_empty_override_of_a_text_setting_is_the_empty_text():
    got = config.load("eight-gpus", ["teacher.gpus=", "train.gpus= ", "name=", "train.cpu_ranks=2"])
    assert (got.teacher.gpus, got.train.gpus, got.name) == ("", "", "")
    with pytest.raises(ConfigError, match=r"ring\.depth is ''; expected an integer"):
        config.load(overrides=["ring.depth="])


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    for missing in ("nowhere.yaml", "no/where.yaml"):
        with pytest.raises(ConfigError, match=f"'{missing}': No such file.* \\(cpu, demo, eight-gpus, long-context\\)"):
            config.load(missing)
    (tmp_path / "weights.yaml").write_bytes(b"\xdb\x00")
    with pytest.raises(ConfigError, match=r"weights\.yaml' is not text in UTF-8"):
        config.load(str(tmp_path / "weights.yaml"))


def test_a_ready_configuration_is_read_by_its_name_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load("eight-gpus").train.gpus == "0-6"
    Path("cpu").mkdir()  # a folder is no configuration
    assert config.load("cpu").train.cpu_ranks
    Path("eight-gpus").write_text("train: {gpus: 1-2}\n")
    assert config.load("eight-gpus").train.gpus == "1-2", "a file of the user's own comes first"
