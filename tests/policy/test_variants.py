"""Which models and schedulers of the transformer families are taken, and with which settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusion_align import Policy, UserError


def test_cogvideox_steps_have_the_std_of_its_own_noise_levels(
    frozen_transformers: dict[str, Policy],
) -> None:
    policy = frozen_transformers["cogvideox"]
    alphas = policy.pipeline.scheduler.alphas_cumprod.double()
    schedule = policy.schedule(4)
    assert schedule.timesteps.tolist() == [999.0, 749.0, 499.0, 249.0]
    now = alphas[schedule.timesteps.long()]
    then = torch.cat([alphas[schedule.timesteps.long()[:-1] - 250], torch.ones(1).double()])
    expected = ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    torch.testing.assert_close(schedule.std(eta=1.0).double(), expected, atol=1e-6, rtol=0)
    assert bool((schedule.std(eta=1.0)[:-1] > 0).all()) and not schedule.std(eta=0.0).any()


def test_schedulers_without_a_gaussian_step_are_replaced_with_their_shift(
    transformers_of: dict[str, Path], tmp_path: Path
) -> None:
    wan: Any = DiffusionPipeline.from_pretrained(transformers_of["wan"])
    wan.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    wan.save_pretrained(tmp_path / "wan")
    policy = Policy.load(tmp_path / "wan")
    assert policy.replaced_scheduler is not None and "UniPC" in policy.replaced_scheduler
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(5)
    schedule = policy.schedule(5)
    torch.testing.assert_close(schedule.levels, euler.sigmas, atol=1e-6, rtol=0)

    clip: Any = DiffusionPipeline.from_pretrained(transformers_of["cogvideox"])
    levels = clip.scheduler.alphas_cumprod
    clip.scheduler = CogVideoXDPMScheduler.from_config(clip.scheduler.config)
    clip.save_pretrained(tmp_path / "clip")
    policy = Policy.load(tmp_path / "clip")
    assert policy.replaced_scheduler is not None and "CogVideoXDPM" in policy.replaced_scheduler
    assert torch.equal(policy.pipeline.scheduler.alphas_cumprod, levels)

    for name in ("wan", "clip"):
        pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / name)
        pipeline.scheduler = EulerDiscreteScheduler()
        pipeline.save_pretrained(tmp_path / f"{name}-other")
        with pytest.raises(UserError, match="scheduler EulerDiscreteScheduler"):
            Policy.load(tmp_path / f"{name}-other")


@pytest.mark.parametrize(
    ("name", "file", "setting", "value"),
    [
        ("wan", "model_index.json", "boundary_ratio", 0.875),
        ("wan", "model_index.json", "expand_timesteps", True),
        ("cogvideox", "transformer/config.json", "patch_size_t", 2),
        ("easyanimate", "transformer/config.json", "text_embed_dim_t5", 32),
    ],
)
def test_another_model_of_the_same_classes_is_refused(
    transformers_of: dict[str, Path],
    tmp_path: Path,
    name: str,
    file: str,
    setting: str,
    value: object,
) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(transformers_of[name])
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / file
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, setting: value}), encoding="utf-8")
    with pytest.raises(UserError, match=setting):
        Policy.load(tmp_path, weights=False)


def test_a_length_that_does_not_fit_names_the_nearest(
    frozen_transformers: dict[str, Policy],
) -> None:
    video, image = frozen_transformers["wan"], frozen_transformers["sd3"]
    with pytest.raises(UserError, match=r"10 is not one more than a multiple of 4[^$]*9"):
        video.encode(["a"], guidance_scale=1.0, height=32, width=32, frames=10)
    with pytest.raises(UserError, match=r"multiple of 8[^$]*17"):
        frozen_transformers["cogvideox"].encode(["a"], frames=14)
    with pytest.raises(UserError, match="images"):
        image.encode(["a"], frames=9)
    assert (video.info.modality, video.info.frames) == ("video", 81)
    assert (image.info.modality, image.info.frames) == ("image", None)
    assert frozen_transformers["cogvideox"].info.frames == 9
    shape = video.latent_shape(32, 32, 13)
    assert shape == (16, 4, 4, 4) and video.latent_frames(shape) == 4
    assert frozen_transformers["cogvideox"].latent_frames((3, 4, 4, 4)) == 3
    assert image.latent_frames(image.latent_shape(32, 32)) == 1


def test_of_several_text_encoders_the_one_that_reads_furthest_cuts_a_prompt(
    transformers_of: dict[str, Path], recwarn: pytest.WarningsRecorder
) -> None:
    policy = Policy.load(transformers_of["sd3"])
    for prompt in ("blue " * 30, "red " * 90):
        policy.encode([prompt], guidance_scale=1.0, height=32, width=32)
    said = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert len(said) == 1 and "'red red" in said[0] and "reads 256" in said[0]


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "cogvideox", "easyanimate"])
def test_an_outline_has_the_sizes_of_the_model(
    transformers_of: dict[str, Path], frozen_transformers: dict[str, Policy], name: str
) -> None:
    outline, real = Policy.load(transformers_of[name], weights=False), frozen_transformers[name]
    assert outline.info == real.info
    parameters = [sum(p.numel() for p in q.denoiser.parameters()) for q in (outline, real)]
    assert parameters[0] == parameters[1]
