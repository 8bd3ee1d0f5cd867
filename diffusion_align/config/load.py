"""Find a config, read it with its bases and overrides, show it, copy it, state its schema."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Union, cast

import yaml
from pydantic import create_model
from pydantic.json_schema import models_json_schema

from diffusion_align.algorithms import catalogue
from diffusion_align.config import edge, rules, validate
from diffusion_align.config.problems import ConfigError, Place, Problem, shown
from diffusion_align.config.secrets import take_from_environment, without_secrets
from diffusion_align.config.sections import ROOTS, AlgorithmChoice, RewardRunConfig, RunConfig
from diffusion_align.config.source import Node, apply_override, merged, read_file
from diffusion_align.errors import UserError, did_you_mean

MAX_BASES = 8
AnyConfig = RunConfig | RewardRunConfig


def load_config(name: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> Any:
    """The resolved config of a name in `configs/` or a path, with `key=value` overrides.

    Args:
        stored: it is the record of a run, only to be compared with or looked at: secrets that were
            not written, or stand in variables that are not set, are no error.

    Returns:
        `RunConfig`, or `RewardRunConfig` where its algorithm trains a reward.

    Raises:
        ConfigError: every problem at once, each with file, line, key and what to do.
    """
    path = find_config(name)
    root = _inherited(path, ())
    for number, override in enumerate(overrides, start=1):
        apply_override(root, override, number)
    take_from_environment(root, stored=stored)
    reading = validate.read(root)
    rules.apply(reading, root)
    if reading.problems:
        raise ConfigError(reading.problems)
    config = cast("AnyConfig", reading.root(**reading.sections))
    return config if config.output else replace(config, output=str(Path("runs") / path.stem))


def config_names() -> list[str]:
    """Names of the configs that travel with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The file of a config: an existing path first, else a name in `configs/`.

    Raises:
        ConfigError: nothing of that name, with the nearest one.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = _folder() / f"{name}.yaml"
    if path.name == str(name) and packaged.is_file():
        return packaged
    near = did_you_mean(path.stem, config_names())
    known = f"known: {', '.join(config_names())}; or the path of a .yaml file"
    hint = f"did you mean  {near} ?\n{known}" if near else known
    what = "this is a folder, not a config" if path.is_dir() else "no such config"
    raise ConfigError([Problem(Place(str(name)), "", what, hint)])


def copy_config(name: str, destination: str | Path | None = None) -> Path:
    """Copy a config to a file or folder (default: here) to be changed there; never overwrites.

    Raises:
        UserError: the destination exists or cannot be written.
    """
    source = find_config(name)
    target = Path(destination) if destination is not None else Path(source.name)
    if target.is_dir():
        target = target / source.name
    try:
        # "x" fails on an existing file, also on one that appears between a test and the write.
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        fix = "give another name, or remove it first"
        raise UserError("exists already and is left as it is", where=str(target), fix=fix) from None
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(target)) from error
    return target


def to_yaml(config: AnyConfig) -> str:
    """A resolved config as YAML, each key explained; it loads back to the same config.

    Secrets are left out, see `config.secrets`: those of environment variables as `${NAME}`.
    """
    lines = []
    for option in fields(config):
        value = getattr(config, option.name)
        options = value.options if isinstance(value, AlgorithmChoice) else value
        if edge.sections_of(type(options)) is None:
            lines.append(_line(type(config), option.name, value, ""))
            continue
        lines.append(f"\n{option.name}:")
        if isinstance(value, AlgorithmChoice):
            lines.append(f"  name: {value.name}")
        for inner in fields(options):
            lines.append(_line(type(options), inner.name, getattr(options, inner.name), "  "))
    return "\n".join(lines).lstrip("\n") + "\n"


