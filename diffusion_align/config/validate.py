"""From a tree of texts to the sections of a config, collecting every problem on the way.

A key that is wrong is reported and dropped, the rest is read on: one mistake never hides the next.
The rules that look at several keys together (`rules`) are asked last, and only about keys that are
themselves in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError, create_model

from diffusion_align.algorithms import catalogue
from diffusion_align.config import edge
from diffusion_align.config.problems import Place, Problem
from diffusion_align.config.sections import AlgorithmChoice, RunConfig, root_of
from diffusion_align.config.source import Node
from diffusion_align.errors import OptionError, did_you_mean

ALGORITHM = "algorithm"


@dataclass
class Reading:
    """What came of a tree: the sections that could be built, the problems, and the keys in doubt.

    `bad` keys are wrong and read no further; `meant` keys were probably meant by a mistyped one, so
    that their values are not to be trusted either. `root` is the dataclass of the whole config.
    """

    root: type = RunConfig
    sections: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    meant: set[str] = field(default_factory=set)

    def report(self, place: Place, key: str, what: str, hint: str = "") -> None:
        """Add a problem and stop trusting its key."""
        self.problems.append(Problem(place, key, what, hint))
        self.bad.add(key)


def read(root: Node) -> Reading:
    """Read every section of `root`; nothing is raised."""
    reading = Reading(
        root=_root_type(root),
        problems=list(root.problems),
        bad={p.key for p in root.problems},
    )
    written = root.value if isinstance(root.value, dict) else {}
    known = {option.name: option for option in fields(reading.root)}
    for name, node in written.items():
        if name not in known:
            _unknown(reading, node.place, name, "", _algorithm_options(root))
    for name, option in known.items():
        if name in written:
            if name not in reading.bad:
                _section(reading, root, name, written[name])
        elif (default := edge.default_of(option)) is not MISSING:
            reading.sections[name] = default
        elif name not in reading.meant:
            kind = "section" if edge.sections_of(section_type(reading.root, name)) else "key"
            hint = _describe_section(reading.root, name)
            reading.report(Place(root.place.file), name, f"missing {kind}", hint)
    return reading


def section_type(root: type, name: str) -> Any:
    """The annotation of a section of the config `root`."""
    return edge.declared_types(root)[name]


def _root_type(root: Node) -> type:
    """The kind of config that a tree is meant to be, by the algorithm that it names."""
    named = root.find(f"{ALGORITHM}.name").value
    if isinstance(named, str) and named not in catalogue.ALGORITHMS:
        named = did_you_mean(named, catalogue.names())
    return root_of(named)


def algorithm_edge(info: catalogue.AlgorithmInfo) -> type[BaseModel]:
    """The edge model of an algorithm's section: its options and, beside them, its name."""
    base = edge.edge_model(catalogue.load(info.options))
    named: dict[str, Any] = {
        "name": (Literal[info.name], edge.EdgeField(description="the algorithm"))
    }
    return create_model(f"{info.name}_section", __base__=base, **named)


def keys(root: type, algorithm: type | None) -> dict[str, tuple[type, str]]:
    """Every dotted key a config may have -> (the dataclass and the field that declare it)."""
    found: dict[str, tuple[type, str]] = {}
    for option in fields(root):
        inner = edge.sections_of(section_type(root, option.name))
        if option.name == ALGORITHM:
            found[f"{ALGORITHM}.name"] = (AlgorithmChoice, "name")
            inner = algorithm
        elif inner is None:
            found[option.name] = (root, option.name)
        if inner is not None:
            for below in fields(inner):
                found[f"{option.name}.{below.name}"] = (inner, below.name)
    return found


def describe(options: type, name: str) -> str:
    """`(number, default 0.0003)` of one field."""
    default = edge.default_of(edge.option_field(options, name))
    kind = edge.spoken(edge.declared_types(options)[name])
    return f"({kind}, required)" if default is MISSING else f"({kind}, default {spelled(default)})"


