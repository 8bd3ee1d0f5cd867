"""Standard output and error with the redactor in front: the last lock of the command line.

Tracebacks, warnings and what libraries print pass here, which no code of ours could redact.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import IO, Any

from diffusion_align.secrecy.redaction import redact


class RedactedStream:
    """A text stream whose every write is redacted; all else is the stream's own.

    It looks at one write at a time: a secret that somebody writes in two halves is not found. Lines
    of ours, tracebacks and warnings are written whole.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without its secrets; bytes are refused, as every text stream does."""
        if not isinstance(text, str):
            raise TypeError(f"a text stream takes str, not {type(text).__name__}")
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            # Through it, whoever writes bytes would pass by.
            raise AttributeError("a redacted stream has no buffer")
        return getattr(self._stream, name)


def redact_standard_streams() -> None:
    """Put the redactor before `sys.stdout` and `sys.stderr`; twice is once."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactedStream):
            setattr(sys, name, RedactedStream(stream))
