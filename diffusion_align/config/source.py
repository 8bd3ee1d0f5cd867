"""From YAML and `key=value` to a tree of texts that remembers where each value was written.

Scalars stay text: what `1e-4`, `on` or `012` mean is decided later by the declared type, never by
YAML's guess (PyYAML reads `1e-4` as text and `on` as True). Only an unquoted `null`, `~` or nothing
becomes None. Anchors, aliases and tags are refused: they buy nothing in a file this flat and can be
abused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Union

import yaml

from diffusion_align.config.problems import COMMAND_LINE, Place, Problem, shown

MAX_BYTES = 1_000_000
MAX_DEPTH = 10
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "value", "merge")
}

Plain = Union[str, None, list["Plain"], dict[str, "Plain"]]  # noqa: UP007 - evaluated on 3.10


@dataclass
class Node:
    """A value and its place; `value` is text, None, a list of nodes or a mapping of nodes."""

    value: str | list[Node] | dict[str, Node] | None
    place: Place
    problems: list[Problem] = field(default_factory=list)

    def plain(self) -> Plain:
        """The bare tree, without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def find(self, key: str) -> Node:
        """The node of a dotted key, or the nearest one above it that exists."""
        node = self
        for part in key.split(".") if key else ():
            if not isinstance(node.value, dict) or part not in node.value:
                break
            node = node.value[part]
        return node


def read_file(path: Path) -> Node:
    """The tree of a YAML file; what is wrong with it stands in the root's `problems`."""
    place = Place(shown(path), 1)
    try:
        if path.stat().st_size > MAX_BYTES:
            return _faulty(Problem(place, "", f"over {MAX_BYTES:,} bytes: this is no config"))
        data = path.read_bytes()
    except OSError as error:
        return _faulty(Problem(Place(shown(path)), "", f"cannot be read: {error.strerror}"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8"
        hint = "save the file as UTF-8 in your editor"
        return _faulty(Problem(Place(place.file, line), "", what, hint))
    root = _compose(text, place.file)
    if root.value is None and not root.problems:
        root.problems.append(Problem(place, "", "the file is empty"))
    elif not isinstance(root.value, dict) and not root.problems:
        root.problems.append(Problem(place, "", "a config is made of `key: value` lines"))
    if not isinstance(root.value, dict):
        root.value = {}
    return root


def apply_override(root: Node, text: str, number: int) -> None:
    """Write the `number`-th `dotted.key=value` over the tree; problems join `root.problems`."""
    place = Place(COMMAND_LINE, number)
    key, equals, value = text.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or text.startswith("-") or not all(part and not part.isspace() for part in parts):
        what = f"{text!r} is not an override"
        hint = "write key=value, for example train.steps=200"
        if equals and text.startswith("-"):
            hint = f"overrides have no dashes: {text.lstrip('-')}"
        root.problems.append(Problem(place, "", what, hint))
        return
    if not value.strip():
        hint = f"write {key}=null for nothing"
        root.problems.append(Problem(place, key, "no value after '='", hint))
        return
    node = _compose(value, COMMAND_LINE, key)
    root.problems.extend(replace(problem, place=place) for problem in node.problems)
    _move(node, place)
    above = root
    for part in parts[:-1]:
        if not isinstance(above.value, dict):
            above.value = {}
        above = above.value.setdefault(part, Node({}, place))
    if not isinstance(above.value, dict):
        above.value, above.place = {}, place
    above.value[parts[-1]] = node


def merged(base: Node, child: Node) -> Node:
    """`child` written over `base`, mapping by mapping; neither is changed."""
    if not (isinstance(base.value, dict) and isinstance(child.value, dict)):
        return child
    value: dict[str, Node] = dict(base.value)
    for key, node in child.value.items():
        value[key] = merged(value[key], node) if key in value else node
    return Node(value, child.place, [*base.problems, *child.problems])


def _faulty(problem: Problem) -> Node:
    return Node({}, problem.place, [problem])


def _compose(text: str, file: str, key: str = "") -> Node:
    """Parse one YAML document; a syntax error becomes a problem with its line."""
    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1 if mark else 1)
        reason = error.problem or error.context or "not YAML"
        return _faulty(Problem(place, key, f"not YAML: {reason}"))
    except yaml.YAMLError as error:
        return _faulty(Problem(Place(file, 1), key, f"not YAML: {str(error).splitlines()[0]}"))
    except RecursionError:
        return _faulty(Problem(Place(file, 1), key, "nested too deeply"))
    if document is None:
        return Node(None, Place(file, 1))
    reader = _Reader(file)
    node = reader.node(document, key, 0)
    node.problems = reader.problems
    return node


def _move(node: Node, place: Place) -> None:
    node.place = place
    for below in _below(node):
        _move(below, place)


def _below(node: Node) -> Iterator[Node]:
    if isinstance(node.value, Mapping):
        yield from node.value.values()
    elif isinstance(node.value, list):
        yield from node.value


class _Reader:
    """Walks a composed document once and collects what is wrong with it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._seen: set[int] = set()

    def node(self, raw: yaml.Node, key: str, depth: int) -> Node:
        place = Place(self.file, raw.start_mark.line + 1)
        fault = self._fault(raw, depth)
        if fault:
            self.problems.append(Problem(place, key, fault))
            return Node(None, place)
        self._seen.add(id(raw))
        if isinstance(raw, yaml.MappingNode):
            return Node(self._mapping(raw, key, depth), place)
        if isinstance(raw, yaml.SequenceNode):
            return Node([self.node(item, key, depth + 1) for item in raw.value], place)
        assert isinstance(raw, yaml.ScalarNode)  # the only kind left
        nothing = raw.tag == "tag:yaml.org,2002:null" and raw.style is None
        return Node(None if nothing else raw.value, place)

    def _fault(self, raw: yaml.Node, depth: int) -> str:
        if id(raw) in self._seen:
            return (
                "anchors and aliases are not part of a config; `base: NAME` inherits from another"
            )
        if raw.tag not in _PLAIN_TAGS:
            return f"the tag {raw.tag} is not part of a config"
        return "nested too deeply" if depth > MAX_DEPTH else ""

    def _mapping(self, raw: yaml.MappingNode, above: str, depth: int) -> dict[str, Node]:
        value: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for name, item in raw.value:
            place = Place(self.file, name.start_mark.line + 1)
            if not isinstance(name, yaml.ScalarNode):
                self.problems.append(Problem(place, above, "a key must be a plain word"))
                continue
            key = f"{above}.{name.value}" if above else name.value
            if name.value in value:
                what = f"written twice, first on line {lines[name.value]}"
                self.problems.append(Problem(place, key, what, "keep one of them"))
                continue
            lines[name.value] = place.line
            value[name.value] = self.node(item, key, depth + 1)
            value[name.value].place = place
        return value
