"""Whether a training group and a kept teacher fit: the settings that are the teacher's, and how they differ. Pure."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from launcher.console.text import table
from shmbridge import config, model_path
from shmbridge.config import Config, is_builder
from shmbridge.errors import ConfigError
from shmbridge.shm import layout

_OF_THE_TEACHER = ("teacher", "ring", "payload", "plane", "on_teacher_lost")
_OF_THE_GROUP = ("name", "run_dir", "train")
_FREE_FORM = ("args", "outputs")  # replaced as a whole, as a file would replace a default
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def versions() -> dict[str, str]:
    """Of this installation: what must be the same on both sides for them to understand each other."""
    return {"shmbridge": importlib.metadata.version("shmbridge"), "segment layout": str(layout.VERSION)}


def tokenizer(model: str) -> str:
    """SHA-256 of a local model's tokenizer as it is on the disk now; empty where it is not known."""
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
        if isinstance(deeper, dict) and isinstance(value, dict) and key not in _FREE_FORM:
            value = _over(deeper, value)
        joined[key] = value
    return joined


def check_versions(name: str, kept: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ConfigError where the two sides cannot understand each other at all."""
    _refuse(name, list(_differences("", kept, here)), "Stop the kept teacher and start it with this installation.")


def check_settings(name: str, kept: Config, asked: Config, tokenizers: tuple[str, str]) -> None:
    """Raises ConfigError, naming each setting of the teacher that differs, with both values. `tokenizers`: when the teacher was loaded,
    and now."""
    pairs = [(key, getattr(kept, key), getattr(asked, key)) for key in _OF_THE_TEACHER]
    rows = [row for key, *both in pairs for row in _differences(key, *map(msgspec.to_builtins, both))]
    loaded, now = tokenizers
    if loaded and now and loaded != now:
        rows.append(("tokenizer", f"{loaded[:12]}... (when it was loaded)", f"{now[:12]}... (on the disk)"))
    which = rows[0][0] if len(rows) == 1 else "these"
    remedy = f"Leave {which} out to take what the kept teacher has, or start another with it"
    _refuse(name, rows, f"{remedy}: shmbridge-launch teacher start NAME ...")


def _differences(key: str, kept: Any, asked: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(kept, dict) and isinstance(asked, dict):
        for name in dict.fromkeys((*kept, *asked)):
            yield from _differences(f"{key}.{name}".removeprefix("."), kept.get(name), asked.get(name))
    elif kept != asked:
        yield key, _shown(kept), _shown(asked)


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "not set"
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 200 else f"{text[:200]}..."


def _refuse(name: str, rows: Sequence[tuple[str, str, str]], remedy: str) -> None:
    if rows:
        shown = table([("setting", "kept", "asked for"), *rows])
        raise ConfigError(f"the kept teacher {name} is not what this run asks for:\n\n{shown}\n\n{remedy}")
