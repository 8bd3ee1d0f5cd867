"""Range checks of the rooms' options, made where an option dataclass is built (`__post_init__`).

Every refusal is an `OptionError` that names the field, so that `config/` can report it with its
line, together with all others, and whoever writes Python gets the same sentence. This module is a
leaf without torch, as every `options.py` is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from diffusion_align.errors import OptionError, did_you_mean


def require(options: object, wanted: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Every named number is finite and `holds`; None stands for a default and is let through.

    Raises:
        OptionError: `steps: must be at least 1, not 0`.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and holds(value)):
            raise OptionError(name, f"must {wanted}, not {value}")


def at_least(options: object, least: float, *names: str) -> None:
    """Every named number is `least` or more.

    Raises:
        OptionError: it is not.
    """
    require(options, f"be at least {least}", lambda value: value >= least, *names)


def positive(options: object, *names: str) -> None:
    """Every named number is above 0.

    Raises:
        OptionError: it is not.
    """
    require(options, "be above 0", lambda value: value > 0, *names)


def words(options: object) -> None:
    """Every field that is declared as a `Literal`, or one or None, holds one of its words.

    Raises:
        OptionError: with the nearest word.
    """
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        known = tuple(word for part in literals for word in get_args(part))
        is_absent = value is None and type(None) in get_args(hint)
        if known and get_origin(hint) is not tuple and value not in known and not is_absent:
            near = did_you_mean(str(value), map(str, known))
            raise OptionError(
                name,
                f"must be one of {', '.join(map(str, known))}, not {value!r}",
                fix=f"did you mean {near} ?" if near else "",
            )


def nearest_divisors(total: int, wanted: int) -> str:
    """The divisors of `total` next below and above `wanted`.

    >>> nearest_divisors(32, 12)
    '8, 16'
    """
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    below = [n for n in divisors if n <= wanted][-1:]
    above = [n for n in divisors if n > wanted][:1]
    return ", ".join(map(str, below + above))
