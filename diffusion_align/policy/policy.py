"""`Policy`: one object that wraps any supported diffusers pipeline for sampling and training.

It encodes prompts, predicts with guidance inside, decodes, lists what is trained, switches to the
reference and saves. The rooms above it (sampling, algorithms, evaluation) know no pipeline.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion_align.diffusion.schedules import Schedule
from diffusion_align.errors import UserError
from diffusion_align.policy import choices, decoding, guidance
from diffusion_align.policy.adapter import Adapter, add_lora, load_lora
from diffusion_align.policy.catalogue import ModelInfo, resolve
from diffusion_align.policy.conditioning import Conditioning
from diffusion_align.policy.devices import device_of
from diffusion_align.policy.encoder import PromptEncoder
from diffusion_align.policy.families import Family
from diffusion_align.policy.latents import latent_of, tokens_of
from diffusion_align.policy.loading import dtype_of, library_bars, load_pipeline, with_size
from diffusion_align.policy.options import GuidanceGradient, LoRAInit
from diffusion_align.policy.outline import outline_pipeline
from diffusion_align.policy.scheduling import schedule_of, use_gaussian_steps


class Policy:
    """A diffusion model as the thing that is aligned. Made by `Policy.load`.

    All modules stay in eval mode; never call `.train()` on them (LoRA dropout needs no mode, see
    `TrainingDropout`).

    Attributes:
        pipeline: the diffusers pipeline, bare.
        family: its row of data.
        info: the model and its default sampling, size filled in.
        denoiser: the slot. Training puts the prepared (DDP, FSDP2, compiled) module here;
            `predict` calls nothing else.
        reference_copy: the second slot: what `reference()` puts into the first in full
            fine-tuning, else None. Training prepares it alike, so that both round alike.
        device: where tensors go.
        replaced_scheduler: what to tell the user about a replaced scheduler, or None.
        resting: accelerate's hooks of text encoders that leave the device between prompts.
    """

    def __init__(
        self,
        pipeline: Any,
        family: Family,
        info: ModelInfo,
        *,
        device: torch.device,
        dtype: torch.dtype,
        adapter: Adapter | None = None,
        reference_copy: nn.Module | None = None,
        replaced_scheduler: str | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.family = family
        self.info = info
        self.device = device
        self.denoiser: nn.Module = getattr(pipeline, family.denoiser)
        self.replaced_scheduler = replaced_scheduler
        self._dtype = dtype
        self._adapter = adapter
        self.reference_copy = reference_copy
        self._encoder = PromptEncoder(pipeline, family, dtype=dtype)
        self.resting: list[Any] = []

    @classmethod
    def load(
        cls,
        id_or_path: str | Path,
        *,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        lora_targets: Sequence[str] | None = None,
        lora_init: LoRAInit = "kaiming",
        lora_path: str | Path | None = None,
        full: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
        seed: int = 0,
        weights: bool = True,
    ) -> Policy:
        """Load a model: frozen, with a new LoRA, continuing a LoRA, or trained in full.

        Args:
            id_or_path: catalogue name, folder, or hub id.
            lora_rank: train a new LoRA of this rank.
            lora_alpha: its scale is alpha / rank; None means alpha = rank.
            lora_dropout: in [0, 1); acts in training forwards only.
            lora_targets: layers to adapt; None means the family's own.
            lora_init: how a new LoRA's first matrices are drawn, see `LoRAOptions`.
            lora_path: train on from this LoRA; rank, alpha, targets and init are the file's,
                and the reference is a frozen snapshot of it.
            full: train every weight of the denoiser, in float32; the reference is a copy.
            device: "cpu", "cuda", "cuda:1" or "auto".
            dtype: of frozen weights: "float32", "bfloat16", "float16" or "float64".
            revision: of a hub id.
            seed: draws a new LoRA's first matrices.
            weights: False reads only the model's configs, and every tensor is on torch's `meta`
                device, whatever `device` says: to count what it needs.

        Raises:
            UserError: anything a person can put right.
        """
        choices.check_trained(
            full=full,
            rank=lora_rank,
            path=lora_path,
            alpha=lora_alpha,
            targets=lora_targets,
            init=lora_init,
        )
        place, storage = device_of(device if weights else "meta"), dtype_of(dtype)
        trained = torch.promote_types(storage, torch.float32)
        computing = trained if full else storage
        info = resolve(id_or_path)
        load = load_pipeline if weights else outline_pipeline
        pipeline, family = load(info, revision=revision, dtype=storage, denoiser_dtype=computing)
        told = use_gaussian_steps(pipeline, family, info.name)
        denoiser = getattr(pipeline, family.denoiser)
        adapter: Adapter | None = None
        reference_copy: nn.Module | None = None
        if lora_path is not None:
            adapter = load_lora(
                pipeline,
                family,
                Path(lora_path).expanduser(),
                rank=lora_rank,
                dropout=lora_dropout,
                dtype=trained,
            )
        elif lora_rank is not None:
            adapter = add_lora(
                denoiser,
                family,
                rank=lora_rank,
                alpha=lora_alpha,
                dropout=lora_dropout,
                targets=lora_targets,
                init=lora_init,
                seed=seed,
                dtype=trained,
            )
        elif full:
            reference_copy = copy.deepcopy(denoiser).to(place)
            denoiser.requires_grad_(True)
        pipeline.to(place)
        return cls(
            pipeline,
            family,
            with_size(info, pipeline, family),
            device=place,
            dtype=computing,
            adapter=adapter,
            reference_copy=reference_copy,
            replaced_scheduler=told,
        )

    def encode(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> Conditioning:
        """What the denoiser needs for B prompts; each prompt is captured once and cached.

        Args:
            prompts: B texts.
            negative_prompts: B texts; an empty one is the pipeline's own default.
            guidance_scale: above 1 captures the negative branch too, where there is one; None is
                the model's own.
            height, width, frames: pixels, and the length of a clip; None means the model's own.

        Raises:
            UserError: a size or length that does not fit the model, or negative prompts for none.
        """
        height, width = choices.picture_size(self.family, self.info, height, width)
        scale = self.info.guidance_scale if guidance_scale is None else guidance_scale
        choices.check_negatives(self.family, negative_prompts, self.info.name)
        conditioning = self._encoder.encode(
            prompts,
            negative_prompts,
            guided=scale > 1.0 and self.family.guidance != "embedded",
            height=height,
            width=width,
            frames=choices.clip_length(self.family, self.info, frames),
        )
        for hook in self.resting:
            hook.offload()
        return conditioning.to(self.device)

    def schedule(
        self, steps: int, *, height: int | None = None, width: int | None = None
    ) -> Schedule:
        """The reverse process in `steps` steps, from the pipeline's scheduler config.

        Args:
            steps: denoising steps.
            height, width: pixels, which move some flow models' noise levels; None is the model's.

        Raises:
            UserError: steps or a size the model does not have, a scheduler without Gaussian steps.
        """
        height, width = choices.picture_size(self.family, self.info, height, width)
        try:
            return schedule_of(self.pipeline, self.family, steps, height, width)
        except ValueError as error:  # too many steps, or a scheduler option without a Gaussian step
            raise UserError(str(error), where=f"schedule of {self.info.name}") from error

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """Shape of one item's latent, e.g. (4, 64, 64) for 512 x 512; None is the model's own."""
        height, width = choices.picture_size(self.family, self.info, height, width)
        length = choices.clip_length(self.family, self.info, frames)
        probe = self._encoder.encode(
            [""], None, guided=False, height=height, width=width, frames=length
        )
        return probe.latent_shape

    def latent_frames(self, latent_shape: Sequence[int]) -> int:
        """How many latent frames one item's latent of this shape has; 1 for images."""
        video = self.family.frames
        return 1 if video is None else int(latent_shape[video.axis - 1])

    def initial_noise(self, noise: Tensor) -> Tensor:
        """x_T from standard normal `noise` [B, *latent_shape]."""
        return noise * float(getattr(self.pipeline.scheduler, "init_noise_sigma", 1.0))

    def predict(
        self,
        x_t: Tensor,
        timestep: Tensor,
        cond: Conditioning,
        guidance_scale: float,
        *,
        guidance_gradient: GuidanceGradient = "both",
    ) -> Tensor:
        """The denoiser's output with guidance inside; gradients flow to x_t and the parameters.

        Args:
            x_t: float [B, *latent_shape].
            timestep: as the schedule states it, 0-d or [B].
            cond: B items, on x_t's device.
            guidance_scale: at most 1 runs the conditional branch only; where guidance is embedded,
                what the denoiser is told.
            guidance_gradient: "conditional" runs the negative branch without a graph, in a call
                of its own; the value is the same but for rounding.

        Returns:
            [B, *latent_shape], float32 (or x_t's dtype where that is wider); eps, v or flow as
            `schedule().prediction` says.
        """
        if x_t.shape[0] != len(cond):
            raise ValueError(f"{x_t.shape[0]} latents but conditioning of {len(cond)} items")
        # Always [B]: the call has the same shape in rollouts and in training.
        moments = (timestep * self.family.timestep_factor).to(x_t.device).expand(len(cond))
        x = x_t.to(self._dtype)
        output = guidance.guided_prediction(
            self.family, self._forward, x, moments, cond, guidance_scale, guidance_gradient
        )
        return output.to(torch.promote_types(x_t.dtype, torch.float32))

    def decode(
        self,
        x_0: Tensor,
        *,
        chunk: int | None = None,
        checkpoint: bool = False,
        frames: Sequence[int] | None = None,
    ) -> Tensor:
        """Pixels of clean latents; differentiable where gradients are enabled.

        Args:
            x_0: float [B, *latent_shape].
            chunk: items decoded at a time; None is all of them.
            checkpoint: recompute the decoder in the backward pass to save memory.
            frames: latent frames whose pixels are wanted, ascending; None is all. A causal VAE
                decodes those before the last of them too.

        Returns:
            float32 [B, 3, H, W] in [0, 1]; of clips [B, F, 3, H, W].

        Raises:
            UserError, ValueError: a clip in tiles; latent frames that are not there.
        """
        return decoding.decode(
            self.pipeline.vae, self.family, x_0, chunk=chunk, checkpoint=checkpoint, frames=frames
        )

    def decode_gradient(
        self,
        x_0: Tensor,
        pixel_gradient: Tensor,
        *,
        chunk: int | None = None,
        frames: Sequence[int] | None = None,
    ) -> Tensor:
        """dL/dx_0 of a loss on `decode(x_0, frames=frames)`, one chunk's graph at a time.

        Args:
            x_0: float [B, *latent_shape].
            pixel_gradient: dL/dpixels, shaped as `decode` returns pixels.
            chunk: items at a time; None is one. Clips go by latent frames too, last to first.
            frames: as in `decode`.

        Returns:
            [B, *latent_shape] in x_0's dtype, equal to autograd through `decode`; errors likewise.
        """
        return decoding.decode_gradient(
            self.pipeline.vae, self.family, x_0, pixel_gradient, chunk=chunk, frames=frames
        )

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Latents [B, *latent_shape] of pixels as `decode` gives them: the posterior's mean."""
        return decoding.encode(self.pipeline.vae, self.family, pixels)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters being trained, in a fixed order; empty for a frozen policy."""
        return [p for p in self.bare_denoiser.parameters() if p.requires_grad]

    @property
    def bare_denoiser(self) -> nn.Module:
        """The pipeline's own module, whatever stands in the slot."""
        bare: nn.Module = getattr(self.pipeline, self.family.denoiser)
        return bare

    @contextmanager
    def reference(self, kind: Literal["start", "base"] = "start") -> Iterator[None]:
        """Inside this context the policy is its reference.

        Args:
            kind: "start" is the policy as training began: the base model, the snapshot of the
                LoRA it was loaded with, or the copy kept for full fine-tuning. "base" is the
                model without any LoRA. A frozen policy is its own reference.
        """
        if self.reference_copy is not None:
            trained, self.denoiser = self.denoiser, self.reference_copy
            try:
                yield
            finally:
                self.denoiser = trained
        elif self._adapter is None:
            yield
        elif kind == "start" and self._adapter.reference_is_snapshot:
            with self._adapter.snapshot():
                yield
        else:
            with self._adapter.switched_off():
                yield

    @contextmanager
    def adapter_scale(self, value: float) -> Iterator[None]:
        """Inside this context the LoRA acts with `value` times its own strength; 0 is the base.

        Raises:
            UserError: there is no LoRA: the policy is frozen, or every weight was trained.
        """
        if self._adapter is None:
            raise UserError(
                "only a LoRA can be scaled, and this model has none",
                where="adapter scale",
                fix="every weight of it was trained: its strength is fixed"
                if self.reference_copy is not None
                else "load it with one",
            )
        with self._adapter.scaled(value):
            yield

    def save(self, folder: str | Path) -> None:
        """Write what was trained: a LoRA for diffusers with its metadata, or the whole pipeline.

        Raises:
            UserError: a frozen policy, which has nothing of its own.
        """
        target = Path(folder)
        if self._adapter is not None:
            self._adapter.save(self.pipeline, self.family, target)
        elif self.reference_copy is not None:
            with library_bars(shown=False):
                self.pipeline.save_pretrained(target, safe_serialization=True)
        else:
            raise UserError("a frozen policy has nothing to save", where=str(target))

    def _forward(self, x: Tensor, timestep: Tensor, arguments: dict[str, Any]) -> Tensor:
        packed = self.family.packing == "2x2"
        state = tokens_of(x) if packed else x
        own = {self.family.latent_argument: state, self.family.timestep_argument: timestep}
        denoiser: Callable[..., Any] = self.denoiser
        output = denoiser(**own, **arguments)
        predicted: Tensor = output[0] if isinstance(output, tuple) else output.sample
        return latent_of(predicted, *x.shape[-2:]) if packed else predicted
