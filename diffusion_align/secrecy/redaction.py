"""The one redactor: secrets come from the environment and are never written.

Every text of ours that reaches a file, a tracker or the screen passes `redact`, every tree of
values `redact_value`. A secret becomes `***name***`: the variable it comes from, the key it stands
under, or the kind of token. This module imports nothing of ours but `secrets` and `places`, so that
every room may use it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from diffusion_align.secrecy import places, secrets
from diffusion_align.secrecy.secrets import Secret, is_ordinary, is_secret_name, looks_random

__all__ = ["is_secret_name", "is_secret_value", "placeholders", "redact", "redact_value"]

URL_LOGIN = "url-credentials"
AUTHORIZATION = "authorization"
_PLACEHOLDER = re.compile(r"\*\*\*([A-Za-z_][\w.-]*)\*\*\*")
_KNOWN = re.compile(rf"(?:{_PLACEHOLDER.pattern}|\$\{{[A-Z_][A-Z0-9_]*\}})+")
# The pictures of a report; their letters are no text, and by chance they may look like a token.
_PICTURE = re.compile(r"(data:[\w.+/-]+;base64,[A-Za-z0-9+/=]+)")


def redact(text: str, *, references: bool = False) -> str:
    """`text` with every secret replaced; what holds none comes back as it is, and twice is once.

    Args:
        references: write `${NAME}` instead of `***NAME***` where a secret is exactly the value of
            an environment variable: a config says so what it needs, and loads again.

    >>> redact("https://me:hunter2@host/score?token=abc&size=2")
    'https://***url-credentials***@host/score?token=***token***&size=2'
    """
    return _whole(text, _environment_secrets(), references)


def _whole(text: str, found: list[Secret], references: bool) -> str:
    if len(text) < secrets.MIN_LENGTH:
        return text
    pieces = _PICTURE.split(text) if ";base64," in text else [text]
    pieces[::2] = [_redacted(piece, found, references) for piece in pieces[::2]]
    return "".join(pieces)


def redact_value(value: Any, name: str = "", *, references: bool = False) -> Any:
    """A tree of dicts, lists, tuples and plain values with every secret in it replaced.

    Args:
        value: texts are redacted, keys too; a text under a name such as `api_key` is replaced as a
            whole, unless it is an ordinary word. Other values come back as they are.
        name: the key under which `value` stands.
        references: as in `redact`.
    """
    return _tree(value, name, _environment_secrets(), references)


# What the environment holds is asked once for a whole text or tree: asking is slower than looking.
def _tree(value: Any, name: str, found: list[Secret], references: bool) -> Any:
    if isinstance(value, str):
        clean = _whole(value, found, references)
        return f"***{name}***" if clean == value and _is_secret(value, name, found) else clean
    if isinstance(value, Mapping):
        return {
            _whole(key, found, False) if isinstance(key, str) else key: _tree(
                inner, str(key), found, references
            )
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_tree(inner, name, found, references) for inner in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def is_secret_value(text: str, name: str = "") -> bool:
    """Whether `text`, standing under the key `name`, is or holds a secret."""
    return _is_secret(text, name, _environment_secrets())


def _is_secret(text: str, name: str, found: list[Secret]) -> bool:
    if _whole(text, found, False) != text:
        return True
    return is_secret_name(name) and not is_ordinary(text) and not _is_known(text)


def placeholders(text: str) -> list[str]:
    """The names of secrets that once stood in `text` (`***HF_TOKEN***`)."""
    kinds = {URL_LOGIN, AUTHORIZATION, *secrets.shapes()}
    return [name for name in _PLACEHOLDER.findall(text) if name in kinds or is_secret_name(name)]


def _environment_secrets() -> list[Secret]:
    return _secrets_of(tuple(os.environ.items()))


@lru_cache(maxsize=4)
def _secrets_of(variables: tuple[tuple[str, str], ...]) -> list[Secret]:
    return secrets.of_environment(dict(variables))


def _redacted(text: str, found: list[Secret], references: bool) -> str:
    for secret in found:
        if secret.text in text:
            stands = f"${{{secret.name}}}" if references and secret.whole else None
            text = text.replace(secret.text, stands or f"***{secret.name}***")
    for kind, shape in secrets.shapes().items():
        text = shape.sub(f"***{kind}***", text)
    if "://" in text:
        text = places.url_credentials().sub(_login, text)
    if "=" in text:
        text = places.query_parameters().sub(_parameter, text)
    if "=" in text or ":" in text:
        text = places.authorizations().sub(_authorization, text)
        text = places.quoted_passwords().sub(_quoted, text)
        text = places.assignments().sub(_assignment, text)
    text = places.bearers().sub(_bearer, text)
    return places.spaced().sub(_spaced, text)


def _login(match: re.Match[str]) -> str:
    login = match["login"]
    if _is_known(login.rpartition(":")[2]) or (":" not in login and is_ordinary(login)):
        return match[0]  # a name alone, as in ssh://git@host
    return f"{match['scheme']}***{URL_LOGIN}***@"


def _parameter(match: re.Match[str]) -> str:
    if not secrets.is_secret_parameter(match["name"]) or _is_known(match["value"]):
        return match[0]
    return f"{match['head']}***{match['name']}***"


def _authorization(match: re.Match[str]) -> str:
    if is_ordinary(match["value"]) or _is_known(match["value"]):
        return match[0]
    return f"{match['head']}***{AUTHORIZATION}***"


def _bearer(match: re.Match[str]) -> str:
    return f"{match['head']}***{AUTHORIZATION}***" if looks_random(match["value"]) else match[0]


def _quoted(match: re.Match[str]) -> str:
    value = match["value"]
    if is_ordinary(value) or _is_known(value) or value.replace(" ", "").isalpha():
        return match[0]
    return _named(match)


def _assignment(match: re.Match[str]) -> str:
    value = match["value"]
    if is_ordinary(value) or _is_known(value):
        return match[0]
    # A long row of words behind "password" is a passphrase, behind "token" it is prose.
    phrase = "pass" in match["name"].lower() and re.fullmatch(r"[\w.!-]+", value)
    return _named(match) if phrase or looks_random(value) else match[0]


def _spaced(match: re.Match[str]) -> str:
    value = match["value"]
    if _is_known(value):
        return match[0]
    random = len(value) >= secrets.MIN_LENGTH and not is_ordinary(value) and looks_random(value)
    return _named(match) if random or match["netrc"] else match[0]


def _named(match: re.Match[str]) -> str:
    return f"{match['head']}***{match['name'].lstrip('.-')}***"


def _is_known(value: str) -> bool:
    """Whether nothing but placeholders and references stands there already."""
    return _KNOWN.fullmatch(value.rstrip(".,)]")) is not None
