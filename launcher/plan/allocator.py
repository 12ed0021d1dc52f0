"""Options of torch's CUDA allocator under which other processes cannot open its memory.

Training often needs them and the teacher rarely does, so they are removed from the teacher's environment only.
"""

from __future__ import annotations

from collections.abc import Mapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch 2.9 and later reads the first too
_UNSHAREABLE = {("expandable_segments", "true"), ("backend", "cudamallocasync")}


def unshareable(environment: Mapping[str, str]) -> dict[str, list[str]]:
    """These options in `environment`, by the variable that has them."""
    found = {
        name: [option for option in _options(environment.get(name, "")) if _in_question(option)] for name in VARIABLES
    }
    return {name: options for name, options in found.items() if options}


def shareable(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without these options. A variable that becomes empty is removed."""
    made = dict(environment)
    for name in unshareable(environment):
        kept = [option for option in _options(made.pop(name)) if not _in_question(option)]
        if kept:
            made[name] = ",".join(kept)
    return made


def _options(text: str) -> list[str]:
    """Split at every comma, also within brackets; joining the rest restores them."""
    return [option.strip() for option in text.split(",") if option.strip()]


def _in_question(option: str) -> bool:
    name, _, value = option.partition(":")
    return (name.strip().lower(), value.strip().lower()) in _UNSHAREABLE