def spelled(value: Any) -> str:
    """A value as it is written in a config."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(spelled, value))}]"
    if value == "":
        return '""'
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def _adapter(root: type, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(edge.edge_type(section_type(root, name)))


@cache
def _algorithm_adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(algorithm_edge(catalogue.ALGORITHMS[name]))


def _section(reading: Reading, root: Node, name: str, node: Node) -> None:
    options = edge.sections_of(section_type(reading.root, name))
    if name == ALGORITHM:
        info = _algorithm(reading, node)
        if info is None:
            return
        options = catalogue.load(info.options)
        adapter = _algorithm_adapter(info.name)
    else:
        adapter = _adapter(reading.root, name)
    if options is not None and not isinstance(node.value, dict) and node.value is not None:
        one = next(iter(edge.declared_types(options)))
        reading.report(
            node.place, name, "is a section", f"write its keys below it, for example {name}.{one}"
        )
        return
    value = _validated(reading, root, name, node, adapter, options)
    if value is not MISSING:
        _build(reading, name, node, options, value)


def _validated(
    reading: Reading,
    root: Node,
    name: str,
    node: Node,
    adapter: TypeAdapter[Any],
    options: type | None,
) -> Any:
    """The edge value of a section without its bad keys; MISSING where nothing can be saved."""
    plain = node.plain()
    if isinstance(plain, dict):
        plain = {key: value for key, value in plain.items() if f"{name}.{key}" not in reading.bad}
    try:
        return adapter.validate_python(plain)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            _fault(reading, root, name, options, fault)
    if isinstance(plain, dict):
        plain = {key: value for key, value in plain.items() if f"{name}.{key}" not in reading.bad}
        try:
            return adapter.validate_python(plain)
        except ValidationError:
            pass  # a required key is wrong or missing: reported above
    return MISSING


def _fault(reading: Reading, root: Node, name: str, options: type | None, fault: Any) -> None:
    """One pydantic error as a problem, once per key (a union reports each of its members)."""
    path = fault["loc"]
    key = f"{name}.{path[0]}" if options is not None and path else name
    if key in reading.bad:
        return
    place = root.find(key).place
    if fault["type"] == "extra_forbidden":
        _unknown(
            reading, place, key, name, options if name == ALGORITHM else _algorithm_options(root)
        )
        return
    owner, leaf = (options, str(path[0])) if options is not None and path else (reading.root, name)
    if fault["type"] == "missing":
        if key not in reading.meant:
            reading.report(place, key, "missing", _document(owner, leaf))
        return
    annotation = edge.declared_types(owner)[leaf]
    given = fault["input"]
    if isinstance(given, str):
        said = repr(given)
    else:
        said = "null" if given is None else f"a {'list' if isinstance(given, list) else 'mapping'}"
    near = did_you_mean(given, edge.choices(annotation)) if isinstance(given, str) else None
    hint = f"did you mean  {near} ?" if near else _document(owner, leaf)
    reading.report(place, key, f"{said} is not {_article(edge.spoken(annotation))}", hint)


def _build(reading: Reading, name: str, node: Node, options: type | None, value: Any) -> None:
    """Make the section's dataclass of its edge value; its own checks become problems."""
    if options is None or value is None:
        reading.sections[name] = value
        return
    given = {option.name: getattr(value, option.name) for option in fields(options)}
    while True:
        try:
            made = options(**given)
        except OptionError as error:
            _refused(reading, name, node, error)
            # It stops at its first fault: put defaults in its place and ask again.
            instead = {
                leaf: edge.default_of(edge.option_field(options, leaf)) for leaf in error.reads
            }
            if MISSING in instead.values() or given == given | instead:
                return
            given |= instead
        else:
            reading.sections[name] = (
                AlgorithmChoice(value.name, made) if name == ALGORITHM else made
            )
            return


