"""Where settings come from: a YAML file, the command line's flags, and `a.b=c` overrides."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shmbridge.errors import ConfigError
from shmbridge.launch import folder


def given(
    source: str | None = None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings that were given, without defaults, as nested mappings. Arguments as in `load`. Raises
    ConfigError."""
    tree = _file(source) if source else {}
    for key, value in (values or {}).items():
        section, leaf = _section(tree, key)
        if value is None:
            section.pop(leaf, None)
        else:
            section[leaf] = value
    for key, value in _overrides(list(overrides)):
        section, leaf = _section(tree, key)
        section[leaf] = value
    return tree


def _file(source: str) -> dict[str, Any]:
    path, _, section = source.partition("#")
    ready = {file.stem: file for file in sorted(folder("configs").glob("*.yaml"))}
    file = Path(path)
    try:
        text = (file if file.exists() and not file.is_dir() else ready.get(path, file)).read_text("utf-8")
    except OSError as error:
        raise ConfigError(
            f"config file {path!r}: {error.strerror}; give a YAML file, or the name of a ready configuration "
            f"({', '.join(ready)})"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path!r} is not text in UTF-8: {error}; expected YAML") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path!r} is not YAML: {error}") from None
    for key in section.split(".") if section else ():
        if not isinstance(tree, dict) or key not in tree:
            raise ConfigError(f"config file {path!r} has no section {section!r}")
        tree = tree[key]
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {source!r} is a {type(tree).__name__}; expected a mapping of settings")
    return tree


def _overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of each `a.b=c`, where `c` is YAML. Nothing after `=` is the empty text.

    Raises:
        ConfigError: a word is not of this form, or its value is not YAML.
    """
    for at, word in enumerate(words):
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"found {word!r} where a setting a.b=c was expected, such as ring.depth=4")
        try:
            yield key, yaml.safe_load(text) if text.strip() else ""
        except yaml.YAMLError as error:
            message = f"override {word!r} is not YAML"
            if _open_brackets(text) <= 0:
                raise ConfigError(f"{message}: {getattr(error, 'problem', None) or error}") from None
            # The shell splits `a.b={c: d}` at its spaces. The words up to the closing bracket belong to it.
            joined = (" ".join(words[at:end]) for end in range(at + 2, len(words) + 1))
            whole = next((text for text in joined if not _open_brackets(text)), "payload.logits={dtype: float32}")
            raise ConfigError(f"{message}; quote it for the shell: {shlex.quote(whole)}") from None


def _section(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds the dotted `key`, made where it is not there, and the last part of the key."""
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"setting {key!r}: {parent!r} is a value, not a section")
    return tree, leaf


def _open_brackets(text: str) -> int:
    """How many braces and brackets are open at the end."""
    return sum(text.count(bracket) for bracket in "{[") - sum(text.count(bracket) for bracket in "}]")
