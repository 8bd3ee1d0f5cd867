"""The reward contract: what a scorer takes, what it gives back and what NaN means.

A reward maps pictures (or clips) and their prompts to one number each, higher is better, on the
raw scale that the scorer was published with; weighting and normalising happen elsewhere.

The NaN rule: an item that could not be scored (a NaN pixel, an unreadable picture) scores NaN.
It never becomes a silent 0, and it is taken out *before* any arithmetic, because NaN x 0 is NaN
in the gradient too. A misconfiguration (wrong shape, pixels of 0..255, another number of prompts,
a prompt that is no string) raises. A blank prompt is allowed: it is scored as the text "".

This module imports torch only inside the functions that need it, so that the catalogue, the CLI
and the config can use the names below without paying for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Modality = Literal["image", "video"]
Scope = Literal["item", "group"]

# Decoders overshoot [0, 1] by rounding; 0..255 or -1..1 pixels miss it by far more than this.
PIXEL_TOLERANCE = 0.01


class RewardError(Exception):
    """A problem that the user can solve: what happened, where, and what to do.

    `str(error)` is "where: what" and, when there is advice, every line of it indented below.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return "\n".join([head, *(f"    {line}" for line in self.fix.splitlines())])


@dataclass(frozen=True)
class RewardInfo:
    """What a scorer is, without loading it.

    `range` is prose ("about 4 to 7"): published scales are observations, not bounds.
    `scope` is "group" for judges that must see all samples of one prompt together.
    `components` names the rewards that a composite is made of, or the one that looks at a clip's
    frames: whoever trains on the whole has trained on each of them.
    `deterministic`: asked the same twice, it answers the same bits (on one machine); false for one
    that asks a server or draws numbers of its own, whose resumed runs are not claimed to be exact.
    """

    name: str
    modality: Modality
    differentiable: bool
    range: str
    licence: str
    source: str
    scope: Scope = "item"
    needs_prompt: bool = False
    components: tuple[str, ...] = ()
    deterministic: bool = True


@dataclass(frozen=True)
class Scores:
    """One number per item, and named sub-scores.

    Args:
        values: float32 [B], higher is better; NaN marks an item that could not be scored.
        parts: name -> float32 [B], e.g. the terms that `values` is made of.
        truncated: how many of the prompts were longer than the scorer reads, and were cut.
    """

    values: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    truncated: int = 0


