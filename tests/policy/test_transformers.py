"""The transformer families against their own pipelines: replay, adapters, prompts."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from diffusion_align import Policy, UserError
from diffusion_align.evaluation.generate import generate
from diffusion_align.policy.conditioning import Conditioning
from diffusion_align.sampling import SamplingOptions, normal, stream
from diffusion_align.sampling.rollout import rollout

FAMILIES = ["sd3", "flux", "wan", "cogvideox", "easyanimate"]
VARIANTS = ["sd3-dynamic", "flux-schnell", "cogvideox-rotary", "easyanimate-dynamic"]
NAMES = [*FAMILIES, *VARIANTS]
PROMPTS = ["a", "a large red circle above a small blue square on white"]
NEGATIVES = ["blurry, grey", "ugly"]
STEPS = 4
FRAMES = 9


def frames_of(policy: Policy) -> int | None:
    return FRAMES if policy.info.modality == "video" else None


def encoded(policy: Policy, scale: float, **options: Any) -> Conditioning:
    settings = {"height": 32, "width": 32, "frames": frames_of(policy), **options}
    return policy.encode(PROMPTS, guidance_scale=scale, **settings)


def streams(count: int = 2) -> list[Any]:
    return [stream(7, "rollout", iteration=0, position=i, sample=0) for i in range(count)]


def pipelines_own(policy: Policy, noise: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """Trajectory and pixels by the pipeline's own call, of which only the first latent is ours."""
    pipeline, size = policy.pipeline, (call["height"], call["width"])
    packed = isinstance(pipeline, FluxPipeline)
    states = [noise]

    def keep(_: Any, __: int, ___: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        state = values["latents"]
        factor = getattr(pipeline, "vae_scale_factor", 0)
        states.append(pipeline._unpack_latents(state, *size, factor) if packed else state.clone())
        return values

    latents = pipeline._pack_latents(noise, *noise.shape) if packed else noise.clone()
    if policy.info.modality == "video":
        call["num_frames"] = FRAMES
    result = pipeline(
        latents=latents,
        num_inference_steps=STEPS,
        output_type="pt",
        callback_on_step_end=keep,
        **call,
    )
    return torch.stack(states, 1), result[0]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48)])
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_rollout_and_decode_equal_the_pipelines_own(
    frozen_transformers: dict[str, Policy], name: str, scale: float, height: int, width: int
) -> None:
    policy = frozen_transformers[name]
    if name == "cogvideox" and width == 48:
        pytest.skip("its learnt positions are of one size")
    negatives = None if "flux" in name else NEGATIVES
    cond = encoded(policy, scale, height=height, width=width, negative_prompts=negatives)
    ours = rollout(
        policy,
        cond,
        policy.schedule(STEPS, height=height, width=width),
        streams(),
        guidance_scale=scale,
        eta=0.0,
        flow_kind="ode",
    )
    theirs, pixels = pipelines_own(
        policy,
        normal(streams(), cond.latent_shape),
        prompt=PROMPTS,
        **({} if negatives is None else {"negative_prompt": negatives}),
        guidance_scale=scale,
        height=height,
        width=width,
    )
    spread = float(theirs.square().mean().sqrt().clamp(min=1.0))
    torch.testing.assert_close(ours.latents, theirs, atol=1e-5 * spread, rtol=0)
    torch.testing.assert_close(policy.decode(ours.x_0), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_stochastic_rollouts_have_likelihoods_and_do_not_depend_on_the_batch_size(
    frozen_transformers: dict[str, Policy], name: str
) -> None:
    policy = frozen_transformers[name]
    cond = encoded(policy, 3.0)
    together, alone = (
        rollout(
            policy,
            cond,
            policy.schedule(STEPS, height=32, width=32),
            streams(),
            guidance_scale=3.0,
            eta=1.0,
            flow_kind="sde",
            batch_size=size,
        )
        for size in (2, 1)
    )
    spread = float(together.latents.square().mean().sqrt())
    torch.testing.assert_close(together.latents, alone.latents, atol=2e-5 * spread, rtol=0)
    noisy = together.schedule.std(eta=1.0, flow_kind="sde") > 0
    assert int(noisy.sum()) >= STEPS - 1
    assert bool(together.log_probs[:, noisy].isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_timesteps_are_the_pipelines_own(frozen_transformers: dict[str, Policy], name: str) -> None:
    policy = frozen_transformers[name]
    seen: list[float] = []

    def note(_: Any, __: int, t: Tensor, values: Any) -> Any:
        seen.append(float(t))
        return values

    size = {"height": 64, "width": 32} if name != "cogvideox" else {"height": 32, "width": 32}
    call = {"num_frames": FRAMES} if policy.info.modality == "video" else {}
    policy.pipeline(
        prompt="a",
        num_inference_steps=7,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=note,
        **size,
        **call,
    )
    ours = policy.schedule(7, **size).timesteps
    torch.testing.assert_close(ours, torch.tensor(seen), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_and_negatives_change_the_conditioning(
    frozen_transformers: dict[str, Policy], name: str
) -> None:
    policy = frozen_transformers[name]
    path = ("encoder_hidden_states",)
    cond = encoded(policy, 5.0)
    for branch in cond.branches[-1:]:
        assert not torch.allclose(branch.tensors[path][0], branch.tensors[path][1], atol=1e-3)
    alone = policy.encode(
        PROMPTS[1:], guidance_scale=5.0, height=32, width=32, frames=frames_of(policy)
    )
    assert torch.equal(alone.branches[-1].tensors[path][0], cond.branches[-1].tensors[path][1])
    if name == "flux":
        assert not cond.guided
        with pytest.raises(UserError, match="no negative branch"):
            encoded(policy, 5.0, negative_prompts=NEGATIVES)
        return
    assert cond.guided
    other = encoded(policy, 5.0, negative_prompts=NEGATIVES)
    assert torch.equal(other.branches[1].tensors[path], cond.branches[1].tensors[path])
    assert not torch.allclose(other.branches[0].tensors[path], cond.branches[0].tensors[path])


def test_an_embedded_scale_is_what_the_denoiser_is_told(
    frozen_transformers: dict[str, Policy],
) -> None:
    policy = frozen_transformers["flux"]
    cond = encoded(policy, 1.0)
    x = normal(streams(), cond.latent_shape)
    told: list[float] = []
    slot = policy.denoiser

    class Listening(torch.nn.Module):
        def forward(self, guidance: Tensor, **others: Any) -> Any:
            told.extend(guidance.tolist())
            return slot(guidance=guidance, **others)

    policy.denoiser = Listening()
    try:
        low, high = (policy.predict(x, torch.tensor(500.0), cond, s) for s in (1.0, 4.5))
    finally:
        policy.denoiser = slot
    assert told == [1.0, 1.0, 4.5, 4.5]
    assert not torch.allclose(low, high, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_items_have_timesteps_of_their_own(
    frozen_transformers: dict[str, Policy], name: str
) -> None:
    policy = frozen_transformers[name]
    cond = encoded(policy, 4.0)
    x = normal(streams(), cond.latent_shape)
    moments = torch.tensor([40.0, 981.0])
    together = policy.predict(x, moments, cond, guidance_scale=4.0)
    for i in range(2):
        alone = policy.predict(x[i : i + 1], moments[i], cond.take([i]), guidance_scale=4.0)
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_learns_through_all_steps_and_the_decoder_as_the_pipelines_own_graph_says(
    transformers_of: dict[str, Path], name: str
) -> None:
    """The oracle is the pipeline's call without its `no_grad`, on the same adapter."""
    policy = Policy.load(transformers_of[name], lora_rank=2)
    generator = torch.Generator().manual_seed(0)
    trained = policy.trainable_parameters()
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.2, generator=generator)
    cond = encoded(policy, 3.0)
    noise = normal(streams(), cond.latent_shape)
    schedule, x = policy.schedule(2, height=32, width=32), noise
    for i in range(2):
        prediction = policy.predict(x, schedule.timesteps[i], cond, 3.0)
        x = schedule.step(prediction, x, i, eta=0.0, flow_kind="ode").mean
    ours = torch.autograd.grad(policy.decode(x, checkpoint=True).square().mean(), trained)

    pipeline = policy.pipeline
    call: dict[str, Any] = {"num_frames": FRAMES} if policy.info.modality == "video" else {}
    if policy.family.needs_negative:
        call["negative_prompt"] = ["", ""]
    packed = pipeline._pack_latents(noise, *noise.shape) if name == "flux" else noise
    drawn = inspect.unwrap(type(pipeline).__call__)(
        pipeline,
        prompt=PROMPTS,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.0,
        latents=packed,
        output_type="pt",
        **call,
    )
    theirs = torch.autograd.grad(drawn[0].square().mean(), trained)
    size = torch.stack([gradient.norm() for gradient in theirs]).norm()
    error = torch.stack([(a - b).norm() for a, b in zip(ours, theirs)]).norm()
    assert float(size) > 0 and float(error / size) < 1e-4
    names = [key for key, p in policy.denoiser.named_parameters() if p.requires_grad]
    silent = {key for key, gradient in zip(names, ours, strict=True) if not bool(gradient.any())}
    # What the last block of SD3 and EasyAnimate asks on behalf of the text is thrown away.
    last = ("blocks.1.attn.add_q_proj", "blocks.1.attn1.add_q_proj")
    assert silent == {key for key in names if any(part in key for part in last)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_adapter_gives_the_same_bits_here_and_in_diffusers(
    transformers_of: dict[str, Path], tmp_path: Path, name: str
) -> None:
    policy = Policy.load(transformers_of[name], lora_rank=2, lora_alpha=7.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_(std=0.2, generator=generator)
    cond = encoded(policy, 3.0)
    x, moment = normal(streams(), cond.latent_shape), torch.tensor(500.0)

    @torch.no_grad()
    def said(by: Policy) -> Tensor:
        return by.predict(x, moment, cond, 3.0)

    expected = said(policy)
    with policy.reference("base"):
        assert not torch.allclose(said(policy), expected, atol=1e-4)
    policy.save(tmp_path)
    again = Policy.load(transformers_of[name], lora_path=tmp_path)
    assert torch.equal(said(again), expected)
    if name == "easyanimate":
        return  # diffusers itself loads no LoRA into it
    bare: Any = DiffusionPipeline.from_pretrained(transformers_of[name])
    bare.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    again.denoiser = bare.transformer.eval()
    assert torch.equal(said(again), expected)


@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox"])
def test_evaluation_draws_what_the_pipeline_would(
    frozen_transformers: dict[str, Policy], name: str
) -> None:
    policy = frozen_transformers[name]
    sampling = SamplingOptions(
        steps=STEPS,
        guidance_scale=5.0,
        height=32,
        width=32,
        frames=frames_of(policy),
        eta=0.0,
        flow_kind="ode",
    )
    drawn = generate(policy, PROMPTS, 2, sampling)
    clip = (FRAMES,) if policy.info.modality == "video" else ()
    assert drawn.pixels.shape == (2, 2, *clip, 3, 32, 32) and bool(drawn.valid.all())
    cond = encoded(policy, 5.0)
    keys = [stream(0, "eval", iteration=None, position=p, sample=1) for p in range(2)]
    _, pixels = pipelines_own(
        policy,
        normal(keys, cond.latent_shape),
        prompt=PROMPTS,
        guidance_scale=5.0,
        height=32,
        width=32,
    )
    torch.testing.assert_close(drawn.floats()[:, 1], pixels, atol=0.6 / 255, rtol=0)
