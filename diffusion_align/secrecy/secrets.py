"""What a secret looks like: names of variables, known shapes of tokens, places in URLs.

Nothing here replaces anything (see `redaction`). Two rules keep ordinary text whole: a value of
fewer than 8 characters is no secret, and neither is an ordinary word, a number or a path that
exists. Where the place alone says what it is (the password of a URL, `?token=`), length does not
matter.

Source: shapes as their issuers document them (Hugging Face, GitHub, GitLab, OpenAI, AWS, Google,
Slack, W&B, Stripe, npm, PyPI; RFC 3986 for user information, RFC 7519 for JWT, RFC 7468 for PEM).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote

from diffusion_align.secrecy import places

MIN_LENGTH = 8
"""A shorter value is no secret: it would be found inside words."""

_LONGEST_WORD, _LONGEST_PHRASE = 15, 24
_SECRET_WORDS = {
    "token", "key", "secret", "password", "passwd", "passphrase", "pass", "pwd", "apikey",
    "credential", "credentials", "authorization", "pat", "auth", "cookie",
}  # fmt: skip
# In a name of one word these mean something else.
_PLAIN_ALONE = {"key", "pass", "pwd", "pat", "auth", "cookie"}
_NOT_A_SECRET = {"public_key", "sort_key", "primary_key", "pad_token", "eos_token", "bos_token"}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

# A word, several in CamelCase, one with a short number before or behind it, or a number.
_READABLE = re.compile(
    r"(?:[a-z]{1,20}|[A-Z]{1,20}|[A-Z]?[a-z]{2,20}(?:[A-Z][a-z]{2,20}){0,3})\d{0,4}"
    r"|\d{1,4}[A-Za-z]{0,3}"
)


@dataclass(frozen=True)
class Secret:
    """A text that must not be written.

    Args:
        text: as it may appear, plain or encoded.
        name: the environment variable it comes from.
        whole: whether it is exactly the variable's value, so that `${name}` stands for it.
    """

    text: str
    name: str
    whole: bool


@cache
def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret: `HF_TOKEN`, `api_key`, `dbPassword`.

    The last word decides, so that `max_tokens` and `TOKENIZERS_PARALLELISM` do not;
    `AWS_ACCESS_KEY_ID` does.

    >>> [is_secret_name(name) for name in ("HF_TOKEN", "api_key", "max_tokens", "PWD")]
    [True, True, False, False]
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    if words and (words[-1] in ("id", "old", "new") or words[-1].isdigit()):
        words = words[:-1]
    if not words or "_".join(words[-2:]) in _NOT_A_SECRET:
        return False
    if len(words) == 1 and words[0] in _PLAIN_ALONE:
        return False
    named = words[-1] in _SECRET_WORDS
    return named or any(word in ("password", "passwd", "passphrase", "secret") for word in words)


def is_ordinary(value: str) -> bool:
    """Whether a value is too plain to be a secret: short, words, a number, or a path that exists.

    >>> [is_ordinary(text) for text in ("short", "production", "1e-4", "x8Kf02-mq7Zt")]
    [True, True, True, False]
    """
    value = value.strip()
    return len(value) < MIN_LENGTH or _is_number(value) or _is_words(value) or _is_path(value)


def looks_random(value: str) -> bool:
    """Whether a value is no text, path or expression of readable words and short numbers.

    In running text a name before a colon is weak evidence ("the token:sunlit-meadow"); this is the
    rest of it.

    >>> [looks_random(text) for text in ("hunter2hunter", "abcDEF12", "token_type_ids[0]", "8k")]
    [True, True, False, False]
    """
    pieces = re.split(r"[-_./:,;|()\[\]{}<>*=`\s]+", value.strip("!?"))
    return not all(_READABLE.fullmatch(piece) for piece in pieces if piece)


def of_environment(variables: Mapping[str, str]) -> list[Secret]:
    """All secrets that environment variables hold, in every form in which a writer may put them.

    A variable counts by its name, or because its value is a URL with credentials (then the password
    alone counts as well). The longest come first, so that none is cut by a shorter one inside it.
    """
    found: dict[str, Secret] = {}
    for name, value in variables.items():
        for secret in _of_variable(name, value):
            if secret.text not in found or secret.whole:
                found[secret.text] = secret
    return sorted(found.values(), key=lambda secret: -len(secret.text))


def _of_variable(name: str, value: str) -> Iterator[Secret]:
    stripped = value.strip()
    urls = list(places.url_credentials().finditer(stripped))
    is_login = bool(urls) and urls[0].start() == 0
    if not is_login and (not is_secret_name(name) or is_ordinary(stripped)):
        return
    for text in (value, stripped):
        yield Secret(text, name, whole=text == value)
    pieces = [stripped]
    for url in urls:
        password = url["login"].rpartition(":")[2]
        pieces += [p for p in (password, unquote(password)) if not is_ordinary(p)]
    pieces += [line for line in stripped.splitlines() if len(line) >= 20 and "---" not in line]
    for piece in pieces:
        for form in _forms(piece):
            if len(form) >= MIN_LENGTH and form != value:
                yield Secret(form, name, whole=False)


def _forms(value: str) -> set[str]:
    """`value` as JSON, YAML, CSV, HTML, a URL and `repr` write it."""
    escaped = html.escape(value)
    return {
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        value.replace("'", "''"),
        value.replace('"', '""'),
        escaped,
        escaped.replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
        quote(value),
        quote(value, safe=""),
        quote_plus(value),
        repr(value)[1:-1],
    }


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_words(value: str) -> bool:
    if len(value) > _LONGEST_PHRASE or not re.fullmatch(r"[A-Za-z]+(?:[-_. ][A-Za-z]+)*", value):
        return False
    words = re.split(r"[-_. ]", value)
    return all(
        len(word) <= _LONGEST_WORD and (word.islower() or word.isupper() or word.istitle())
        for word in words
    )


def _is_path(value: str) -> bool:
    if not value.startswith(("/", "~", ".")) and value[1:3] != ":\\":
        return False
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def is_secret_parameter(name: str) -> bool:
    """Whether a query parameter of this name is a secret: `token`, `key`, `X-Amz-Signature` ..."""
    last = [word.lower() for word in _WORDS.findall(name)][-1:]
    return is_secret_name(name) or bool(
        {"key", "sig", "signature", "auth", "token"}.intersection(last)
    )


@cache
def shapes() -> dict[str, re.Pattern[str]]:
    """Kind of token -> its shape. A boundary on both sides keeps longer words whole."""
    left, right = r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9])"
    plain = {
        "huggingface-token": (
            r"(?:hf_(?:oauth|jwt)_[A-Za-z0-9_.=-]{20,}|(?:hf_|api_org_)[A-Za-z0-9]{20,})"
        ),
        "github-token": r"(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{22,})",
        "gitlab-token": r"glpat-[A-Za-z0-9_-]{20,}",
        # Names of folders begin with "sk-" too: one long run with digits, or an issuer's prefix.
        "sk-key": (
            r"(?:sk-(?:proj|ant|svcacct|admin|or)-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"
            r"|sk-(?=[A-Za-z]*\d)[A-Za-z0-9]{32,})"
        ),
        "stripe-key": r"[rs]k_(?:live|test)_[A-Za-z0-9_]{16,}",
        "npm-token": r"npm_[A-Za-z0-9]{36,}",
        "pypi-token": r"pypi-[A-Za-z0-9_-]{50,}",
        "aws-key": r"(?:AKIA|ASIA)[A-Z0-9]{16}",
        "google-key": r"AIza[A-Za-z0-9_-]{35}",
        "slack-token": r"xox[abeoprs]-[A-Za-z0-9-]{10,}",
        "wandb-key": r"wandb_v\d+_[A-Za-z0-9_]{20,}",
        "web-token": r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    }
    found = {kind: re.compile(left + shape + right) for kind, shape in plain.items()}
    found["wandb-key"] = re.compile(
        rf"{found['wandb-key'].pattern}|(?i:(?<=wandb login )|(?<=wandb key ))[0-9a-f]{{40}}{right}"
    )
    found["private-key"] = re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
    )
    return found
