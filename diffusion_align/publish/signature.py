"""Whether a model card is as it was written, or somebody has worked on it since. No torch.

The last line of a card is a comment with the sha256 of all that stands above. A card that was
edited belongs to whoever edited it: it is never overwritten.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

CARD_FILE = "README.md"
_LAST = re.compile(r"<!-- written by diffusion-align, sha256 ([0-9a-f]{64}) -->\n\Z")


def signed(text: str) -> str:
    """`text`, which ends with a line break, and its signature."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}<!-- written by diffusion-align, sha256 {digest} -->\n"


def is_untouched(path: Path) -> bool:
    """Whether the file at `path` is a card exactly as it was written; False without a file."""
    try:
        text = path.read_bytes().decode().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return False
    found = _LAST.search(text)
    return found is not None and signed(text[: found.start()]) == text
