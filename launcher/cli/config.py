"""`shmbridge-launch config`: every setting as YAML, with its comment, what it accepts, and its default."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import yaml
from msgspec import inspect as types

from launcher.cli import parsers
from shmbridge import __version__, config
from shmbridge.config import Config, decode

_WIDTH = 100
_HEADER = f"""\
# The settings of shmbridge {__version__}; [what a setting accepts (its unit); its default].
# `shmbridge-launch --config FILE` reads this file, or a part of it, and a.b=c overrides single settings."""


def main(argv: Sequence[str]) -> int:
    """Run what follows `config` on the command line; the exit code."""
    parser = parsers.command("config")
    args, unknown = parser.parse_known_intermixed_args(argv)
    parsers.refuse_unknown_flag(parser, unknown)
    given = config.given(args.config, args.overrides, parsers.values(args))
    print(page(config.from_tree(given), given), end="")
    return 0


def page(settings: Config, given: Mapping[str, Any]) -> str:
    """All settings as commented YAML, which `config.load` reads back as the same settings. `given` has the settings
    that the user gave."""
    tree = msgspec.to_builtins(settings)
    if not (given.get("payload") or {}).get(
        "logits"
    ):  # by itself, where no other payload is named: so it is on reading
        tree["payload"]["logits"] = None
    return "\n".join([_HEADER, *_lines(decode.of(Config), tree)]) + "\n"


def _lines(section: types.StructType, tree: Mapping[str, Any]) -> Iterator[str]:
    """The settings of a section, with an empty line before each."""
    said = decode.documentation(section.cls)
    for field in section.fields:
        inner, value = decode.section_of(field.type), tree[field.name]
        yield ""
        yield from _comment(said.get(field.name) or (inner.cls.__doc__ if inner else None) or "")
        if inner is None:
            default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            yield from _comment(f"[{decode.expected(field.type)}; default {_yaml(default)}]")
            yield f"{field.name}: {_yaml(value)}"
        elif value:
            yield f"{field.name}:"
            yield from _indented(_lines(inner, value), "  ")
        elif value is None:
            yield f"{field.name}: null"
            yield from _template(field.name, inner)
        else:
            yield f"{field.name}: {{}}"


def _template(name: str, section: types.StructType) -> Iterator[str]:
    """An optional section that is off, as a comment with its defaults."""
    settings = msgspec.to_builtins(section.cls())
    yield f"# {name}:" if settings else f"# {name}: {{}}"
    yield from _indented(_lines(section, settings), "#   ")


def _indented(lines: Iterator[str], by: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        if number or line:  # none between a section's name and its first setting
            yield (by + line).rstrip() if line else by.strip()


def _comment(text: str) -> Iterator[str]:
    return (f"# {line}" for line in textwrap.wrap(" ".join(text.split()), _WIDTH, break_on_hyphens=False))


def _yaml(value: Any) -> str:
    """`value` on one line."""
    text = yaml.safe_dump(msgspec.to_builtins(value), default_flow_style=True, width=10**9).rstrip("\n")
    return text.removesuffix("\n...")
