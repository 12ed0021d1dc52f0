"""Whether a training group and a kept teacher fit: the settings that are the teacher's, and how they differ. Pure."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from launcher.console.text import table
from launcher.keeper.messages import Fingerprint
from shmbridge import config, model_path
from shmbridge.config import Config, is_builder
from shmbridge.errors import ConfigError
from shmbridge.shm import layout

_OF_THE_TEACHER = ("teacher", "ring", "payload", "plane", "on_teacher_lost")
_OF_THE_GROUP = ("name", "run_dir", "train")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def fingerprint(model: str) -> Fingerprint:
    """Of this installation, and of the model's tokenizer as it is on the disk now."""
    return Fingerprint(importlib.metadata.version("shmbridge"), layout.VERSION, _tokenizer(model))


def _tokenizer(model: str) -> str:
    found = [path for name in _TOKENIZER_FILES if (path := Path(model) / name).is_file()] if model else []
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest() if found else ""


def located(settings: Config) -> Config:
    """A local model by its absolute path: the keeper and a group may run in different directories."""
    model = settings.teacher.model
    path = model_path.local(model) if model and not is_builder(model) else None
    if path is None:
        return settings
    teacher = msgspec.structs.replace(settings.teacher, model=str(path.resolve()))
    return msgspec.structs.replace(settings, teacher=teacher)


def merged(kept: Config, given: Mapping[str, Any]) -> Config:
    """What was `given` to a group over the keeper's settings. Raises ConfigError."""
    tree = {key: value for key, value in msgspec.to_builtins(kept).items() if key not in _OF_THE_GROUP}
    whole = located(config.from_tree(_over(tree, given)))
    return msgspec.structs.replace(whole, plane=kept.plane) if whole.plane == "auto" else whole


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(below)
    for key, value in above.items():
        deeper = joined.get(key)
        whole = key in ("args", "outputs")  # free-form: replaced, as a file would replace a default
        joined[key] = (
            _over(deeper, value) if isinstance(deeper, dict) and isinstance(value, dict) and not whole else value
        )
    return joined


def check(name: str, kept: Fingerprint, asked: Fingerprint) -> None:
    """Raises ConfigError where the two sides cannot understand each other at all."""
    rows = [("shmbridge", kept.shmbridge, asked.shmbridge), ("segment layout", str(kept.layout), str(asked.layout))]
    differing = [row for row in rows if row[1] != row[2]]
    if differing:
        raise ConfigError(_told(name, differing, "Stop the kept teacher and start it with this installation."))


def check_settings(name: str, kept: Config, asked: Config, tokenizers: tuple[str, str]) -> None:
    """Raises ConfigError, naming each setting of the teacher that differs, with both values."""
    pairs = [(key, getattr(kept, key), getattr(asked, key)) for key in _OF_THE_TEACHER]
    rows = [row for key, one, other in pairs for row in _differences(key, _plain(one), _plain(other))]
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        rows.append(
            ("tokenizer", f"{tokenizers[0][:12]}... (when it was loaded)", f"{tokenizers[1][:12]}... (on the disk)")
        )
    if rows:
        first = rows[0][0]
        remedy = (
            f"Leave {first if len(rows) == 1 else 'these'} out to take what the kept teacher has, or start another with it: "
            "shmbridge-launch teacher start NAME ..."
        )
        raise ConfigError(_told(name, rows, remedy))


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value)


def _differences(key: str, kept: Any, asked: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(kept, dict) and isinstance(asked, dict):
        for name in dict.fromkeys((*kept, *asked)):
            yield from _differences(f"{key}.{name}", kept.get(name), asked.get(name))
    elif kept != asked:
        yield key, _shown(kept), _shown(asked)


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "not set"
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 200 else f"{text[:200]}..."


def _told(name: str, rows: list[tuple[str, str, str]], remedy: str) -> str:
    shown = table([("setting", "kept", "asked for"), *rows])
    return f"the kept teacher {name} is not what this run asks for:\n\n{shown}\n\n{remedy}"
