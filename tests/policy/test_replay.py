"""Capture and replay against the pipeline itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align import Policy, UserError
from diffusion_align.policy.capture import capture, probe
from diffusion_align.policy.conditioning import Conditioning, join
from diffusion_align.sampling import normal, stream
from diffusion_align.sampling.rollout import rollout

PROMPTS = ["a", "a large red circle above a small blue square on white"]
NEGATIVES = ["blurry, grey", "ugly"]
STEPS = 4


def streams(count: int, iteration: int = 0) -> list[Any]:
    return [stream(7, "rollout", iteration=iteration, position=i, sample=0) for i in range(count)]


def pipelines_own(
    pipeline: Any, noises: list[Tensor], eta: float, **call: Any
) -> tuple[Tensor, Tensor]:
    """The pipeline's trajectory and pixels from the noises of our streams.

    The initial latents and each step's variance noise are handed in; everything else is the
    pipeline's and its scheduler's own.
    """
    states = [noises[0]]
    later = iter(noises[1:])
    own_step = type(pipeline.scheduler).step

    def step(output: Tensor, t: Tensor, sample: Tensor, **ignored: Any) -> Any:
        noise = next(later) if eta > 0 else None
        return own_step(
            pipeline.scheduler, output, t, sample, eta=eta, variance_noise=noise, return_dict=False
        )

    def keep(_: Any, __: int, ___: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(values["latents"].clone())
        return values

    pipeline.scheduler.step = step
    try:
        pixels = pipeline(
            latents=noises[0].clone(),
            num_inference_steps=STEPS,
            output_type="pt",
            callback_on_step_end=keep,
            **call,
        ).images
    finally:
        del pipeline.scheduler.step
    return torch.stack(states, 1), pixels


@pytest.mark.parametrize("negatives", [None, NEGATIVES])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48)])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["eps", "v", "xl"])
def test_rollout_and_decode_equal_the_pipelines_own(
    frozen: dict[str, Policy],
    name: str,
    eta: float,
    guidance_scale: float,
    height: int,
    width: int,
    negatives: list[str] | None,
) -> None:
    policy = frozen[name]
    cond = policy.encode(
        PROMPTS,
        negative_prompts=negatives,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
    )
    ours = rollout(
        policy,
        cond,
        policy.schedule(STEPS),
        streams(2),
        guidance_scale=guidance_scale,
        eta=eta,
    )
    fresh = streams(2)
    noises = [normal(fresh, cond.latent_shape) for _ in range(STEPS + 1)]
    theirs, pixels = pipelines_own(
        policy.pipeline,
        noises,
        eta,
        prompt=PROMPTS,
        negative_prompt=negatives,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
    )
    scale = float(theirs.square().mean().sqrt().clamp(min=1.0))
    torch.testing.assert_close(ours.latents, theirs, atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(policy.decode(ours.x_0), pixels, atol=1e-5, rtol=0)


def test_timesteps_are_the_pipelines_own(frozen: dict[str, Policy]) -> None:
    for policy in frozen.values():
        policy.pipeline.scheduler.set_timesteps(7)
        expected = policy.pipeline.scheduler.timesteps.float()
        torch.testing.assert_close(policy.schedule(7).timesteps, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["eps", "xl"])
def test_prompts_and_negatives_change_the_conditioning(
    frozen: dict[str, Policy], name: str
) -> None:
    policy = frozen[name]
    cond = policy.encode(PROMPTS, negative_prompts=NEGATIVES, guidance_scale=7.5)
    for branch in cond.branches:
        embedding = branch.tensors[("encoder_hidden_states",)]
        assert not torch.allclose(embedding[0], embedding[1], atol=1e-3)
    plain = policy.encode(PROMPTS, guidance_scale=7.5)
    assert plain.branches[1].tensors.keys() == cond.branches[1].tensors.keys()
    path = ("encoder_hidden_states",)
    assert torch.equal(plain.branches[1].tensors[path], cond.branches[1].tensors[path])
    assert not torch.allclose(plain.branches[0].tensors[path], cond.branches[0].tensors[path])


def assert_same(ours: Conditioning, theirs: tuple[Any, ...]) -> None:
    for mine, other in zip(ours.branches, theirs, strict=True):
        assert mine.axes == other.axes and set(mine.axes.values()) == {0}
        for path, value in mine.tensors.items():
            torch.testing.assert_close(value, other.tensors[path], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "count"), [("eps", 77), ("eps", 32), ("xl", 6), ("xl", 64), ("xl", 1), ("xl", 12)]
)
def test_batch_axes_are_not_fooled_by_a_batch_as_long_as_a_feature(
    frozen: dict[str, Policy], name: str, count: int
) -> None:
    # 77 tokens, widths 32 and 64, six time ids: a capture of that many items has the same layout.
    policy = frozen[name]
    prompts = [f"prompt {i}" for i in range(count)]
    negatives = ["grey"] * count
    cond = policy.encode(prompts, negative_prompts=negatives, guidance_scale=3.0)
    layout = probe(policy.pipeline, policy.family, guided=True, height=32, width=32)
    captured = capture(
        policy.pipeline, policy.family, prompts, negatives, guided=True, height=32, width=32
    )
    assert_same(cond, layout.split(captured))
    if name == "xl":
        assert ("added_cond_kwargs", "time_ids") in layout.axes
    x = normal(streams(count), cond.latent_shape)
    together = policy.predict(x, torch.tensor(500.0), cond, guidance_scale=3.0)
    last = policy.predict(x[-1:], torch.tensor(500.0), cond.take([count - 1]), guidance_scale=3.0)
    torch.testing.assert_close(together[-1:], last, atol=2e-5, rtol=0)


def test_items_have_timesteps_of_their_own(frozen: dict[str, Policy]) -> None:
    for policy in frozen.values():
        cond = policy.encode(["one", "two", "three"], guidance_scale=4.0)
        x = normal(streams(3), cond.latent_shape)
        moments = torch.tensor([1.0, 400.0, 981.0])
        together = policy.predict(x, moments, cond, guidance_scale=4.0)
        for i in range(3):
            alone = policy.predict(x[i : i + 1], moments[i], cond.take([i]), guidance_scale=4.0)
            torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=0)


def test_a_prompt_is_captured_once_and_its_bits_do_not_depend_on_its_neighbours(
    folders: dict[str, Path],
) -> None:
    policy = Policy.load(folders["eps"])
    runs: list[int] = []
    own = policy.pipeline.text_encoder.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return own(*args, **kwargs)

    first = policy.encode(["one", "two", "one"], guidance_scale=1.0)
    policy.pipeline.text_encoder.forward = counted
    again = policy.encode(["two", "one"], guidance_scale=1.0)
    assert not runs
    path = ("encoder_hidden_states",)
    assert torch.equal(first.branches[0].tensors[path][:2], again.branches[0].tensors[path].flip(0))
    policy.encode(["three"], guidance_scale=1.0)
    assert len(runs) == 1
    alone = Policy.load(folders["eps"]).encode(["two"], guidance_scale=1.0)
    assert torch.equal(alone.branches[0].tensors[path][0], first.branches[0].tensors[path][1])


def test_the_cache_forgets_the_oldest_prompt_beyond_its_limit(frozen: dict[str, Policy]) -> None:
    from diffusion_align.policy.encoder import PromptEncoder

    policy = frozen["eps"]
    size = policy.encode(["a"], guidance_scale=1.0).nbytes
    encoder = PromptEncoder(
        policy.pipeline, policy.family, dtype=torch.float32, cache_bytes=2 * size
    )
    for prompt in "abac":
        encoder.encode([prompt], None, guided=False, height=32, width=32)
    assert [key[0] for key in encoder._cache] == ["a", "c"]


def test_capture_leaves_the_pipeline_and_the_global_stream_alone(
    folders: dict[str, Path],
) -> None:
    policy = Policy.load(folders["eps"])
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    policy.encode(["x"], guidance_scale=7.5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert "forward" not in vars(policy.pipeline.unet)
    assert "step" not in vars(policy.pipeline.scheduler)


def test_conditioning_is_taken_and_collated_item_by_item(frozen: dict[str, Policy]) -> None:
    policy = frozen["xl"]
    cond = policy.encode(["a", "bb", "ccc"], guidance_scale=2.0)
    back = Conditioning.collate([cond.take([2]), cond.take([0, 1])]).take([1, 2, 0])
    assert back.prompts == ("a", "bb", "ccc") and len(back) == 3
    for mine, other in zip(cond.branches, back.branches, strict=True):
        for path, value in mine.tensors.items():
            assert torch.equal(value, other.tensors[path])
    assert torch.equal(
        join(cond.branches).tensors[("encoder_hidden_states",)][3:],
        cond.branches[1].tensors[("encoder_hidden_states",)],
    )
    unguided = policy.encode(["a"], guidance_scale=1.0)
    with pytest.raises(ValueError, match="differ"):
        Conditioning.collate([cond, unguided])
    with pytest.raises(ValueError, match="without guidance"):
        policy.predict(
            torch.zeros(1, *unguided.latent_shape), torch.tensor(1.0), unguided, guidance_scale=2.0
        )


def test_guidance_of_one_runs_the_conditional_branch_only(folders: dict[str, Path]) -> None:
    policy = Policy.load(folders["eps"])
    rows: list[int] = []
    slot = policy.denoiser

    class Counting(torch.nn.Module):
        def forward(self, sample: Tensor, **others: Any) -> Any:
            rows.append(sample.shape[0])
            return slot(sample, **others)

    policy.denoiser = Counting()  # the slot: predict calls nothing else
    cond = policy.encode(["a", "b"], guidance_scale=7.5)
    assert rows == []
    x = torch.zeros(2, *cond.latent_shape)
    for scale in (1.0, 0.0, 1.5):
        policy.predict(x, torch.tensor(10.0), cond, guidance_scale=scale)
    assert rows == [2, 2, 4]


def test_decode_is_differentiable_the_same_in_chunks_and_checkpointed(
    frozen: dict[str, Policy],
) -> None:
    policy = frozen["eps"]
    gradients = []
    for chunk, checkpoint in ((None, False), (1, False), (2, True)):
        x = normal(streams(3), policy.latent_shape(32, 32)).mul(0.1).requires_grad_()
        pixels = policy.decode(x, chunk=chunk, checkpoint=checkpoint)
        assert pixels.shape == (3, 3, 32, 32) and pixels.dtype == torch.float32
        assert bool(((pixels >= 0.0) & (pixels <= 1.0)).all())
        (gradient,) = torch.autograd.grad(pixels.square().sum(), x)
        gradients.append((pixels.detach(), gradient))
    assert float(gradients[0][1].abs().max()) > 0.0
    for pixels, gradient in gradients[1:]:
        torch.testing.assert_close(pixels, gradients[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(gradient, gradients[0][1], atol=1e-4, rtol=1e-4)


def test_pixels_are_encoded_by_the_posteriors_mean(frozen: dict[str, Policy]) -> None:
    policy = frozen["eps"]
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    vae = policy.pipeline.vae
    with torch.no_grad():
        expected = vae.encode(pixels * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(policy.encode_pixels(pixels), expected)
    assert policy.latent_shape(32, 48) == tuple(expected.shape[1:])


def test_a_vae_with_latent_statistics_is_inverted_exactly(tiny: Any, tmp_path: Path) -> None:
    # SDXL descendants (Playground 2.5) normalise latents per channel; the pipeline undoes it.
    pipeline = tiny.stable_diffusion_xl(tiny.ddim())
    pipeline.vae.register_to_config(
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0], scaling_factor=0.5
    )
    pipeline.save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x_0 = policy.encode_pixels(pixels)
        raw = policy.pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean
        expected = (policy.pipeline.vae.decode(raw).sample * 0.5 + 0.5).clamp(0, 1)
        torch.testing.assert_close(policy.decode(x_0), expected, atol=1e-5, rtol=0)


def test_a_size_that_does_not_fit_names_the_nearest(frozen: dict[str, Policy]) -> None:
    policy = frozen["eps"]
    with pytest.raises(UserError, match=r"width: 45 is not a multiple of 8[^$]*48"):
        policy.encode(["a"], guidance_scale=1.0, height=32, width=45)
    with pytest.raises(UserError, match="height"):
        policy.latent_shape(0, 32)
    with pytest.raises(ValueError, match="2 prompts but 1"):
        policy.encode(["a", "b"], negative_prompts=["c"], guidance_scale=2.0)
    with pytest.raises(UserError, match="2000 steps"):
        policy.schedule(2000)


def test_guidance_may_be_left_to_the_model_and_be_given_by_position(
    frozen: dict[str, Policy],
) -> None:
    policy = frozen["eps"]
    own = policy.info.guidance_scale
    assert own > 1.0
    cond = policy.encode(["a", "b"])
    assert cond.guided
    x = policy.initial_noise(torch.randn(2, *policy.latent_shape()))
    moment = torch.tensor(501.0)
    given = policy.predict(x, moment, cond, own)
    assert torch.equal(given, policy.predict(x, moment, cond, guidance_scale=own))


def test_a_prompt_beyond_the_text_encoder_is_named_once_with_the_limit(
    folders: dict[str, Path], recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    policy = Policy.load(folders["eps"])
    long = "a red circle " * 40
    for scale in (1.0, 2.0):
        policy.encode(["a cat", long], negative_prompts=["", "blue " * 60], guidance_scale=scale)
    said = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert len(said) == 2
    assert said[0].startswith("prompt 'a red circle a red circle")
    assert "the text encoder reads 77" in said[0]
    assert "prompt 'blue " in said[1]
    assert all("\n" not in line for line in said)
    # diffusers and transformers, which would print all of what is cut, say nothing
    assert "truncated" not in "".join(capfd.readouterr())
