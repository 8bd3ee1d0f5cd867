"""Places in running text where a secret may stand: URLs, assignments, headers, command lines.

A pattern only finds; whether what it found is a secret, `redaction` decides with `secrets`. Every
one has the groups `head` (kept) and `value`; `name` is what the value is called.

Source: RFC 3986 (user information), RFC 9110 section 11.6.2 (Authorization), the `.netrc` of GNU
inetutils.
"""

from __future__ import annotations

import re
from functools import cache

_NAMES = (
    r"token|secret|password|passwd|passphrase|credentials?"
    r"|(?:api|access|secret|private|account|auth)[_-]?key"
)
_PASSWORDS = r"password|passwd|passphrase|pwd|(?:api|access|secret|private)[_-]?key"
_OPTION = r"(?<![\w-])-{0,2}"  # a name does not keep the dashes of a command line


@cache
def url_credentials() -> re.Pattern[str]:
    """`https://user:password@host`: group `login` is `user:password`, `scheme` what is before."""
    return re.compile(
        r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<login>[^\s/\"'<>\\?#]+)@(?=[\w\[])"
    )


@cache
def query_parameters() -> re.Pattern[str]:
    """`?name=value` and its followers; the name is judged by `is_secret_parameter`."""
    return re.compile(r"(?P<head>[?&;](?P<name>[\w.~-]+)=)(?P<value>[^\s&#;\"'<>\\]+)")


@cache
def assignments() -> re.Pattern[str]:
    """`name = value` and `"name": "value"`, the value without blanks."""
    return re.compile(
        rf"(?P<head>{_OPTION}(?P<name>(?:\w[\w.-]*)?(?:{_NAMES}))[\"']?\s*[:=]\s*[\"']?)"
        r"(?P<value>[^\s\"',;&<>\\]{8,})",
        re.IGNORECASE,
    )


@cache
def quoted_passwords() -> re.Pattern[str]:
    """`password: "several words"`: between quotes a value may hold blanks."""
    return re.compile(
        rf"(?P<head>{_OPTION}(?P<name>(?:\w[\w.-]*)?(?:{_PASSWORDS}))[\"']?\s*[:=]\s*"
        r"(?P<quote>[\"']))(?P<value>(?:(?!(?P=quote))[^\n\\]){8,200})(?=(?P=quote))",
        re.IGNORECASE,
    )


@cache
def spaced() -> re.Pattern[str]:
    """`--token value`, `x-api-key value`, `password value`, and the line of a `.netrc`.

    Group `netrc` is there where the whole line says that it is a password.
    """
    return re.compile(
        rf"(?P<head>(?:(?<![\w-])--(?=[\w.-]*(?:{_NAMES})\s)|(?P<netrc>\b(?:machine\s+\S+|default)\s+login\s+\S+\s+)|"
        r"(?<![\w-])(?=password|passwd|passphrase|x-api-key))"
        rf"(?P<name>(?:\w[\w.-]*)?(?:{_NAMES}))(?:\s+is)?\s+[\"']?)"
        r"(?P<value>[^\s\"',;<>\\]+)",
        re.IGNORECASE,
    )


@cache
def authorizations() -> re.Pattern[str]:
    """`Authorization: Bearer value`, with any scheme or none."""
    return re.compile(
        r"(?P<head>\b(?P<name>authorization)[\"']?\s*[:=]\s*[\"']?"
        r"(?:(?:basic|bearer|token|digest|key|apikey)\s+)?)(?P<value>[^\s\"',;<>\\]{8,})",
        re.IGNORECASE,
    )


@cache
def bearers() -> re.Pattern[str]:
    """`bearer value` without its header; the value has a digit, as words have not."""
    return re.compile(
        r"(?P<head>\bbearer\s+)(?P<value>(?=\S*\d)[A-Za-z0-9._~+/=-]{16,})", re.IGNORECASE
    )
