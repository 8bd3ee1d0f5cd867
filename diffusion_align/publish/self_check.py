"""What was written, loaded again by plain diffusers, draws the pictures or clips of the policy.

A LoRA can be saved without its alpha, with a layer missing, or under keys that a loader skips in
silence: the file looks sound and the pictures are others. So pictures are drawn three times from
the same noise by a pipeline that knows nothing of this package: without the LoRA, with
`pytorch_lora_weights.safetensors`, and with `comfyui_lora.safetensors` through diffusers' own
loader of kohya-style keys. What diffusers has no LoRA loader for is loaded with this package's, and
the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align import tf32
from diffusion_align.policy.adapter import loader_notices_off
from diffusion_align.policy.catalogue import ModelInfo, resolve
from diffusion_align.policy.families import Family
from diffusion_align.policy.latents import tokens_of
from diffusion_align.policy.loading import load_pipeline
from diffusion_align.policy.scheduling import use_gaussian_steps
from diffusion_align.policy.tuned import Tuned
from diffusion_align.publish.contents import COMFYUI_FILE
from diffusion_align.publish.example import loads_lora, media, own_arguments

TOLERANCE = 1e-5
"""Of pixels in [0, 1], in float32."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of the policy and everything that decides them, for another to draw them again.

    Args:
        prompts: B texts; negatives: B texts, empty where there is none.
        noise: float32 [B, *latent_shape], standard normal.
        pixels: float32 [B, 3, H, W] in [0, 1], of clips [B, F, 3, H, W]; of the policy, drawn
            without noise between the steps.
        steps, guidance_scale, height, width, frames: of the sampling; frames is None for images.
    """

    prompts: Sequence[str]
    negatives: Sequence[str]
    noise: Tensor
    pixels: Tensor
    steps: int
    guidance_scale: float
    height: int
    width: int
    frames: int | None = None


@dataclass(frozen=True)
class SelfCheck:
    """What came of it. Differences are the largest of any pixel in [0, 1].

    Args:
        reloaded: from the policy's pictures, loaded by plain diffusers.
        comfyui: from the policy's pictures, the ComfyUI file; None where there is none.
        change: between the policy's pictures and the base model's.
        pictures, steps: how many, drawn in how many steps.
        clips: whether these pictures move.
        plain: whether diffusers alone loaded them, without this package's LoRA loader.
    """

    reloaded: float
    comfyui: float | None
    change: float
    pictures: int
    steps: int
    clips: bool = False
    plain: bool = True

    @property
    def same(self) -> bool:
        """Whether every file gave the policy's pictures (NaN is not the same)."""
        files = (self.reloaded, *(() if self.comfyui is None else (self.comfyui,)))
        return all(value <= TOLERANCE for value in files)

    @property
    def changes(self) -> bool:
        """Whether tuning changed the pictures by more than the tolerance."""
        return self.change > TOLERANCE

    @property
    def passed(self) -> bool:
        return self.same and self.changes

    def sentence(self) -> str:
        """The result for a person."""
        files = f"largest difference of a pixel {self.reloaded:.1e}"
        if self.comfyui is not None:
            files += f", of the ComfyUI file {self.comfyui:.1e}"
        kind = "clips" if self.clips else "pictures"
        word = f"the same {kind}" if self.same else f"OTHER {kind.upper()} than the policy"
        count = f"{self.pictures} {kind if self.pictures > 1 else kind[:-1]}"
        loader = "plain diffusers" if self.plain else "diffusers and this package's LoRA loader"
        changed = (
            f"the base model's differ by up to {self.change:.3f}"
            if self.changes
            else f"but they are the base model's as well (they differ by {self.change:.1e})"
        )
        return (
            f"loaded again by {loader}: {word} ({files}, bar {TOLERANCE:.0e}; "
            f"{count} in {self.steps} steps); {changed}"
        )


