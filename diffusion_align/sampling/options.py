"""How pictures are sampled. Plain values, no torch: the CLI imports this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from diffusion_align.errors import UserError
from diffusion_align.ranges import at_least, require, words

if TYPE_CHECKING:
    from diffusion_align.policy.catalogue import ModelInfo

FlowKind = Literal["ode", "sde", "dance", "cps"]


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of a rollout; None stands for the model's own value.

    Args:
        steps: denoising steps, at least 1.
        guidance_scale: classifier-free guidance; 1 or less runs the conditional branch only.
        eta: DDIM noise in [0, 1]; 0 is deterministic, 1 the DDPM variance.
        height: pixels, a multiple of the family's step (8 for Stable Diffusion).
        width: as height.
        batch_size: items per denoiser call; it changes speed and memory, not the pictures.
        flow_kind: reverse process of flow models: "ode", "sde", "dance" or "cps".
        noise_level: strength of the noise that flow_kind injects.
        frames: length of a clip; None for images.

    Errors: a value out of range raises `OptionError`.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    eta: float = 1.0
    height: int | None = None
    width: int | None = None
    batch_size: int = 32
    flow_kind: FlowKind = "sde"
    noise_level: float = 0.7
    frames: int | None = None

    def __post_init__(self) -> None:
        words(self)
        at_least(self, 1, "steps", "height", "width", "batch_size", "frames")
        at_least(self, 0, "guidance_scale", "noise_level")
        require(self, "lie in [0, 1]", lambda eta: 0 <= eta <= 1, "eta")


@dataclass(frozen=True, kw_only=True)
class ResolvedSampling(SamplingOptions):
    """`SamplingOptions` in which nothing is None any more; made by `resolve_sampling`."""

    steps: int = field()
    guidance_scale: float = field()
    height: int = field()
    width: int = field()


def resolve_sampling(options: SamplingOptions, info: ModelInfo) -> ResolvedSampling:
    """Fill every None of `options` with the model's own value.

    Args:
        options: what the user said.
        info: the loaded policy's `info`.

    Raises:
        UserError: a size that neither of them says.
    """
    height = info.height if options.height is None else options.height
    width = info.width if options.width is None else options.width
    if height is None or width is None:
        raise UserError(
            f"the size of {info.name} is known only once it is loaded",
            where="sampling.height, sampling.width",
            fix="give both, or resolve with the loaded policy's info",
        )
    return ResolvedSampling(
        steps=info.steps if options.steps is None else options.steps,
        guidance_scale=(
            info.guidance_scale if options.guidance_scale is None else options.guidance_scale
        ),
        eta=options.eta,
        height=height,
        width=width,
        batch_size=options.batch_size,
        flow_kind=options.flow_kind,
        noise_level=options.noise_level,
        frames=info.frames if options.frames is None else options.frames,
    )
