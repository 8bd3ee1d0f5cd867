"""Learn what a pipeline feeds its denoiser, by running its own `__call__` up to the first step.

The denoiser's `forward` is replaced by a recorder that returns zeros and `scheduler.step` by a
function that raises, so that only the text encoders compute anything. What arrives is exact: the
embeddings, masks, micro-conditions and nested dictionaries the pipeline itself would pass, and its
initial latents. Our own loop then replays the denoiser on these arguments, replacing only x_t and
the timestep.

Which axis of an argument counts items is never guessed from its length (77 tokens look like 77
items): a family is captured at two batch sizes, and the axis is the one that changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from diffusion_align.policy.conditioning import ArgumentPath, Branch
from diffusion_align.policy.families import Family

_PROBE_SIZES = (2, 3)
_PROBE_PROMPT = "a"
_MISSING = object()


class _FirstStepReached(Exception):
    """Raised in place of `scheduler.step`; never leaves this module."""


@dataclass(frozen=True)
class Capture:
    """One run of a pipeline up to its first scheduler step.

    Args:
        arguments: what the denoiser was called with, beside x_t and the timestep; the call of the
            positive branch, where each branch has its own.
        negative: the call of the negative branch, where it has its own.
        latents: the pipeline's initial latents [B, ...], without guidance doubling.
    """

    arguments: Mapping[ArgumentPath, object]
    latents: Tensor
    negative: Mapping[ArgumentPath, object] | None = None


@dataclass(frozen=True)
class Layout:
    """How a family lays items out in the captured arguments.

    Args:
        axes: the batch axis of every argument that has one; the others are constants.
        branches: how many guidance branches one denoiser call holds, 1 or 2.
        calls: how many calls a step makes, 1 or 2 (one per branch).
    """

    axes: Mapping[ArgumentPath, int]
    branches: int
    calls: int = 1

    def split(self, captured: Capture) -> tuple[Branch, ...]:
        """Cut a capture into its guidance branches, (negative, positive) or (positive,)."""
        if captured.negative is None:
            return self._cut(captured.arguments)
        return (*self._cut(captured.negative), *self._cut(captured.arguments))

    def _cut(self, arguments: Mapping[ArgumentPath, object]) -> tuple[Branch, ...]:
        constants = {path: value for path, value in arguments.items() if path not in self.axes}
        pieces: dict[ArgumentPath, tuple[Tensor, ...]] = {}
        for path, axis in self.axes.items():
            value = arguments.get(path)
            if not isinstance(value, Tensor):
                raise RuntimeError(f"{'.'.join(path)} was a tensor when the family was probed")
            pieces[path] = value.chunk(self.branches, dim=axis)
        return tuple(
            Branch({path: part[i] for path, part in pieces.items()}, self.axes, constants)
            for i in range(self.branches)
        )


def capture(
    pipeline: Any,
    family: Family,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None,
    *,
    guided: bool,
    height: int,
    width: int,
    frames: int | None = None,
) -> Capture:
    """Run `pipeline` on `prompts` up to its first step and keep what its denoiser received.

    Args:
        pipeline: a diffusers pipeline of `family`, bare (not sharded, not offloaded).
        prompts: B texts.
        negative_prompts: B texts, or None for the pipeline's own default (which is not always
            the empty text: SDXL zeroes the embedding; where it has none, it is).
        guided: whether the pipeline runs classifier-free guidance.
        height, width: pixels.
        frames: length of a clip; None for images.
    """
    denoiser = getattr(pipeline, family.denoiser)
    if guided and negative_prompts is None and family.needs_negative:
        negative_prompts = [""] * len(prompts)
    signature = inspect.signature(denoiser.forward)
    calls: list[dict[str, Any]] = []
    latents: list[Tensor] = []

    def record(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        call = dict(signature.bind(*args, **kwargs).arguments)
        x = call.pop(family.latent_argument)
        call.pop(family.timestep_argument)
        calls.append(call)
        return (torch.zeros_like(x),)

    step_signature = inspect.signature(pipeline.scheduler.step)

    def stop(*args: Any, **kwargs: Any) -> NoReturn:
        latents.append(step_signature.bind(*args, **kwargs).arguments["sample"])
        raise _FirstStepReached

    try:
        with (
            torch.no_grad(),
            _replaced(denoiser, "forward", record),
            _replaced(pipeline.scheduler, "step", stop),
        ):
            pipeline(
                prompt=list(prompts),
                negative_prompt=None if negative_prompts is None else list(negative_prompts),
                height=height,
                width=width,
                num_inference_steps=1,
                guidance_scale=2.0 if guided else 1.0,  # a branch never sees the number
                **({} if frames is None else {"num_frames": frames}),
                generator=torch.Generator().manual_seed(0),  # leaves the global stream alone
            )
    except _FirstStepReached:
        pass
    expected = 2 if guided and family.guidance == "two" else 1
    if len(calls) != expected or len(latents) != 1:
        raise RuntimeError(
            f"{type(pipeline).__name__} called its denoiser {len(calls)} times before the first "
            f"of {len(latents)} scheduler steps; its family row expects {expected}"
        )
    negative = dict(_flatten(calls[1])) if expected == 2 else None
    return Capture(dict(_flatten(calls[0])), latents[0], negative)


def probe(
    pipeline: Any,
    family: Family,
    *,
    guided: bool,
    height: int,
    width: int,
    frames: int | None = None,
) -> Layout:
    """Find the batch axes of `family`'s arguments by capturing at two batch sizes.

    Raises:
        RuntimeError: an argument whose items cannot be told apart that way.
    """
    two, three = (
        capture(
            pipeline,
            family,
            [_PROBE_PROMPT] * size,
            [_PROBE_PROMPT] * size if guided else None,
            guided=guided,
            height=height,
            width=width,
            frames=frames,
        )
        for size in _PROBE_SIZES
    )
    if two.latents.shape[0] != 2 or three.latents.shape[0] != 3:
        raise RuntimeError("the pipeline's latents do not have the batch on their first axis")
    axes: dict[ArgumentPath, int] = {}
    repeats: set[int] = set()
    for path, value in two.arguments.items():
        other = three.arguments.get(path)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            continue
        found = _batch_axis(path, tuple(value.shape), tuple(other.shape))
        if found is not None:
            axes[path], count = found
            repeats.add(count)
    if len(repeats) != 1 or max(repeats) > 2:
        raise RuntimeError(f"captured arguments hold {sorted(repeats)} guidance branches per call")
    return Layout(axes, repeats.pop(), 1 if two.negative is None else 2)


def _batch_axis(
    path: ArgumentPath, two: tuple[int, ...], three: tuple[int, ...]
) -> tuple[int, int] | None:
    """(axis, guidance branches) of an argument captured at batch 2 and 3; None if it has none."""
    if two == three:
        return None
    changed = [axis for axis, (a, b) in enumerate(zip(two, three)) if a != b]
    if len(two) == len(three) and len(changed) == 1:
        axis = changed[0]
        count, rest = divmod(two[axis], 2)
        if rest == 0 and three[axis] == 3 * count:
            return axis, count
    raise RuntimeError(f"cannot tell the batch axis of {'.'.join(path)}: {two} and {three}")


def _flatten(
    arguments: Mapping[str, Any], prefix: ArgumentPath = ()
) -> Iterator[tuple[ArgumentPath, object]]:
    for name, value in arguments.items():
        path = (*prefix, name)
        if isinstance(value, Mapping):
            yield from _flatten(value, path)
        else:
            yield path, value


@contextmanager
def _replaced(owner: Any, name: str, substitute: Callable[..., Any]) -> Iterator[None]:
    """Shadow a method by an instance attribute, and put back what was there."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, substitute)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
