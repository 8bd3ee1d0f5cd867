"""What a reward that is to be trained is made of, and what of it trains. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from reward_models.base import RewardError

HeadKind = Literal["cosine", "cross", "regression"]
Trains = Literal["head", "blocks", "all"]
Layers = Literal["linear", "linear-mse", "relu"]
_WORDS: dict[str, tuple[str | None, ...]] = {
    "head": (*get_args(HeadKind), None),
    "trains": get_args(Trains),
    "framing": ("crop", "letterbox", None),
    "layers": get_args(Layers),
}

# A regression head of several layers has as many hidden ones as the published heads, whose layout
# it keeps (`aesthetic`).
HIDDEN_LAYERS = 4


@dataclass(frozen=True)
class RewardPlan:
    """A start, a head over its CLIP tower, and what of both is trained.

    Raises:
        RewardError: a value out of range (`where` is the field's name).
    """

    start: str = field(
        default="clip-l",
        metadata={
            "doc": "a CLIP tower (tiny-clip, clip-l, clip-h ...), a reward that stands on one "
            "(hpsv2.1, aesthetic ...), or the file or run folder of a reward trained before"
        },
    )
    head: HeadKind | None = field(
        default=None,
        metadata={
            "doc": "cosine: of picture and prompt (HPS, PickScore); cross: the picture reads the "
            "prompt (MPS); regression: layers over the picture's embedding (LAION); null = the "
            "start's own, cosine on a tower"
        },
    )
    attributes: tuple[str, ...] | None = field(
        default=None,
        metadata={"doc": "what is judged, one output each; null = all of the data, else overall"},
    )
    trains: Trains = field(
        default="head",
        metadata={
            "doc": "head: the head alone (of cosine the two projections and the logit scale); "
            "blocks: also the last blocks of the towers; all: everything the score is made of"
        },
    )
    image_blocks: int = field(
        default=0, metadata={"doc": "last blocks of the image tower that train (trains: blocks)"}
    )
    text_blocks: int = field(
        default=0, metadata={"doc": "last blocks of the text tower that train (trains: blocks)"}
    )
    framing: Literal["crop", "letterbox"] | None = field(
        default=None,
        metadata={
            "doc": "how a cosine head sees a picture that is not square: CLIP's centre crop or "
            "HPS's letterbox; null = as the start, crop on a tower"
        },
    )
    layers: Layers = field(
        default="linear",
        metadata={
            "doc": "a new regression head: one layer (LAION v1), five without activations and "
            "with dropout (linear-mse, LAION v2), or the same with ReLU"
        },
    )
    hidden: tuple[int, ...] = field(
        default=(1024, 128, 64, 16),
        metadata={"doc": "widths of its four hidden layers (not of linear)"},
    )
    cross_layers: int = field(default=4, metadata={"doc": "layers of a new cross head"})
    cross_heads: int = field(default=16, metadata={"doc": "its attention heads"})
    cross_head_dim: int = field(default=64, metadata={"doc": "width of each of them, even"})
    cross_ff: int = field(
        default=4, metadata={"doc": "its feed-forward's width in widths of an embedding"}
    )
    condition: str = field(
        default="", metadata={"doc": 'what a cross head judges by, in words; "" = those of MPS'}
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "doc": "share of the best match that a word of the prompt must exceed (cross); null = "
            "the start's own, 0.3 on a tower"
        },
    )

    def __post_init__(self) -> None:
        for name, known in _WORDS.items():
            if getattr(self, name) not in known:
                said = ", ".join(str(word) for word in known if word is not None)
                what = f"must be one of {said}, not {getattr(self, name)!r}"
                raise RewardError(what, where=name)
        for name in ("image_blocks", "text_blocks"):
            _at_least(self, name, 0)
        for name in ("cross_layers", "cross_heads", "cross_head_dim", "cross_ff"):
            _at_least(self, name, 1)
        if self.cross_head_dim % 2:
            raise RewardError(
                f"must be even, not {self.cross_head_dim}: positions turn pairs of numbers",
                where="cross_head_dim",
            )
        if self.layers != "linear" and len(self.hidden) != HIDDEN_LAYERS:
            raise RewardError(
                f"names {len(self.hidden)} layers; the published heads have {HIDDEN_LAYERS}",
                where="hidden",
                fix="for example [1024, 128, 64, 16], or layers: linear",
            )
        if min(self.hidden, default=1) < 1:
            raise RewardError(f"must be at least 1, not {min(self.hidden)}", where="hidden")
        share = self.threshold
        if share is not None and not (math.isfinite(share) and 0 <= share < 1):
            raise RewardError(f"must lie in [0, 1), not {share}", where="threshold")
        self._check_attributes()
        self._check_blocks()
        self._check_unread()

    def _check_attributes(self) -> None:
        names = self.attributes
        if names is None:
            return
        if not names or len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise RewardError("must be different names, at least one", where="attributes")
        if self.head in ("cosine", "cross") and len(names) > 1:
            raise RewardError(
                f"a {self.head} head gives one score, not {len(names)}",
                where="attributes",
                fix="name one attribute, or use head: regression",
            )

    def _check_blocks(self) -> None:
        blocks = self.image_blocks + self.text_blocks
        if self.trains != "blocks" and blocks:
            name = "image_blocks" if self.image_blocks else "text_blocks"
            raise RewardError(
                f"says that blocks train, but trains is {self.trains}",
                where=name,
                fix="set trains: blocks",
            )
        if self.trains == "blocks" and not blocks:
            raise RewardError(
                "blocks, but neither image_blocks nor text_blocks says how many",
                where="trains",
                fix="set them, for example image_blocks: 2",
            )
        if self.head == "regression" and self.text_blocks:
            raise RewardError(
                "a regression head does not read the prompt", where="text_blocks", fix="set 0"
            )

    def _check_unread(self) -> None:
        """What another head reads would be ignored silently."""
        if self.head is None:
            return
        mine = {"cross": _OF_CROSS, "regression": _OF_REGRESSION, "cosine": _OF_COSINE}
        for head, names in mine.items():
            for name in names if head != self.head else ():
                if getattr(self, name) != RewardPlan.__dataclass_fields__[name].default:
                    raise RewardError(
                        f"belongs to a {head} head, and this one is {self.head}",
                        where=name,
                        fix=f"leave it out, or set head: {head}",
                    )


_OF_CROSS = (
    "cross_layers",
    "cross_heads",
    "cross_head_dim",
    "cross_ff",
    "condition",
    "threshold",
)
_OF_REGRESSION = ("layers", "hidden")
_OF_COSINE = ("framing",)


def _at_least(plan: RewardPlan, name: str, least: int) -> None:
    if getattr(plan, name) < least:
        raise RewardError(f"must be at least {least}, not {getattr(plan, name)}", where=name)
