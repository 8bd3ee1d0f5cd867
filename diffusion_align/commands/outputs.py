"""Where results go, looked at before minutes are spent on making them."""

from __future__ import annotations

import os
from pathlib import Path

from diffusion_align.errors import UserError

_ELSEWHERE = "choose another place with --out"


def check_folder(path: Path, *, fix: str = _ELSEWHERE) -> None:
    """Refuse a folder that could not be made or written. Nothing is made yet.

    Raises:
        UserError: a file is in the way, or the folder may not be written.
    """
    for place in (path, *path.absolute().parents):
        if not place.exists():
            continue
        if not place.is_dir():
            raise UserError("this is a file; a folder is needed", where=str(place), fix=fix)
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError("cannot write here", where=str(place), fix=fix)
        return


def check_file(path: Path, *, fix: str = _ELSEWHERE) -> None:
    """Refuse a file that could not be made or written. Nothing is made yet.

    Raises:
        UserError: a folder is in its place, or it may not be written.
    """
    if path.is_dir():
        raise UserError("this is a folder; a file is needed", where=str(path), fix=fix)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError("cannot write here", where=str(path), fix=fix)
    check_folder(path.parent, fix=fix)


def check_empty(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it may be overwritten. Nothing is made yet.

    Raises:
        UserError: as `check_folder`, or it is not empty.
    """
    check_folder(path)
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(
            "this folder is not empty",
            where=str(path),
            fix=f"{_ELSEWHERE}, or replace the pictures in it with --overwrite",
        )
