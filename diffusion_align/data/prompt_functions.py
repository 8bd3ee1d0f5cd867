"""The user's own prompts: a function without arguments that returns all of them.

`my_module:my_function` in a config, the function itself in Python. It is called once, before
anything is sampled, and what it returns is shuffled and dealt as any other list is: a run that is
resumed calls it again and goes on exactly, as long as it returns the same list.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from itertools import islice
from typing import Any

from diffusion_align.errors import UserError
from reward_models.base import RewardError
from reward_models.user_code import import_named

MOST = 100_000
"""A function that yields more is taken for one without an end."""

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def names_function(source: object) -> bool:
    """Whether a source is written `my_module:my_function`. Nothing is imported."""
    return isinstance(source, str) and _NAME.fullmatch(source) is not None


@cache
def rows_of_name(spec: str) -> tuple[Any, ...]:
    """What the function of this name returns; imported, and called, once in a process.

    Raises:
        UserError: it cannot be imported or called, raised something, or returned no list.
    """
    try:
        function = import_named(spec, where=spec, used_as="the prompts")
    except RewardError as error:
        raise UserError(error.what, where=error.where, fix=error.fix) from error
    if not callable(function):
        raise UserError(f"is {type(function).__name__}, not a function", where=spec)
    return rows_of_function(function, spec)


def rows_of_function(function: Callable[[], Iterable[Any]], where: str = "") -> tuple[Any, ...]:
    """What the function returns, unchecked as to its items.

    Raises:
        UserError: as `rows_of_name`.
    """
    where = where or f"prompt function {getattr(function, '__qualname__', type(function).__name__)}"
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise UserError(
            f"cannot be called without arguments: {error}",
            where=where,
            fix="make it a function () that returns the whole list of prompts",
        ) from error
    except ValueError:  # compiled code may have no signature
        pass
    try:
        returned = function()
        rows = None if isinstance(returned, str) else tuple(islice(returned, MOST + 1))
    except Exception as error:  # it is their code: anything may be raised
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"raised {type(error).__name__}: {error}",
            where=where,
            fix=f"the error is at {frame.filename}:{frame.lineno}\n"
            "it must return a list of texts, Prompts or objects with a prompt",
        ) from error
    if rows is None:
        raise UserError("returned one text, not a list of them", where=where)
    if len(rows) > MOST:
        raise UserError(
            f"gives more than {MOST} prompts, perhaps without an end",
            where=where,
            fix="return a list: each of its prompts is drawn once before any is drawn twice",
        )
    return rows
