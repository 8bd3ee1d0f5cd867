"""Rewards by name: what `names` finds, built as the table describes it.

Nothing in this module imports torch, so a mistyped name is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

from reward_models.base import Reward, RewardError, require_gradient
from reward_models.names import (
    TRAINED_FILE,
    check_single,
    differentiable,
    existing_file,
    find,
    is_file,
    names,
    row_of,
)
from reward_models.table import ROWS, FilePath, LoadOptions, Row
from reward_models.towers import TOWERS, Tower
from reward_models.user_code import to_stderr

__all__ = [
    "ROWS",
    "TOWERS",
    "LoadOptions",
    "Row",
    "Tower",
    "TRAINED_FILE",
    "canonical",
    "check_name",
    "components",
    "differentiable",
    "existing_file",
    "find",
    "is_file",
    "load",
    "names",
    "without_gradient",
]


def canonical(name: str) -> str:
    """The one spelling of a name, so that two spellings of a reward are seen to be one.

    Args:
        name: as `load` takes it. A name of the catalogue comes back as the table writes it, an
            expression as `Expression` does; anything else (a path, a `module:Name`) is unchanged.

    Raises:
        RewardError: what is wrong with an expression.
    """
    from reward_models.expression import is_expression, parse_expression

    if is_expression(name):
        return str(parse_expression(name))
    row = row_of(name)
    return name if row is None else row.info.name


def check_name(name: str) -> None:
    """Refuse an unknown name without loading anything; a `module:Name` is believed.

    Raises:
        RewardError: with the nearest name, or what is wrong with an expression.
    """
    from reward_models.expression import is_expression, parse_expression

    if is_expression(name):
        parse_expression(name)
    else:
        check_single(name)


def components(name: str) -> list[str]:
    """The rewards behind a name: those of an expression, else the name itself. Nothing is loaded.

    Raises:
        RewardError: as `check_name`.
    """
    from reward_models.expression import is_expression, parse_expression

    if is_expression(name):
        return [term.name for term in parse_expression(name).terms]
    return [name]


def without_gradient(name: str) -> list[str]:
    """The rewards behind a name that have no gradient. Files and the user's own are believed.

    Raises:
        RewardError: as `check_name`.
    """
    rows = [row_of(component) for component in components(name)]
    return [row.info.name for row in rows if row is not None and not row.info.differentiable]


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    weights: FilePath | None = None,
    tower: FilePath | None = None,
    settings: Mapping[str, object] | None = None,
    needs_gradient: bool = False,
    notice: Callable[[str], None] | None = None,
) -> Reward:
    """Build the reward of that name.

    Args:
        name: a name of `names()`; a weighted sum such as `0.7*hpsv2.1 + 0.3*aesthetic`; the file of
            a reward that was trained here (or its folder); the user's own `package.module:Name`.
        device: where its tower runs, e.g. "cpu" or "cuda:0".
        dtype: of its tower ("float32", "bfloat16", "float16"); heads and scores stay float32.
        weights: the user's own file instead of the published one.
        tower: the user's own copy of the CLIP tower's weights.
        settings: values for what the row of the table lets one set, e.g. `{"threshold": 0.01}` of
            `mps`, `{"antialias": False}` of `hpsv2.1`, `{"round_to_uint8": True}` of most.
        needs_gradient: the caller will back-propagate through the score.
        notice: told which of the user's modules is about to run; the default writes to stderr.

    Raises:
        RewardError: unknown name, weights that cannot be had or are damaged, no gradient.
    """
    options = LoadOptions(str(device), str(dtype).removeprefix("torch."), weights, tower)
    reward = _build(name, options, dict(settings or {}), needs_gradient, notice or to_stderr)
    return require_gradient(reward) if needs_gradient else reward


def _build(
    name: str,
    options: LoadOptions,
    settings: Mapping[str, object],
    needs_gradient: bool,
    notice: Callable[[str], None],
) -> Reward:
    from reward_models.expression import is_expression

    if is_expression(name):
        from reward_models.composite import load_composite

        _refuse(name, options, settings, files=())

        def load_one(component: str) -> Reward:
            return _build(component, options, {}, needs_gradient, notice)

        return load_composite(name, load_one)
    if is_file(name):
        from reward_models.trained import load_trained

        _refuse(name, options, settings, files=("tower",))
        return load_trained(existing_file(name), options)
    if ":" in name:
        from reward_models.plugin import load_plugin

        _refuse(name, options, settings, files=())
        return load_plugin(name, options, needs_gradient=needs_gradient, notice=notice)
    row = find(name)
    if row.weights is None and row.tower and options.tower is None:
        # Of a scorer that is nothing but its tower, the tower's file is the scorer's.
        options = replace(options, weights=None, tower=options.weights)
    files = (*(("weights",) if row.weights else ()), *(("tower",) if row.tower else ()))
    _refuse(row.info.name, options, settings, files=files, known=row.settings)
    row = replace(row, settings={**row.settings, **settings})
    module, _, function = row.target.partition(":")
    build: Callable[[Row, LoadOptions], Any] = getattr(import_module(module), function)
    reward: Reward = build(row, options)
    return reward


def _refuse(
    name: str,
    options: LoadOptions,
    settings: Mapping[str, object],
    *,
    files: Sequence[str],
    known: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """A file or setting given to a reward that reads none would be ignored silently."""
    where = f"reward {name}"
    if options.weights is not None and "weights" not in files:
        raise RewardError("takes no weights of its own", where=where)
    if options.tower is not None and "tower" not in files:
        raise RewardError("stands on no tower", where=where)
    for key, value in settings.items():
        if key not in known:
            what = ", ".join(known) or "nothing"
            raise RewardError(f"has no setting {key!r}", where=where, fix=f"it has: {what}")
        kind = type(known[key])
        fits = isinstance(value, int | float) if kind is float else type(value) is kind
        if not fits or (kind is float and isinstance(value, bool)):
            raise RewardError(
                f"setting {key} is {value!r}, not a {kind.__name__}",
                where=where,
                fix=f"its published value is {known[key]!r}",
            )