def _refused(reading: Reading, name: str, node: Node, error: OptionError) -> None:
    """Report a dataclass's own check, unless it stumbled over a key that is in doubt already."""
    read = {f"{name}.{leaf}" for leaf in error.reads}
    # A mistyped key leaves a default behind; what it does not fit together with is no problem.
    doubtful = reading.bad | reading.meant if len(read) > 1 else reading.bad
    if not read & doubtful:
        place = _below(node, error.where).place
        reading.report(place, f"{name}.{error.where}", error.what, error.fix)
    reading.bad |= read


def _below(node: Node, leaf: str) -> Node:
    return node.value.get(leaf, node) if isinstance(node.value, dict) else node


def _algorithm(reading: Reading, node: Node) -> catalogue.AlgorithmInfo | None:
    """The catalogue row that the section names, or None with the problem reported."""
    known = ", ".join(catalogue.names())
    written = node.value.get("name") if isinstance(node.value, dict) else None
    key = f"{ALGORITHM}.name"
    if written is None or not isinstance(written.value, str):
        reading.report((written or node).place, key, "missing", f"one of: {known}")
        return None
    if written.value not in catalogue.ALGORITHMS:
        near = did_you_mean(written.value, catalogue.names())
        hint = f"did you mean  {near} ?" if near else f"one of: {known}"
        reading.report(written.place, key, f"unknown algorithm {written.value!r}", hint)
        # The other keys are still held against the algorithm that was probably meant.
        return catalogue.ALGORITHMS[near] if near else None
    return catalogue.ALGORITHMS[written.value]


def _algorithm_options(root: Node) -> type | None:
    """The option class of the algorithm that `root` names, where it names one."""
    named = root.find(f"{ALGORITHM}.name").value
    info = catalogue.ALGORITHMS.get(named) if isinstance(named, str) else None
    return catalogue.load(info.options) if info else None


def _unknown(
    reading: Reading, place: Place, key: str, section: str, algorithm: type | None
) -> None:
    """Report an unknown key with the one it was meant to be, in this section or in another."""
    known = keys(reading.root, algorithm)
    sections = [option.name for option in fields(reading.root)]
    close = list(_intended(key, section, known, sections))
    if close:
        hint = "\n".join(
            f"did you mean  {k} ?   {describe(*known[k]) if k in known else '(section)'}"
            for k in close
        )
    else:
        inside = [k.removeprefix(f"{section}.") for k in known if k.startswith(f"{section}.")]
        names = inside if section else sections
        hint = f"known here: {', '.join(names)}"
    reading.report(place, key, "unknown key", hint)
    reading.meant.update(close)


def _intended(
    key: str, section: str, known: dict[str, tuple[type, str]], sections: list[str]
) -> Iterator[str]:
    leaf = key.rpartition(".")[2]
    exact = [k for k in known if k.rpartition(".")[2] == leaf]
    if exact:
        yield from exact[:3]
        return
    if section:
        inside = [k for k in known if k.startswith(f"{section}.")]
        near = did_you_mean(leaf, [k.rpartition(".")[2] for k in inside])
        yield from [f"{section}.{near}"] if near else []
        return
    names = {name: name for name in sections}
    # A section of that name is nearer than a key inside another section.
    candidates = {k.rpartition(".")[2]: k for k in known} | names
    if near := did_you_mean(leaf, candidates):
        yield candidates[near]


def _describe_section(root: type, name: str) -> str:
    options = edge.sections_of(section_type(root, name))
    if name == ALGORITHM:
        return f"write algorithm.name: one of {', '.join(catalogue.names())}"
    if options is None:
        return _document(root, name)
    return f"write {name}: with {', '.join(option.name for option in fields(options))} below it"


def _document(options: type, name: str) -> str:
    return " ".join(filter(None, (describe(options, name), edge.docs(options).get(name))))


def _article(words: str) -> str:
    plain = words.partition(" ")[0]
    return f"a {words}" if plain in ("whole", "number", "list", "mapping") else words
