"""Rewards by name: find a row of the table, build what it describes.

Nothing in this module imports torch, so a mistyped name is answered at once.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reward_models.base import Reward, RewardError, require_gradient
from reward_models.table import ROWS, FilePath, LoadOptions, Row
from reward_models.towers import TOWERS, Tower

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
    "find",
    "load",
    "names",
]

# How the file of a trained reward is called in the folder of its run.
TRAINED_FILE = "reward.safetensors"

_ALIASES = {
    "aesthetic-v2": "aesthetic",
    "clip-score": "clip",
    "clipscore": "clip",
    "hps-v2": "hpsv2",
    "hps-v2.1": "hpsv2.1",
    "imagereward": "image-reward",
    "pick-score": "pickscore",
}


def names() -> list[str]:
    """The names that `load` knows, in the order of the table."""
    return list(ROWS)


def find(name: str) -> Row:
    """The row of a name; case, surrounding blanks and `_` for `-` do not matter.

    Raises:
        RewardError: with the nearest name.
    """
    if (row := _row_of(name)) is not None:
        return row
    word = _word(name)
    if not word:
        raise RewardError("the name of the reward is empty", fix=f"Rewards: {', '.join(ROWS)}")
    close = difflib.get_close_matches(word, [*ROWS, *_ALIASES], n=1)
    hint = f"did you mean {close[0]} ?   " if close else ""
    raise RewardError(
        f"unknown reward {name!r}",
        fix=f"{hint}Rewards: {', '.join(ROWS)}; a sum of them (0.7*hpsv2.1 + 0.3*aesthetic); "
        "the file of a trained one; or your own as package.module:Name",
    )


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
    row = _row_of(name)
    return name if row is None else row.info.name


def _word(name: str) -> str:
    """A name as the table and the aliases write it, whether they hold it or not."""
    return name.strip().lower().replace("_", "-")


def _row_of(name: str) -> Row | None:
    word = _word(name)
    return ROWS.get(_ALIASES.get(word, word))


def check_name(name: str) -> None:
    """Refuse an unknown name without loading anything; a `module:Name` is believed.

    Raises:
        RewardError: with the nearest name, or what is wrong with an expression.
    """
    from reward_models.expression import is_expression, parse_expression

    if is_expression(name):
        parse_expression(name)
    elif is_file(name):
        existing_file(name)
    elif ":" not in name:
        find(name)


def components(name: str) -> list[str]:
    """The rewards behind a name: those of an expression, else the name itself. Nothing is loaded.

    Raises:
        RewardError: as `check_name`.
    """
    from reward_models.expression import is_expression, parse_expression

    if is_expression(name):
        return [term.name for term in parse_expression(name).terms]
    return [name]


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
    reward = _build(name, options, dict(settings or {}), needs_gradient, notice or _to_stderr)
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


def is_file(name: str) -> bool:
    """Whether a name is the path of a trained reward; a folder does not shadow a known reward."""
    if not name.strip() or _row_of(name) is not None:
        return False
    return name.endswith(".safetensors") or Path(name).expanduser().is_dir()


def existing_file(name: str) -> Path:
    """The weight file behind a path: itself, or the one in its folder."""
    path = Path(name).expanduser()
    for file in (path / TRAINED_FILE, path / "final" / TRAINED_FILE) if path.is_dir() else (path,):
        if file.is_file():
            return file
    what = f"holds no {TRAINED_FILE}" if path.is_dir() else "no such reward file"
    raise RewardError(what, where=name, fix="give the file or the run folder of a trained reward")


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


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)
