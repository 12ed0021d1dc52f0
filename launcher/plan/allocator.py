"""Options of torch's CUDA allocator under which memory cannot be opened by other processes.

Training often needs them, the teacher rarely does: they are taken from the teacher's environment alone.
"""

from __future__ import annotations

from collections.abc import Mapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch 2.9 and later reads the first too
_UNSHAREABLE = {("expandable_segments", "true"), ("backend", "cudamallocasync")}


def unshareable(environment: Mapping[str, str]) -> dict[str, list[str]]:
    """The options in question, by the variable that they stand in."""
    found = {
        name: [option for option in _options(environment.get(name, "")) if _in_question(option)] for name in VARIABLES
    }
    return {name: options for name, options in found.items() if options}


def shareable(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without those options. A variable of which nothing is left is not there."""
    made = dict(environment)
    for name in unshareable(environment):
        kept = [option for option in _options(made.pop(name)) if not _in_question(option)]
        if kept:
            made[name] = ",".join(kept)
    return made


def _options(text: str) -> list[str]:
    """Parted at every comma; those within an option's brackets come back when the rest is joined."""
    return [option.strip() for option in text.split(",") if option.strip()]


def _in_question(option: str) -> bool:
    name, _, value = option.partition(":")
    return (name.strip().lower(), value.strip().lower()) in _UNSHAREABLE
