"""Strict reading of settings into structs, with errors that tell what was found, what was expected and what to write.

It reads the structs' declarations: what each setting accepts, in which unit, and how it is documented.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import msgspec
from msgspec import inspect as types

from shmbridge.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


def convert(tree: Mapping[str, Any], struct: type[T]) -> T:
    """`struct` with the settings of `tree`. Raises ConfigError, which names the setting."""
    declared = of(struct)
    _refuse_unknown(declared, tree, "")
    try:
        return msgspec.convert(tree, struct)
    except msgspec.ValidationError as error:
        raise ConfigError(_explained(str(error), declared, tree)) from None


def of(struct: type[msgspec.Struct]) -> types.StructType:
    """The declarations of its settings."""
    return cast(types.StructType, types.type_info(struct))


def section_of(kind: types.Type) -> types.StructType | None:
    """The struct of a setting that is a section or an optional section; else None."""
    if isinstance(kind, types.StructType):
        return kind
    options = kind.types if isinstance(kind, types.UnionType) else ()
    return next((option for option in options if isinstance(option, types.StructType)), None)


def expected(kind: types.Type, unit: str = "") -> str:
    """What a setting of this type accepts, such as `an integer of at least 1 (requests)`."""
    match kind:
        case types.Metadata():
            return expected(kind.type, (kind.extra or {}).get("unit", ""))
        case types.UnionType():
            return " or ".join(expected(option) for option in kind.types)
        case types.LiteralType():
            return f"one of {', '.join(map(str, kind.values))}"
        case types.IntType() | types.FloatType():
            name = "an integer" if isinstance(kind, types.IntType) else "a number"
            limits = {"above": kind.gt, "of at least": kind.ge, "below": kind.lt, "at most": kind.le}
            bounds = [f"{word} {limit:,.12g}" for word, limit in limits.items() if limit is not None]
            return " ".join(filter(None, [name, " and ".join(bounds), f"({unit})" if unit else ""]))
        case types.BoolType():
            return "true or false"
        case types.StrType():
            return "text"
        case types.NoneType():
            return "null"
        case types.VarTupleType():
            return "a list"
        case types.StructType():
            names = ", ".join(field.name for field in kind.fields)
            return f"a section ({names})" if names else "a section without settings"
        case _:
            return "a mapping"


def documentation(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The docstring below each field of a struct, on one line. A field may have none."""
    (body,) = ast.parse(inspect.getsource(struct)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                found[name] = " ".join(said.split())
    return found


def _refuse_unknown(section: types.StructType, tree: Any, prefix: str) -> None:
    if not isinstance(tree, Mapping):
        return
    fields = {field.name: field.type for field in section.fields}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known here: {', '.join(fields)}"
            raise ConfigError(f"unknown setting `{prefix}{key}`; {hint}")
        inner = section_of(fields[key])
        if inner:
            _refuse_unknown(inner, value, f"{prefix}{key}.")


def _explained(message: str, declared: types.StructType, tree: Mapping[str, Any]) -> str:
    """The error of msgspec for a bad setting, with what was found, what was expected and what to write."""
    what, _, path = message.partition(" - at `$.")
    keys = re.match(r"[\w.]*", path)[0].split(".")  # type: ignore[index]
    section, found, field = declared, tree, None
    for key in keys if path else ():
        field = next(field for field in section.fields if field.name == key)
        section, found = section_of(field.type) or section, found[key]
    if field is None:
        return f"config: {what}"
    name = ".".join(keys)
    inner = section_of(field.type)
    if isinstance(found, Mapping):  # the section contradicts itself, or a custom teacher's output is not one
        return f"{name}: {what}"
    remedy = f"; write {_example(name, inner, found)}" if inner else ""
    if not inner and field.default not in (None, "", msgspec.NODEFAULT):
        remedy = f"; the default is {msgspec.json.encode(field.default).decode()}"
    return f"{name} is {found!r}; expected {expected(field.type)}{remedy}"


def _example(name: str, section: types.StructType, found: Any) -> str:
    """The override to write instead of `name=found`, if `name` is a section."""
    if isinstance(found, bool) or not isinstance(found, (str, int, float)):
        return f"{name}={{}}"
    inside = {field.name: section_of(field.type) for field in section.fields}
    if found in inside:
        return f"{name}.{found}={'{}' if inside[found] else 'VALUE'}"
    for setting in inside:
        try:
            msgspec.convert({setting: found}, section.cls)
        except msgspec.ValidationError:
            continue
        return f"{name}.{setting}={found}"
    return f"{name}={{}}"
