"""The user's own code by name: `package.module:name`, imported because the user named it.

The module's name is told before it is imported. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

from reward_models.base import RewardError


def to_stderr(text: str) -> None:
    """The default of every `notice`."""
    print(text, file=sys.stderr)


def import_named(
    spec: str, *, where: str, used_as: str, notice: Callable[[str], None] = to_stderr
) -> Any:
    """What `package.module:name` names, a class, a function or whatever it is.

    Args:
        spec: of that form.
        where: what an error begins with.
        used_as: what for, told to the user.
        notice: told before anything of the module runs.

    Raises:
        RewardError: another form, the module cannot be imported (with the line), or lacks the name.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise RewardError("is not of the form package.module:Name", where=where)
    # The console script's path lacks the working folder, where users keep such a module. It goes
    # last, so that a file there cannot take the place of an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    notice(f"running your own code: module {module_name} ({attribute} is used as {used_as})")
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:  # it is their code: anything may be raised
        raise _import_error(error, module_name, where) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise RewardError(f"module {module_name} has no {attribute}", where=where)
    return found


def _import_error(error: BaseException, module_name: str, where: str) -> RewardError:
    """What the import of a user's module raised, as one message with its file and line."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{module_name}.".startswith(f"{missing}."):
        return RewardError(
            f"cannot be imported: {error}",
            where=where,
            fix="run from the folder that holds the module, or install its package",
        )
    if isinstance(error, SyntaxError):
        place, text = f"{error.filename}:{error.lineno}", error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        # The first are this file and Python's import machinery, the next is the module's own line.
        own = [f for f in frames[1:] if "importlib" not in f.filename]
        place, text = f"{own[0].filename}:{own[0].lineno}" if own else module_name, str(error)
    return RewardError(
        f"module {module_name} cannot be imported: {type(error).__name__}: {text}",
        where=where,
        fix=f"the error is at {place}",
    )
