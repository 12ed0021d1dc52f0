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
        ("ring.depth=0", "`depth` is 0; it must be a number of at least 1 slot"),
        ("ring.depth=two", r"Expected `int`, got `str` - at `\$\.ring\.depth`"),
        ("payload.logits.dtype=float8", "Invalid enum value 'float8'"),
        ("timeouts.request_s=0", "`request_s` is 0.0; it must be a number of more than 0 s"),
        ("timeouts.request_s=.inf", "`request_s` is inf; it must be a number"),
        ("teacher.linger_ms=.nan", "`linger_ms` is nan; it must be a number"),
        ("ring.depth", "not of the form a.b=c"),
        ("ring.depth.x=1", "'depth' is a value, not a section"),
        ("name=../../etc", "`name` is"),
        ("ring=[", "is not YAML"),
    ],
)
def test_bad_settings_are_named(override, message):
    overrides = ["ring.depth=2", override] if override == "ring.depth.x=1" else [override]
    with pytest.raises(ConfigError, match=message):
        config.load(overrides=overrides)


def test_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"'nowhere\.yaml': No such file"):
        config.load("nowhere.yaml")


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_config_is_valid(file):
    config.load(str(file))
