"""Secrets in a config: `${NAME}` takes a text from the environment, and none is written down.

    output: ${SCRATCH}/runs/mine

A value that looks like a secret itself is warned about. In the config.yaml of a run the value of an
environment variable is written as `${NAME}` again, so the run can be resumed; of any other secret
only its name is left (`***api_key***`), and loading that is refused: a run must not go on with it.
`$${NAME}` is the plain text `${NAME}`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

from diffusion_align.config.problems import Problem
from diffusion_align.config.source import Node
from diffusion_align.secrecy.redaction import is_secret_value, placeholders, redact_value

_REFERENCE = re.compile(r"(\$?)\$\{([A-Z_][A-Z0-9_]*)\}")


def take_from_environment(root: Node, *, stored: bool = False) -> None:
    """Put the values of environment variables in place; problems join `root.problems`.

    Args:
        root: the tree, changed in place.
        stored: it is the record of a run, only to be compared with or looked at: what cannot be
            known is left as it stands there, and nothing is said.
    """
    for key, node in _texts(root, ""):
        text = node.value
        assert isinstance(text, str)
        if not stored:
            if is_secret_value(text, key.rpartition(".")[2]):
                _warn(key, node)
            for name in placeholders(text):
                what = f"a secret stood here ({name}); secrets are never written, so it is lost"
                root.problems.append(Problem(node.place, key, what, _advice(name)))
            for escaped, name in _REFERENCE.findall(text):
                if not escaped and name not in os.environ:
                    what = f"the environment variable {name} is not set"
                    hint = f"export {name}=..., or write $${{{name}}} if the text itself is meant"
                    root.problems.append(Problem(node.place, key, what, hint))
        node.value = _REFERENCE.sub(_value, text)


def without_secrets(value: Any, name: str) -> Any:
    """A value of a config as it may be written, under the key `name`; see the module."""
    return redact_value(_escaped(value), name, references=True)


def _texts(node: Node, key: str) -> Iterator[tuple[str, Node]]:
    if isinstance(node.value, dict):
        for name, inner in node.value.items():
            yield from _texts(inner, f"{key}.{name}" if key else name)
    elif isinstance(node.value, list):
        for inner in node.value:
            yield from _texts(inner, key)
    elif isinstance(node.value, str):
        yield key, node


def _value(match: re.Match[str]) -> str:
    if match[1]:
        return match[0][1:]
    return os.environ.get(match[2], match[0])


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: f"${match[0]}", value)
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    return value


def _warn(key: str, node: Node) -> None:
    warnings.warn(
        f"{node.place}  {key}  looks like a secret: take it from the environment, "
        "export MY_SECRET=... and write ${MY_SECRET} in its place",
        UserWarning,
        stacklevel=2,
    )


def _advice(name: str) -> str:
    variable = name if re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) else "MY_SECRET"
    return f"take it from the environment: export {variable}=... and write ${{{variable}}} here"
