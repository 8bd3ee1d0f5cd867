"""The rooms' option dataclasses as pydantic models: the only place that knows pydantic.

Nothing is declared here. Fields, types, defaults and texts come from the dataclasses themselves, so
that a new option appears in the config, in `--schema` and in error messages by being written once,
in its own room. Every model forbids unknown keys and is frozen. Scalars arrive as text (see
`source`) and are read by declared
type: `1e-4` is a float, only `true` and `false` are booleans.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model
from pydantic import Field as EdgeField

_CONFIG = ConfigDict(
    extra="forbid",
    frozen=True,
    allow_inf_nan=False,
    protected_namespaces=(),
    arbitrary_types_allowed=True,
)
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def edge_model(options: type, **replaced: Any) -> type[BaseModel]:
    """The pydantic model of a dataclass; nested dataclasses become nested models.

    Args:
        options: a dataclass whose fields carry their text in `metadata["doc"]` or in the class's
            `Args:`.
        replaced: annotations that take the place of a field's own.
    """
    hints = declared_types(options) | replaced
    documents = docs(options)
    definitions: dict[str, Any] = {}
    for option in fields(options):
        edge = _edge_field(option, documents.get(option.name))
        definitions[option.name] = (edge_type(hints[option.name]), edge)
    # The class docstring would become the schema's description; the options' own first line is the
    # better one.
    summary = (inspect.getdoc(options) or "").partition("\n")[0]
    return create_model(options.__name__, __config__=_CONFIG, __doc__=summary, **definitions)


@cache
def declared_types(options: type) -> dict[str, Any]:
    """Field name -> annotation of a dataclass, forward references resolved."""
    return get_type_hints(options, include_extras=True)


@cache
def docs(options: type) -> Mapping[str, str]:
    """Field name -> explanation, from `metadata["doc"]`, else from the docstring's `Args:`."""
    found = _documented_arguments(inspect.getdoc(options) or "")
    for option in fields(options):
        if "doc" in option.metadata:
            found[option.name] = option.metadata["doc"]
    # The docstrings speak Python, a config speaks YAML.
    return {name: re.sub(r"\bNone\b", "null", doc).rstrip(".") for name, doc in found.items()}


def default_of(option: Field[Any]) -> Any:
    """The default of a dataclass field; `MISSING` where it is required."""
    return option.default_factory() if option.default_factory is not MISSING else option.default


def option_field(options: type, name: str) -> Field[Any]:
    """The dataclass field called `name`."""
    return next(option for option in fields(options) if option.name == name)


def sections_of(annotation: Any) -> type | None:
    """The dataclass that an annotation holds (`LoRAOptions | None` -> `LoRAOptions`), or None."""
    for member in (annotation, *get_args(annotation)):
        if isinstance(member, type) and is_dataclass(member):
            return member
    return None


def spoken(annotation: Any) -> str:
    """An annotation in words: `float | None` -> "number or null"."""
    if annotation is type(None):
        return "null"
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return (
            ", ".join(map(str, members[:-1])) + (" or " if members[1:] else "") + str(members[-1])
        )
    if origin in (Union, types.UnionType):
        return " or ".join(spoken(member) for member in members)
    if origin in (list, tuple) and members:
        return f"list of {spoken(members[0])}"
    if origin is Annotated:
        return spoken(members[0])
    return "keys below it" if sections_of(annotation) else "mapping"


def choices(annotation: Any) -> list[str]:
    """Every word that a `Literal` somewhere inside `annotation` admits."""
    if get_origin(annotation) is Literal:
        return [str(member) for member in get_args(annotation)]
    return [word for member in get_args(annotation) for word in choices(member)]


def _edge_field(option: Field[Any], doc: str | None) -> Any:
    default = default_of(option)
    if default is MISSING:
        return EdgeField(description=doc)
    if is_dataclass(default):
        # A whole section left out takes its own defaults; the caller keeps the dataclass's default
        # object.
        return EdgeField(default=None, description=doc, validate_default=False)
    return EdgeField(default=default, description=doc)


def edge_type(annotation: Any) -> Any:
    """The annotation as pydantic reads it: scalars from text, dataclasses as edge models."""
    if annotation in _READERS:
        return _READERS[annotation]
    if isinstance(annotation, type) and is_dataclass(annotation):
        return _section_model(annotation)
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        spelled = {str(member): member for member in members}
        return Annotated[
            annotation,
            BeforeValidator(
                lambda word: spelled.get(word, word) if isinstance(word, str) else word
            ),
        ]
    if origin in (Union, types.UnionType):
        return Union[tuple(edge_type(member) for member in members)]  # noqa: UP007 - made at run time
    if origin is tuple:
        inner = tuple(member if member is Ellipsis else edge_type(member) for member in members)
        return Annotated[tuple[inner], BeforeValidator(_comma_list)]  # type: ignore[valid-type]
    if origin is list:
        return list[edge_type(members[0])]  # type: ignore[misc]
    return annotation


@cache
def _section_model(options: type) -> type[BaseModel]:
    """One model for each dataclass, so that the schema defines it once."""
    return edge_model(options)


def _truth(word: Any) -> Any:
    if isinstance(word, bool):
        return word
    truths = {"true": True, "false": False}
    if not isinstance(word, str) or word.lower() not in truths:
        raise ValueError("true or false")
    return truths[word.lower()]


def _number(word: Any) -> Any:
    # pydantic would also take True, which is 1 to Python.
    if isinstance(word, bool):
        raise ValueError("a number")
    return word


def _comma_list(value: Any) -> Any:
    """`a,b` is a list where only a list can be meant: brackets are awkward to type in a shell."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


_READERS: dict[Any, Any] = {
    bool: Annotated[bool, BeforeValidator(_truth)],
    int: Annotated[int, BeforeValidator(_number)],
    float: Annotated[float, BeforeValidator(_number)],
}


def _documented_arguments(docstring: str) -> dict[str, str]:
    """`name -> text` of a docstring's `Args:` section (`a, b: text` documents both)."""
    _, _, section = docstring.partition("Args:\n")
    found: dict[str, str] = {}
    current: list[str] = []
    for line in section.splitlines():
        head = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if head:
            current = head[1].split(", ")
            found.update(dict.fromkeys(current, head[2].strip()))
        elif line.startswith("     ") and current:
            found.update({name: f"{found[name]} {line.strip()}" for name in current})
        elif line.strip():
            break
    return found