def differences(before: AnyConfig, after: AnyConfig) -> list[str]:
    """`key: old -> new` of every key in which two configs differ, in the order of the sections.

    Secrets are compared, and shown, as they are written: another password is no difference.
    """
    old, new = _shown(before), _shown(after)
    keys = dict.fromkeys([*old, *new])
    return [
        f"{key}: {validate.spelled(old.get(key))} -> {validate.spelled(new.get(key))}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def json_schema() -> str:
    """JSON Schema of a config file, for editors: one definition for each kind of config."""
    roots = {kind: _root_model(kind) for kind in ROOTS}
    _, defined = models_json_schema([(root, "validation") for root in roots.values()])
    rewards = [row.name for row in catalogue.ALGORITHMS.values() if row.trains == "reward"]
    named = {"required": ["name"], "properties": {"name": {"enum": rewards}}}
    return json.dumps(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "if": {"required": ["algorithm"], "properties": {"algorithm": named}},
            "then": {"$ref": f"#/$defs/{roots['reward'].__name__}"},
            "else": {"$ref": f"#/$defs/{roots['policy'].__name__}"},
            **defined,
        },
        indent=2,
    )


def _root_model(kind: str) -> Any:
    """The edge model of a whole config file that trains a policy, or a reward."""
    rows = [row for row in catalogue.ALGORITHMS.values() if row.trains == kind]
    algorithm: Any = Union[tuple(map(validate.algorithm_edge, rows))]  # noqa: UP007 - at run time
    root = edge.edge_model(ROOTS[kind], algorithm=algorithm)
    base: Any = (str | None, edge.EdgeField(default=None, description="config to inherit from"))
    return create_model(f"{kind}_config", __base__=root, base=base)


def _shown(config: AnyConfig) -> dict[str, Any]:
    """Dotted key -> value without its secrets."""
    return {
        key: without_secrets(value, key.rpartition(".")[2])
        for key, value in _flat(asdict(config)).items()
    }


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key -> value; the algorithm's options stand beside its name, as in the file."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = (
            above
            if (above, name) == (validate.ALGORITHM, "options")
            else ".".join(filter(None, (above, name)))
        )
        flat |= _flat(value, key) if isinstance(value, dict) else {key: value}
    return flat


def _folder() -> Path:
    """`configs/`: inside the installed package, or beside it in a checkout (editable installs)."""
    package = Path(str(files("diffusion_align")))
    beside = package.parent / "configs"
    packaged = package / "configs"
    return packaged if packaged.is_dir() else beside


def _inherited(path: Path, below: tuple[Path, ...]) -> Node:
    """The tree of a file written over the tree of its `base`, and so on."""
    root = read_file(path)
    assert isinstance(root.value, dict)  # read_file promises it
    base = root.value.pop("base", None)
    if base is None:
        return root
    chain = (*below, path.resolve())
    try:
        if not isinstance(base.value, str):
            raise ConfigError([Problem(base.place, "base", "names one config, as text")])
        beside = path.parent / base.value
        parent = beside if beside.is_file() else find_config(base.value)
        if parent.resolve() in chain or len(chain) > MAX_BASES:
            trail = " -> ".join(shown(p) for p in (*chain, parent.resolve()))
            raise ConfigError([Problem(base.place, "base", "inherits from itself", trail)])
    except ConfigError as error:
        fault = error.problems[0]
        what = fault.what if fault.key else f"{fault.place}: {fault.what}"
        root.problems.append(Problem(base.place, "base", what, fault.hint))
        return root
    above = _inherited(parent, chain)
    assert isinstance(above.value, dict)
    if _algorithm_name(root) not in (None, _algorithm_name(above)):
        # Another algorithm has other options: nothing of the base's can be meant.
        above.value.pop(validate.ALGORITHM, None)
    return merged(above, root)


def _algorithm_name(root: Node) -> object:
    named = root.find(f"{validate.ALGORITHM}.name")
    return named.value if isinstance(named.value, str) else None


def _line(options: type, name: str, value: Any, indent: str) -> str:
    doc = edge.docs(options).get(name)
    value = without_secrets(value, name)
    written = (
        yaml.safe_dump(
            list(value) if isinstance(value, tuple) else value,
            default_flow_style=True,
            allow_unicode=True,
            width=10_000,
        )
        .strip()
        .removesuffix("\n...")
    )
    comment = f"  # {textwrap.shorten(doc, 90, placeholder=' ...')}" if doc else ""
    return f"{indent}{name}: {written}{comment}"