class Reward(Protocol):
    """Anything with `info` and `score`. Scorers hold their models; nothing is global."""

    @property
    def info(self) -> RewardInfo: ...

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score float32 [B, 3, H, W] (video [B, F, 3, H, W]) in [0, 1] against B prompts."""
        ...


def check_scores(scores: Scores, count: int, name: str) -> Scores:
    """Make sure that a scorer kept the contract; its values come back as float32 [count].

    Raises:
        RewardError: naming the reward, when it returned anything but `Scores` of `count` floats.
    """
    if not isinstance(scores, Scores):
        raise RewardError(
            f"returned {type(scores).__name__}, not reward_models.Scores",
            where=f"reward {name}",
            fix="return reward_models.Scores(values) with values a float tensor of shape [B]",
        )
    values = _check_vector(scores.values, count, name, "values")
    parts = {
        key: _check_vector(part, count, name, f"parts[{key!r}]")
        for key, part in scores.parts.items()
    }
    return Scores(values, parts, scores.truncated)


# What a scorer thinks of the items that can be scored: (media [K, ...], their K prompts, their
# places in the batch) -> scores float [K], alone or with parts.
Judge = Callable[[Any, list[str], list[int]], Any]


def score_kept(media: Tensor, prompts: Sequence[str], info: RewardInfo, judge: Judge) -> Scores:
    """The shell of every scorer: check the input, score the items without NaN, keep the places.

    Args:
        media: float [B, 3, H, W] in [0, 1]; clips [B, F, 3, H, W] where `info.modality` is video.
        judge: never called without an item (some kernels refuse an empty batch).

    Raises:
        RewardError: media or prompts of another shape, range or number.
    """
    check = check_clips if info.modality == "video" else check_images
    check(media, prompts, info)
    keep = finite_items(media)
    kept = keep.nonzero().flatten().tolist()
    if not kept:
        return Scores(spread(media.new_empty(0), keep))
    # The very tensor where all are kept: scorers on one tower recognise it (`backbones.one_pass`).
    whole = len(kept) == len(media)
    answer = judge(media if whole else media[keep], [prompts[index] for index in kept], kept)
    scores = answer if isinstance(answer, Scores) else Scores(answer)
    return Scores(
        spread(scores.values.to(media.device), keep),
        {name: spread(part.to(media.device), keep) for name, part in scores.parts.items()},
        scores.truncated,
    )


def check_images(media: Tensor, prompts: Sequence[str], info: RewardInfo) -> None:
    """Refuse media that are not B pictures in [0, 1] with B prompts (NaN pixels are allowed).

    Raises:
        RewardError: naming the reward and what was wrong.
    """
    _check_media(media, prompts, info, "images", "[B, 3, H, W]", axes=4)


def check_clips(media: Tensor, prompts: Sequence[str], info: RewardInfo) -> None:
    """Refuse media that are not B clips in [0, 1] with B prompts (NaN pixels are allowed).

    Raises:
        RewardError: naming the reward and what was wrong.
    """
    _check_media(media, prompts, info, "clips", "[B, F, 3, H, W]", axes=5)


def _check_media(
    media: Tensor, prompts: Sequence[str], info: RewardInfo, what: str, shape: str, *, axes: int
) -> None:
    where = f"reward {info.name}"
    fix = f"{what} are float32 {shape} in [0, 1]"
    if not hasattr(media, "is_floating_point") or not media.is_floating_point():
        kind = getattr(media, "dtype", type(media).__name__)
        raise RewardError(f"{what} are {kind}", where=where, fix=fix)
    if media.ndim != axes or media.shape[-3] != 3:
        raise RewardError(f"{what} have the shape {list(media.shape)}", where=where, fix=fix)
    _check_prompts(prompts, f"{len(media)} {what}", len(media), where)
    if len(media) and not media.numel():
        raise RewardError(f"{what} have the shape {list(media.shape)}", where=where, fix=fix)
    if not media.numel():
        return
    # One pass settles nearly every batch. A NaN in it fails the comparison.
    low, high = media.detach().aminmax()
    if low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE:
        return
    # NaN and infinite pixels pass: they are a failed item, not a misconfiguration.
    distance = (media.detach() - 0.5).abs()
    outside = (distance > 0.5 + PIXEL_TOLERANCE) & distance.isfinite()
    if outside.any():
        low, high = media.detach()[outside].aminmax()
        raise RewardError(
            f"pixels reach from {low:.3g} to {high:.3g} outside [0, 1]", where=where, fix=fix
        )


def _check_prompts(prompts: Sequence[str], wanted: str, count: int, where: str) -> None:
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        given = "one string" if isinstance(prompts, str) else type(prompts).__name__
        raise RewardError(f"{given} for {wanted}", where=where, fix="give a list, one prompt each")
    if len(prompts) != count:
        raise RewardError(f"{len(prompts)} prompts for {wanted}", where=where, fix="one each")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise RewardError(
                f"prompt {index} is {type(prompt).__name__}, not a string",
                where=where,
                fix='where there is no prompt, give ""',
            )


def finite_items(media: Tensor) -> Tensor:
    """Which items have no NaN or infinity in them: bool [B]."""
    flat = media.detach().flatten(1)
    # The extremes carry NaN and infinity on, at a tenth of the cost of looking at every pixel.
    return flat.amax(dim=1).isfinite() & flat.amin(dim=1).isfinite()


def spread(values: Tensor, keep: Tensor) -> Tensor:
    """Put the scores [K] of the kept items back into their places; the others get NaN.

    Args:
        values: float32 [K], may carry a gradient.
        keep: bool [B] with K true entries.

    Returns:
        float32 [B]. The gradient reaches the kept items only, and no NaN enters it.
    """
    import torch

    full = torch.full(keep.shape, float("nan"), dtype=torch.float32, device=values.device)
    return full.masked_scatter(keep.to(values.device), values.float())


def require_gradient(reward: Reward) -> Reward:
    """The start-up check of every method that back-propagates through a reward.

    Raises:
        RewardError: when the reward has no gradient.
    """
    if not reward.info.differentiable:
        lacking = getattr(reward, "without_gradient", ())
        because = f" (because of {', '.join(lacking)})" if lacking else ""
        raise RewardError(
            f"has no gradient{because}, and this method back-propagates through the reward",
            where=f"reward {reward.info.name}",
            fix="choose a differentiable reward, or a policy-gradient method such as DDPO",
        )
    return reward


def _check_vector(vector: Tensor, count: int, name: str, what: str) -> Tensor:
    import torch

    where = f"reward {name}"
    fix = f"return a float tensor of shape [{count}], one number per image"
    if not isinstance(vector, torch.Tensor):
        raise RewardError(f"{what} is {type(vector).__name__}, not a tensor", where=where, fix=fix)
    if tuple(vector.shape) != (count,):
        shape = list(vector.shape)
        raise RewardError(f"{what} has shape {shape} for {count} images", where=where, fix=fix)
    if not vector.is_floating_point():
        raise RewardError(f"{what} has dtype {vector.dtype}", where=where, fix=fix)
    if vector.detach().isinf().any():
        raise RewardError(
            f"{what} is infinite", where=where, fix="return NaN for an item that has no score"
        )
    return vector.float()
