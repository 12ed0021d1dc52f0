"""Single settings over those of a file: `a.b=c` from the command line, and the values of its flags."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import yaml

from shmbridge.config import schema
from shmbridge.errors import ConfigError


def read(words: Sequence[str], struct: type[msgspec.Struct]) -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of each `a.b=c`, where `c` is YAML. `struct` declares the settings.

    Raises:
        ConfigError: a word is not of this form, or its value is not YAML.
    """
    for at, word in enumerate(words):
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"found {word!r} where a setting a.b=c was expected, such as ring.depth=4")
        yield key, _value_of(key, text, words[at:], struct)


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in nested mappings."""
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"setting {key!r}: {parent!r} is a value, not a section")
    tree[leaf] = value


def take_back(tree: dict[str, Any], key: str) -> None:
    """Remove the dotted `key`, so that its default holds."""
    *parents, leaf = key.split(".")
    section: Any = tree
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(leaf, None)


def _value_of(key: str, text: str, words: Sequence[str], struct: type[msgspec.Struct]) -> Any:
    """The value of an override. `words` are the override, `key=text`, and the words after it on the command line, which
    belong to it if the shell has split it."""
    if not text.strip() and schema.is_text(struct, key):
        return ""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        message = f"override {words[0]!r} is not YAML"
        if _open_brackets(text) <= 0:
            raise ConfigError(f"{message}: {getattr(error, 'problem', None) or error}") from None
        joined = (" ".join(words[:count]) for count in range(2, len(words) + 1))
        whole = next((one for one in joined if not _open_brackets(one)), "payload.logits={dtype: float32}")
        raise ConfigError(f"{message}; quote it for the shell: {shlex.quote(whole)}") from None


def _open_brackets(text: str) -> int:
    """How many braces and brackets are open at the end."""
    return sum(text.count(bracket) for bracket in "{[") - sum(text.count(bracket) for bracket in "}]")