def self_check(
    model: str, tuned: Tuned, drawn: Drawn, *, device: torch.device, revision: str | None = None
) -> SelfCheck:
    """Load what lies at `tuned` into fresh pipelines and draw `drawn` again, in float32.

    Args:
        model: the base model: a name, a folder or a hub id.
        tuned: a LoRA's file, with `comfyui_lora.safetensors` beside it or not; or a whole model.
        drawn: by a policy in float32.
        device: where the policy drew.
        revision: of a hub id.

    Raises:
        UserError: a model that cannot be loaded.
    """
    info = resolve(model)
    pipeline, family = _fresh(info, device, revision)
    comfyui: float | None = None
    with tf32.switched_off(), torch.no_grad():
        base = _draw(pipeline, family, drawn)
        if tuned.whole:
            whole, _ = _fresh(resolve(tuned.path), device, None)
            reloaded = _distance(_draw(whole, family, drawn), drawn.pixels)
        else:
            reloaded = _distance(_with_lora(pipeline, family, tuned.path, drawn), drawn.pixels)
            beside = tuned.path.with_name(COMFYUI_FILE)
            if beside.is_file() and beside != tuned.path:
                comfyui = _distance(_with_lora(pipeline, family, beside, drawn), drawn.pixels)
    change = _distance(base, drawn.pixels)
    return SelfCheck(
        reloaded,
        comfyui,
        change,
        len(drawn.prompts),
        drawn.steps,
        clips=family.frames is not None,
        plain=tuned.whole or loads_lora(family),
    )


def draw_plainly(pipeline: Any, family: Family, drawn: Drawn) -> Tensor:
    """Pictures of a diffusers pipeline by its own call: as `Drawn.pixels`, on the CPU."""
    with tf32.switched_off(), torch.no_grad():
        return _draw(pipeline, family, drawn)


def _fresh(info: ModelInfo, device: torch.device, revision: str | None) -> tuple[Any, Family]:
    pipeline, family = load_pipeline(
        info, revision=revision, dtype=torch.float32, denoiser_dtype=torch.float32
    )
    use_gaussian_steps(pipeline, family, info.name)
    return pipeline.to(device), family


def _with_lora(pipeline: Any, family: Family, file: Path, drawn: Drawn) -> Tensor:
    with loader_notices_off():
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    try:
        return _draw(pipeline, family, drawn)
    finally:
        pipeline.unload_lora_weights()


def _draw(pipeline: Any, family: Family, drawn: Drawn) -> Tensor:
    """All at once, or item by item where only some have a negative prompt.

    No negative prompt and an empty one are not the same to SDXL, and a list cannot hold both.
    """
    if all(drawn.negatives) or not any(drawn.negatives):
        return _call(pipeline, family, drawn, slice(None))
    items = [slice(i, i + 1) for i in range(len(drawn.prompts))]
    return torch.cat([_call(pipeline, family, drawn, item) for item in items])


def _call(pipeline: Any, family: Family, drawn: Drawn, items: slice) -> Tensor:
    prompts, negatives = list(drawn.prompts[items]), list(drawn.negatives[items])
    scale = drawn.guidance_scale
    own = own_arguments(family, guidance_scale=scale, eta=0.0, frames=drawn.frames)
    # None is the pipeline's own default, where it has one.
    own["negative_prompt"] = negatives if any(negatives) or "negative_prompt" in own else None
    noise = drawn.noise[items].to(pipeline.device)
    drawn_again = pipeline(
        prompt=prompts,
        latents=tokens_of(noise) if family.packing == "2x2" else noise,
        num_inference_steps=drawn.steps,
        guidance_scale=scale,
        height=drawn.height,
        width=drawn.width,
        output_type="pt",
        **own,
    )
    pixels: Tensor = getattr(drawn_again, media(family))
    return pixels.float().cpu()


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; NaN where any pixel is NaN."""
    return float((one - other.float().cpu()).abs().max())
