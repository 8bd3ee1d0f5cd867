"""Names, folders, checksums, dtypes and schedulers."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusion_align import Policy, UserError
from diffusion_align.policy.catalogue import MODELS, resolve
from diffusion_align.sampling import resolve_sampling
from diffusion_align.sampling.options import SamplingOptions


def test_options_and_catalogue_import_no_torch() -> None:
    code = (
        "import sys, diffusion_align.policy.options, diffusion_align.policy.catalogue, "
        "diffusion_align.sampling.options, diffusion_align.policy as p; p.resolve('tiny-sd'); "
        "print([m for m in ('torch', 'diffusers', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_model_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"unknown model 'tiny_sd'[^$]*did you mean tiny-sd\?"):
        resolve("tiny_sd")
    with pytest.raises(UserError, match="no such folder"):
        resolve("./nowhere/at/all")
    hub = resolve("owner/some-model.v2")
    assert hub.source == "owner/some-model.v2" and hub.height is None
    assert {"tiny-sd", "sd15", "sd21", "sdxl"} <= set(MODELS)


def test_a_folder_that_is_no_pipeline_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        Policy.load(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"model_index\.json: damaged"):
        Policy.load(tmp_path)
    index.write_text(json.dumps({"_class_name": "AudioLDMPipeline"}), encoding="utf-8")
    with pytest.raises(UserError, match="AudioLDMPipeline are not supported"):
        Policy.load(tmp_path)


def test_a_truncated_weight_file_names_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["eps"], folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not be loaded"):
        Policy.load(folder)


def test_checksums_beside_the_weights_name_the_altered_file(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["eps"], folder)
    sums = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    (folder / "SHA256SUMS.json").write_text(json.dumps(sums), encoding="utf-8")
    Policy.load(folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"vae.diffusion_pytorch_model\.safetensors: .*damaged"):
        Policy.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"vae.diffusion_pytorch_model\.safetensors: .*missing"):
        Policy.load(folder)


def test_weights_stored_in_half_are_cast_to_the_dtype_asked_for(tiny: Any, tmp_path: Path) -> None:
    tiny.stable_diffusion(tiny.ddim()).to(torch.float16).save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            kinds = {p.dtype for p in component.parameters()}
            assert kinds == {torch.float32} and not component.training
    doubled = Policy.load(tmp_path, dtype="float64", lora_rank=2)
    assert {p.dtype for p in doubled.trainable_parameters()} == {torch.float64}
    cond = doubled.encode(["a"], guidance_scale=2.0)
    x = torch.zeros(1, *cond.latent_shape, dtype=torch.float64)
    assert doubled.predict(x, torch.tensor(9), cond, guidance_scale=2.0).dtype == torch.float64
    with pytest.raises(UserError, match="did you mean float16"):
        Policy.load(tmp_path, dtype="flaot16")
    with pytest.raises(UserError, match="unknown device"):
        Policy.load(tmp_path, device="gpu")


def test_defaults_come_from_the_model_and_are_overridden_by_the_user(
    frozen: dict[str, Policy],
) -> None:
    info = frozen["xl"].info
    assert (info.family, info.height, info.width) == ("stable-diffusion-xl", 32, 32)
    resolved = resolve_sampling(SamplingOptions(steps=3), info)
    assert (resolved.steps, resolved.guidance_scale, resolved.height) == (3, 5.0, 32)


BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def test_what_a_sparse_scheduler_file_leaves_out_is_filled_up_for_latents(
    tiny: Any, tmp_path: Path
) -> None:
    """diffusers notes which values were defaults, and would put DDIM's own in their place."""
    tiny.stable_diffusion(PNDMScheduler(**BETAS, skip_prk_steps=True)).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    kept = ("_class_name", "_diffusers_version", *BETAS, "skip_prk_steps")
    said = json.loads(path.read_text())
    path.write_text(json.dumps({name: said[name] for name in kept}))
    config = Policy.load(tmp_path).pipeline.scheduler.config
    found = (config["clip_sample"], config["set_alpha_to_one"], config["steps_offset"])
    assert found == (False, False, 1)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        UniPCMultistepScheduler(**BETAS, prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(**BETAS, algorithm_type="dpmsolver++"),
        LMSDiscreteScheduler(**BETAS),
        EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_without_likelihood_is_replaced_by_ddim_and_the_user_told(
    tiny: Any, tmp_path: Path, scheduler: Any
) -> None:
    tiny.stable_diffusion(scheduler).save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    assert policy.replaced_scheduler is not None
    assert type(scheduler).__name__ in policy.replaced_scheduler
    new = policy.pipeline.scheduler
    assert type(new).__name__ == "DDIMScheduler"
    torch.testing.assert_close(new.alphas_cumprod, scheduler.alphas_cumprod)
    assert new.config.prediction_type == scheduler.config.prediction_type
    assert new.config.clip_sample is False and new.config.steps_offset == 1
    schedule = policy.schedule(4)
    assert schedule.clip_sample_range is None
    assert schedule.prediction == (
        "v" if scheduler.config.prediction_type == "v_prediction" else "eps"
    )
    new.set_timesteps(4)
    torch.testing.assert_close(schedule.timesteps, new.timesteps.float(), atol=0, rtol=0)


def test_ddim_is_kept_and_a_flow_scheduler_refused(
    frozen: dict[str, Policy], tiny: Any, tmp_path: Path
) -> None:
    assert frozen["eps"].replaced_scheduler is None
    tiny.stable_diffusion(FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler"):
        Policy.load(tmp_path)


def test_a_guidance_distilled_model_is_refused_when_guidance_is_asked_for(
    folders: dict[str, Path],
) -> None:
    policy = Policy.load(folders["eps"])
    # LCM-like: the pipeline then runs one branch and hands the scale to the denoiser.
    policy.pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(UserError, match="guidance as an input"):
        policy.encode(["a"], guidance_scale=5.0)
