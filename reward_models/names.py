"""What a reward is called: names of the table, other spellings of them, files of trained ones.

Nothing in this module imports torch, so a mistyped name is answered at once.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from reward_models.base import RewardError
from reward_models.table import ROWS, Row

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


def differentiable() -> list[str]:
    """Those of `names()` whose scores have a gradient with respect to the pixels."""
    return [name for name, row in ROWS.items() if row.info.differentiable]


def find(name: str) -> Row:
    """The row of a name; case, surrounding blanks and `_` for `-` do not matter.

    Raises:
        RewardError: with the nearest name.
    """
    if (row := row_of(name)) is not None:
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


def _word(name: str) -> str:
    """A name as the table and the aliases write it, whether they hold it or not."""
    return name.strip().lower().replace("_", "-")


def row_of(name: str) -> Row | None:
    """The row of a name, or None where the table has none."""
    word = _word(name)
    return ROWS.get(_ALIASES.get(word, word))


def check_single(name: str) -> None:
    """Refuse an unknown name that is no expression; a `module:Name` is believed.

    Raises:
        RewardError: with the nearest name, or where no trained reward lies.
    """
    if is_file(name):
        existing_file(name)
    elif ":" not in name:
        find(name)


def is_file(name: str) -> bool:
    """Whether a name is the path of a trained reward; a folder does not shadow a known reward."""
    if not name.strip() or row_of(name) is not None:
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
