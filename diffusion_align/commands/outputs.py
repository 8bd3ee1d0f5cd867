"""Where results go, looked at before minutes are spent on making them."""

from __future__ import annotations

import os
from pathlib import Path

from diffusion_align.errors import UserError


def check_folder(path: Path) -> None:
    """Refuse a folder that could not be made or written. Nothing is made yet.

    Raises:
        UserError: a file is in the way, or the folder may not be written.
    """
    for place in (path, *path.absolute().parents):
        if not place.exists():
            continue
        if not place.is_dir():
            raise UserError("this is a file; a folder is needed", where=str(place), fix=_ELSEWHERE)
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError("cannot write here", where=str(place), fix=_ELSEWHERE)
        return


def check_file(path: Path) -> None:
    """Refuse a file that could not be made or written. Nothing is made yet.

    Raises:
        UserError: a folder is in its place, or it may not be written.
    """
    if path.is_dir():
        raise UserError("this is a folder; a file is needed", where=str(path), fix=_ELSEWHERE)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError("cannot write here", where=str(path), fix=_ELSEWHERE)
    check_folder(path.parent)


_ELSEWHERE = "choose another place with --out"
