"""What only EasyAnimate asks for: a negative prompt always, a schedule, layers for a LoRA."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMagvit
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from diffusion_align import Policy, UserError
from diffusion_align.policy.catalogue import MODELS
from diffusion_align.policy.causal import CAUSAL
from diffusion_align.policy.clips import clips_gradient, decode_clips
from diffusion_align.sampling import normal, stream

PROMPTS = ["a", "a red circle on white"]
SIZE: dict[str, Any] = {"height": 32, "width": 32}
FRAMES = 9


def streams() -> list[Any]:
    return [stream(3, "rollout", iteration=0, position=i, sample=0) for i in range(2)]


def test_without_a_negative_prompt_the_empty_text_is_it(
    frozen_transformers: dict[str, Policy],
) -> None:
    """The pipeline itself raises a TypeError where guidance has no negative prompt."""
    policy = frozen_transformers["easyanimate"]
    path = ("encoder_hidden_states",)
    ours = policy.encode(PROMPTS, guidance_scale=5.0, frames=FRAMES, **SIZE)
    with torch.no_grad():
        _, empty, _, _ = policy.pipeline.encode_prompt(PROMPTS, negative_prompt=["", ""])
    torch.testing.assert_close(ours.branches[0].tensors[path], empty, atol=1e-6, rtol=0)
    assert not torch.allclose(ours.branches[1].tensors[path], empty, atol=1e-2)
    with pytest.raises(TypeError):
        policy.pipeline(PROMPTS, guidance_scale=5.0, num_inference_steps=1, **SIZE)


@pytest.mark.parametrize("side", [256, 1024])
def test_dynamic_shifting_does_not_follow_the_size(
    frozen_transformers: dict[str, Policy], side: int
) -> None:
    """mu = 1 always: sigma / (sigma + (1 - sigma) / e)."""
    levels = frozen_transformers["easyanimate-dynamic"].schedule(4, height=side, width=side).levels
    even = torch.linspace(1, 1e-3, 4, dtype=torch.float64)
    shifted = even * torch.e / (1 + (torch.e - 1) * even)
    torch.testing.assert_close(levels[:-1].double(), shifted, atol=1e-3, rtol=0)


def test_a_lora_on_its_layers_learns_as_the_pipelines_own_graph_says(
    transformers_of: dict[str, Path],
) -> None:
    """The oracle is the pipeline's call without its `no_grad`; no layer is out of reach."""
    policy = Policy.load(transformers_of["easyanimate"])
    denoiser: Any = policy.bare_denoiser
    config = LoraConfig(r=2, target_modules=list(policy.family.lora_targets))
    inject_adapter_in_model(config, denoiser)
    named = {key: p for key, p in denoiser.named_parameters() if ".lora_" in key}
    trained, generator = list(named.values()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.2, generator=generator)
    cond = policy.encode(PROMPTS, guidance_scale=3.0, frames=FRAMES, **SIZE)
    noise = normal(streams(), cond.latent_shape)
    schedule, x = policy.schedule(2, **SIZE), noise
    for i in range(2):
        prediction = policy.predict(x, schedule.timesteps[i], cond, 3.0)
        x = schedule.step(prediction, x, i, eta=0.0, flow_kind="ode").mean
    ours = torch.autograd.grad(policy.decode(x, checkpoint=True).square().mean(), trained)
    drawn = inspect.unwrap(type(policy.pipeline).__call__)(
        policy.pipeline,
        prompt=PROMPTS,
        negative_prompt=["", ""],
        num_frames=FRAMES,
        num_inference_steps=2,
        guidance_scale=3.0,
        latents=noise,
        output_type="pt",
        **SIZE,
    )
    theirs = torch.autograd.grad(drawn[0].square().mean(), trained)
    assert distance(ours, theirs) < 1e-4
    silent = {key for key, g in zip(named, ours, strict=True) if not bool(g.any())}
    # What the last block asks on behalf of the text is answered and thrown away.
    assert silent == {key for key in named if "blocks.1.attn1.add_q_proj" in key}


def test_what_it_lacks_for_a_lora_is_added_and_nothing_is_renamed(
    transformers_of: dict[str, Path], tmp_path: Path
) -> None:
    for weights in (True, False):
        policy = Policy.load(transformers_of["easyanimate"], lora_rank=2, weights=weights)
        assert policy.trainable_parameters()
        for part in (policy.pipeline, policy.bare_denoiser):
            own = next(kind for kind in type(part).__mro__[1:] if kind.__name__[:4] == "Easy")
            assert (type(part).__name__, type(part).__module__) == (own.__name__, own.__module__)
    full = Policy.load(transformers_of["easyanimate"], full=True)
    full.save(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "EasyAnimatePipeline"
    assert index["transformer"] == ["diffusers", "EasyAnimateTransformer3DModel"]
    assert Policy.load(tmp_path).family.name == "easyanimate5.1"


def distance(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    size = torch.stack([gradient.norm() for gradient in theirs]).norm()
    assert float(size) > 0
    return float(torch.stack([(a - b).norm() for a, b in zip(ours, theirs)]).norm() / size)


def test_nothing_of_a_clip_stays_in_the_decoder(
    frozen_transformers: dict[str, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its convolutions keep frames in themselves: a second clip would begin where one ended."""
    policy = frozen_transformers["easyanimate"]
    decoder = policy.pipeline.vae.decoder
    cells = [cell for cell in decoder.modules() if hasattr(cell, "prev_features")]
    x = normal(streams(), policy.latent_shape(32, 32, FRAMES))

    def stopped(_: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with torch.no_grad():
        first = policy.decode(x)
        assert cells and all(cell.prev_features is None for cell in cells)
        assert torch.equal(policy.decode(x), first)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
            patch.setattr(decoder.conv_act, "forward", stopped)
            policy.decode(x)
        assert all(cell.prev_features is None for cell in cells)


def test_decoders_whose_norms_average_over_frames_too() -> None:
    """The other setting of the class, whose upsampler mixes the frames of a chunk as well."""
    torch.manual_seed(0)
    widths = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    vae: Any = AutoencoderKLMagvit(latent_channels=2, spatial_group_norm=False, **widths)
    vae.double().eval().requires_grad_(False)
    rule = CAUSAL["magvit"]
    x = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    pixels = vae.decode(x / vae.config.scaling_factor).sample.transpose(1, 2) * 0.5 + 0.5
    expected = pixels.clamp(0, 1)
    found = decode_clips(rule, vae, x, ratio=4, frames=None, checkpoint=False)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    ours = clips_gradient(rule, vae, x.detach(), weights, ratio=4, frames=None)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-8


def test_lengths_are_one_more_than_a_multiple_of_four(
    frozen_transformers: dict[str, Policy],
) -> None:
    policy = frozen_transformers["easyanimate"]
    assert policy.latent_frames(policy.latent_shape(32, 32, 49)) == 13
    with pytest.raises(UserError, match=r"multiple of 4[^$]*9"):
        policy.encode(["a"], frames=10)


def test_the_catalogues_model_is_of_this_family() -> None:
    info = MODELS["easyanimate-v5.1"]
    assert (info.family, info.modality, info.frames) == ("easyanimate5.1", "video", 49)
