"""Texts of people inside Markdown: what they wrote is shown, never obeyed."""

from __future__ import annotations

import re
import string
import unicodedata

# Signs that mean nothing inside a line. At its beginning some do: a list, a heading, a rule.
_PLAIN = frozenset(string.ascii_letters + string.digits + " ,-/.()%+?;:='\"!{}^")
_NUMBERED = re.compile(r"\d+[.)](?= |$)")
_BEGINS = re.compile(r"[-+](?= |$)|[-=](?=[-= ]*$)")
_ADDRESS = re.compile(r"(?<![a-z])(www)\.", re.IGNORECASE)
_SCHEME = re.compile(r"\b(https?|ftp|mailto|xmpp|data|javascript):", re.IGNORECASE)
_SHORTCODE = re.compile(r":(?=[\w+-]+:)")
_INSIDE_A_WORD = re.compile(r"(?<=[^\W_])_(?=[^\W_])")
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")


def escaped(text: object) -> str:
    """`text` on one line, with every sign that Markdown or HTML would read as an entity.

    A sign is left as it is where it means nothing: `tiny_sd`, `-0.003`, `small-world:45`.
    Line breaks become spaces (a line of its own could be a heading or a fence); invisible
    characters, which can turn the direction of a line, are left out. A bare address does not become
    a link.

    >>> escaped("a <b> | *c* www.x.org 2.5 d_e")
    'a &#60;b&#62; &#124; &#42;c&#42; www&#46;x.org 2.5 d_e'
    """
    words = "".join(
        sign
        for sign in " ".join(str(text).split())
        if sign.isprintable() and unicodedata.category(sign) not in _HIDDEN
    )
    words = words.strip()
    inside = {found.start() for found in _INSIDE_A_WORD.finditer(words)}
    line = "".join(
        _entity(sign) if sign.isascii() and sign not in _PLAIN and place not in inside else sign
        for place, sign in enumerate(words)
    )
    line = _ADDRESS.sub(r"\1&#46;", line)
    line = _SCHEME.sub(r"\1&#58;", line)
    line = _SHORTCODE.sub("&#58;", line)
    if _BEGINS.match(line):
        return _entity(line[0]) + line[1:]
    if numbered := _NUMBERED.match(line):
        end = numbered.end() - 1
        return line[:end] + _entity(line[end]) + line[end + 1 :]
    return line


def _entity(sign: str) -> str:
    return f"&#{ord(sign)};"
