"""Where a teacher's model is: in a local directory or file, or on the hub. Without torch."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from shmbridge.errors import ConfigError

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")


def local(model: str) -> Path | None:
    """The directory or file that `model` names; None if it names a model on the hub.

    Raises:
        ConfigError: it can only be a path and does not exist, or it is a file other than .gguf. The message has the absolute path and
            the nearest name that exists.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ConfigError(
            f"teacher.model is {model!r}: {os.path.abspath(path)} is a file, and not a .gguf file. Give the directory of a "
            "model, a hub id, a .gguf file, or module:build for a teacher of your own."
        )
    if path.exists():
        return path
    first = path.parts[0] if len(path.parts) > 1 else ""
    is_path = model.startswith((".", "/", "~")) or model.endswith(("/", *_FILES)) or not _HUB_ID.fullmatch(model)
    if is_path or (Path(first).is_dir() and first and cached(model) is None):
        hub = "" if is_path else " If the hub's model of that name is meant, start where no such directory is."
        raise ConfigError(
            f"teacher.model is {model!r}: there is no file or directory {os.path.abspath(path)}.{_nearest(path)}{hub}"
        )
    return None


def converted(file: Path) -> Path:
    """The directory that the converted copy of a .gguf file is kept in; it may not exist yet."""
    file = file.resolve()
    status = file.stat()
    key = hashlib.sha256(f"{file}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "shmbridge" / "gguf"
    return cache / f"{file.stem}-{key}"


def require_gguf(file: Path) -> None:
    """Raises ConfigError where a .gguf file has yet to be converted and the package that reads it is not installed."""
    if importlib.util.find_spec("gguf") is None and not converted(file).is_dir():
        raise ConfigError(
            f"teacher.model is the .gguf file {file}, and the package gguf, which reads it, is not installed. Install it with "
            "`pip install 'shmbridge[gguf]'`, or give the directory of a model."
        )


def cached(model: str, revision: str = "") -> Path | None:
    """The local snapshot of a hub model, if its config.json was loaded before; else None."""
    from huggingface_hub import try_to_load_from_cache  # takes 0.2 s

    try:
        found: Any = try_to_load_from_cache(model, "config.json", revision=revision or None)
    except ValueError:  # not a name that a hub's model can have
        return None
    return Path(found).parent if isinstance(found, str) else None


def require_on_hub(model: str, revision: str = "") -> None:
    """Ask the hub once whether it has a model that this machine has not cached. transformers would retry for most of a
    minute, and its error names the host without the id. Raises ConfigError."""
    if cached(model, revision):
        return
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        huggingface_hub.get_hf_file_metadata(
            huggingface_hub.hf_hub_url(model, "config.json", revision=revision or None)
        )
    except EntryNotFoundError:
        return  # there is such a model, without that file; transformers knows whether it can load it
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == 429 or status >= 500:
            return  # it may pass, and transformers waits for that
        reason = (str(error).strip() or "no answer").splitlines()[0]
        at = f" (revision {revision})" if revision else ""
        hub = f"the hub {huggingface_hub.constants.ENDPOINT}"
        refused = status or isinstance(error, ValueError)  # the latter: it is not a name that a model can have
        found = f"was not found on {hub}" if refused else f"is not in the cache, and {hub} could not be asked for it"
        raise ConfigError(
            f"teacher.model is {model!r}: there is no directory {os.path.abspath(model)}, and the model {model}{at} {found} "
            f"({type(error).__name__}: {reason}).{_nearest(Path(model))} {_hub_remedy()}"
        ) from None


def _hub_remedy() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return (
            "HF_HUB_OFFLINE is set, and the model is not in the cache: unset it, or give the path of a local directory."
        )
    token = "the one in HF_TOKEN may lack access" if os.environ.get("HF_TOKEN") else "set HF_TOKEN"
    return (
        f"Correct the path or the id; for a private or gated model {token}; without a network give a local directory."
    )


def _nearest(path: Path) -> str:
    """` Did you mean ...?` with a name beside the first part that does not exist; empty if none is similar."""
    path = Path(os.path.abspath(path))
    missing = next((part for part in reversed((path, *path.parents)) if not part.exists()), path)
    try:
        beside = sorted(os.listdir(missing.parent))
    except OSError:
        return ""
    inside = [name for name in beside if len(missing.name) > 2 and missing.name in name]
    like = difflib.get_close_matches(missing.name, beside, 1) or inside
    return f" Did you mean {missing.parent / like[0]}?" if like else ""
