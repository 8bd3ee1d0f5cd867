"""The user's own rewards: `package.module:Name`, a class or a plain function.

They run only because the user named them, and their module's name is told before it is imported.
What they return is checked at every call, so that a wrong shape is named at its source.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward_models.base import (
    Reward,
    RewardError,
    RewardInfo,
    Scores,
    check_images,
    check_scores,
    finite_items,
    require_gradient,
    spread,
)
from reward_models.table import LoadOptions
from reward_models.user_code import import_named

ScoreFunction = Callable[[Tensor, Sequence[str]], Any]


class FunctionReward:
    """A plain function `fn(images, prompts) -> [B]` as a reward.

    The function gets float32 [B, 3, H, W] in [0, 1] and B prompts, and returns B numbers: a
    tensor, an array or a list; NaN for an image that it could not score. Images with a NaN in them
    never reach it, so its B may be smaller than the caller's.

    Args:
        function: the user's function.
        name: under which its scores are reported; default its own name.
        differentiable: whether its scores carry a gradient to the images.
        needs_prompt: whether it may not be called without prompts.
        deterministic: whether it answers the same when asked the same again.
    """

    def __init__(
        self,
        function: ScoreFunction,
        *,
        name: str = "",
        differentiable: bool = False,
        needs_prompt: bool = False,
        deterministic: bool = True,
    ) -> None:
        self.function = function
        own_name = getattr(function, "__qualname__", type(function).__name__)
        self.info = RewardInfo(
            name=name or own_name,
            modality="image",
            differentiable=differentiable,
            range="the user's own",
            licence="the user's own",
            source=f"{getattr(function, '__module__', '?')}:{own_name}",
            needs_prompt=needs_prompt,
            deterministic=deterministic,
        )

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Call the function and check what it returns."""
        check_images(media, prompts, self.info)
        keep = finite_items(media)
        if keep.all():
            return Scores(self._call(media, prompts))
        texts = [prompt for prompt, whole in zip(prompts, keep.tolist(), strict=True) if whole]
        values = self._call(media[keep], texts) if texts else media.new_empty(0)
        return Scores(spread(values, keep.to(values.device)))

    def _call(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """float32 [B] of the function, checked."""
        with _blaming(self.info.name):
            values = self.function(images, prompts)
        if not isinstance(values, torch.Tensor):
            values = self._as_tensor(values).to(images.device)
        elif not values.is_floating_point() and not values.is_complex():
            values = values.float()
        return check_scores(Scores(values), len(images), self.info.name).values

    def _as_tensor(self, values: Any) -> Tensor:
        try:
            return torch.from_numpy(np.asarray(values, dtype=np.float32).copy())
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"returned {type(values).__name__}, which holds no plain numbers",
                where=f"reward {self.info.name}",
                fix="return one number per image: a tensor, an array or a list of length B",
            ) from error


class CheckedReward:
    """A user's reward class whose every answer is checked.

    Its `score` may do without `fps` and `metadata`: it gets only what it names.

    Raises:
        RewardError: its `score` cannot be called with images and prompts.
    """

    def __init__(self, inner: Reward) -> None:
        self.inner = inner
        self.info = inner.info
        self._taken = _score_options(inner)

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score with the user's class."""
        offered: dict[str, Any] = {"fps": fps, "metadata": metadata}
        taken = {key: offered[key] for key in self._taken}
        with _blaming(self.info.name):
            scores = self.inner.score(media, prompts, **taken)
        return check_scores(scores, len(media), self.info.name)


def load_plugin(
    spec: str,
    options: LoadOptions,
    *,
    needs_gradient: bool,
    notice: Callable[[str], None],
) -> Reward:
    """Import `package.module:Name` and make it a reward.

    A class is built with `device` and `dtype` (strings) if its constructor names them, else
    without arguments. A function counts as differentiable when it says so (an attribute
    `differentiable`), or when a gradient is asked for and one small trial call carries one.

    Raises:
        RewardError: when it cannot be imported, keeps no contract, or lacks the gradient.
    """
    found = import_named(spec, where=f"reward {spec}", used_as="a reward", notice=notice)
    if inspect.isclass(found):
        reward: Reward = CheckedReward(_build(found, spec, options))
    elif hasattr(found, "score"):
        reward = CheckedReward(_contract(found, spec))
    elif callable(found):
        declared = bool(getattr(found, "differentiable", False))
        gradient = declared or (needs_gradient and _carries_gradient(found, spec))
        reward = FunctionReward(
            found,
            name=spec,
            differentiable=gradient,
            needs_prompt=bool(getattr(found, "needs_prompt", False)),
            deterministic=bool(getattr(found, "deterministic", True)),
        )
    else:
        raise RewardError(
            f"is {type(found).__name__}, neither a class nor a function", where=f"reward {spec}"
        )
    return require_gradient(reward) if needs_gradient else reward


def _score_options(reward: Reward) -> list[str]:
    """Which of `fps` and `metadata` a reward's `score` takes.

    Raises:
        RewardError: with the signature, where even so the call could not work.
    """
    try:
        signature = inspect.signature(reward.score)
    except (TypeError, ValueError):  # compiled code may have none
        return ["fps", "metadata"]
    parameters = signature.parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = [key for key in ("fps", "metadata") if anything or key in named]
    try:
        signature.bind(None, None, **dict.fromkeys(taken))
    except TypeError as error:
        raise RewardError(
            f"its signature is score{signature}: {error}",
            where=f"reward {reward.info.name}",
            fix="make it score(self, media, prompts, *, fps=None, metadata=None)",
        ) from error
    return taken


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """A bug in the user's own code stays as it is; the traceback says which reward it was in."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"raised by the code of reward {name}")
        raise


def _build(cls: type, spec: str, options: LoadOptions) -> Reward:
    parameters = inspect.signature(cls).parameters
    offered = {"device": options.device, "dtype": options.dtype}
    taken = {key: value for key, value in offered.items() if key in parameters}
    return _contract(cls(**taken), spec)


def _contract(reward: Any, spec: str) -> Reward:
    if not isinstance(getattr(reward, "info", None), RewardInfo) or not callable(
        getattr(reward, "score", None)
    ):
        raise RewardError(
            "has no `info` (a reward_models.RewardInfo) or no `score`",
            where=f"reward {spec}",
            fix="give it both, or name a plain function fn(images, prompts) -> [B] instead",
        )
    return reward  # type: ignore[no-any-return]


def _carries_gradient(function: ScoreFunction, spec: str) -> bool:
    images = torch.full((1, 3, 64, 64), 0.5, requires_grad=True)
    with torch.enable_grad():
        try:
            values = function(images, ["a photo"])
        except Exception as error:
            raise RewardError(
                f"failed on a grey 64 x 64 trial image: {type(error).__name__}: {error}",
                where=f"reward {spec}",
                fix="set `differentiable = True` on the function to skip the trial",
            ) from error
    return isinstance(values, torch.Tensor) and values.requires_grad
