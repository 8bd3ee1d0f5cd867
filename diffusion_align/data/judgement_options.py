"""Which judgements a reward is trained on: a frozen dataclass, no torch in this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffusion_align.errors import OptionError, UserError
from diffusion_align.ranges import at_least, require, words

# What a simulated crowd says: `small-world:hps` and so on.
SMALL_WORLD = "small-world:"
CROWDS = ("hps", "mps", "aesthetic")
COUNT, HELD_OUT_COUNT = 2000, 500


@dataclass(frozen=True)
class JudgementOptions:
    """Pairs or ratings to learn from, and those to be validated on.

    Errors: a value out of range raises `OptionError`.
    """

    source: str = field(
        metadata={
            "doc": "a .jsonl, .json or .csv file, AVA.txt, or small-world:hps, small-world:mps, "
            "small-world:aesthetic"
        }
    )
    kind: Literal["pairs", "ratings", "ava"] | None = field(
        default=None,
        metadata={"doc": "what the file holds; null = ava for a .txt file, else pairs"},
    )
    pictures: str | None = field(
        default=None,
        metadata={"doc": "folder where the file's pictures lie; null = the file's own folder"},
    )
    limit: int | None = field(
        default=None,
        metadata={
            "doc": "use only so many rows, drawn at random (null = all); of small-world: how many "
            f"are made (null = {COUNT})"
        },
    )
    validation: str | None = field(
        default=None,
        metadata={"doc": "a file of judgements held out, of the same kind; null = a share"},
    )
    validation_pictures: str | None = field(
        default=None, metadata={"doc": "folder of its pictures; null = as `pictures`"}
    )
    validation_share: float = field(
        default=0.1,
        metadata={
            "doc": "share of the rows held out where no file is; rows of one prompt or picture "
            "stay together; 0 = none (small-world: captions of its held-out half)"
        },
    )
    validation_limit: int | None = field(
        default=None,
        metadata={
            "doc": "validate on only so many rows (null = all; of small-world: "
            f"{HELD_OUT_COUNT} are made)"
        },
    )
    missing: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"doc": "what to do about pictures that are not there"}
    )
    damaged: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"doc": "what to do about rows that are malformed"}
    )

    def __post_init__(self) -> None:
        words(self)
        at_least(self, 1, "limit", "validation_limit")
        require(self, "lie in [0, 1)", lambda share: 0 <= share < 1, "validation_share")
        if self.crowd is not None and self.validation is not None:
            raise OptionError(
                "validation",
                "the small world makes its own held-out judgements",
                fix="leave it out, or name a file as data.source",
                reads=("source",),
            )
        if self.crowd is not None:
            self._refuse_unread(
                ("kind", "pictures", "missing", "damaged", "validation_pictures"),
                "belongs to a file, and the small world is made here",
                "source",
            )
        elif self.validation is None:
            self._refuse_unread(
                ("validation_pictures",), "belongs to a file in data.validation", "validation"
            )

    def _refuse_unread(self, names: tuple[str, ...], why: str, beside: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise OptionError(name, why, fix="leave it out", reads=(beside,))

    def check_files(self) -> None:
        """Refuse files and folders that are not there; cheap, and nothing is read.

        Raises:
            UserError: naming all of them.
        """
        if self.crowd is not None:
            return
        files = {"source": self.source, "validation": self.validation}
        folders = {"pictures": self.pictures, "validation_pictures": self.validation_pictures}
        missing = [
            f"data.{key}: no such file: {name}"
            for key, name in files.items()
            if name is not None and not Path(name).expanduser().is_file()
        ]
        missing += [
            f"data.{key}: no such folder: {name}"
            for key, name in folders.items()
            if name is not None and not Path(name).expanduser().is_dir()
        ]
        if missing:
            raise UserError(
                "the judgements to learn from are not there",
                where="data",
                fix="\n".join([*missing, "the head of a shipped config says where to get them"]),
            )

    @property
    def crowd(self) -> str | None:
        """The simulated crowd that the source names; None for a file."""
        source = self.source.strip()
        return source.removeprefix(SMALL_WORLD) if source.startswith(SMALL_WORLD) else None

    @property
    def file_kind(self) -> Literal["pairs", "ratings", "ava"]:
        """How the source's file is read."""
        if self.kind is not None:
            return self.kind
        return "ava" if self.source.lower().endswith(".txt") else "pairs"

    @property
    def judged(self) -> Literal["pairs", "ratings"]:
        """What the rows are."""
        if self.crowd is not None:
            return "ratings" if self.crowd == "aesthetic" else "pairs"
        return "pairs" if self.file_kind == "pairs" else "ratings"
