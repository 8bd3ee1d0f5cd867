"""Settings that save memory or time: that they act, and that pictures and gradients stay."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_align import Policy
from diffusion_align.errors import UserError
from diffusion_align.policy import memory

NOISE = torch.Generator().manual_seed(0)
X = torch.randn(2, 4, 16, 16, generator=NOISE)


def load(folder: Path, **how: Any) -> Policy:
    policy = Policy.load(folder, **({"lora_rank": 2} | how))
    with torch.no_grad():  # a new LoRA changes nothing, and half of its gradients are zero
        for parameter in policy.trainable_parameters():
            parameter.add_(0.05)
    return policy


def gradients(policy: Policy) -> tuple[torch.Tensor, int, int]:
    """All gradients of one loss, bytes saved for the backward pass, calls of the mid block."""
    saved: dict[int, int] = {}
    calls = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def count(module: object, inputs: object) -> None:
        nonlocal calls
        calls += 1

    denoiser: Any = policy.bare_denoiser
    hook = denoiser.mid_block.resnets[1].register_forward_pre_hook(count)
    cond = policy.encode(["a circle", "a square"], guidance_scale=1.0)
    assert not denoiser.training
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = policy.predict(X, torch.tensor(7.0), cond, 1.0).square().mean()
    loss.backward()
    hook.remove()
    flat = [p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None]
    return torch.cat(flat), sum(saved.values()), calls


@pytest.mark.parametrize("name", ["eps", "xl"])
def test_checkpointing_is_active_in_eval_mode(folders: dict[str, Path], name: str) -> None:
    plain, saving = load(folders[name]), load(folders[name])
    memory.checkpoint_gradients(saving)
    expected, everything, once = gradients(plain)
    found, kept, twice = gradients(saving)
    assert (once, twice) == (1, 2)  # the block's forward ran again in the backward pass
    assert kept < 0.5 * everything
    assert torch.equal(found, expected) and expected.abs().sum() > 0


def test_checkpointing_costs_a_rollout_nothing(folders: dict[str, Path]) -> None:
    policy = load(folders["eps"])
    memory.checkpoint_gradients(policy)
    calls = []
    denoiser: Any = policy.bare_denoiser
    denoiser.mid_block.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    cond = policy.encode(["a", "b"], guidance_scale=1.0)
    with torch.no_grad():
        policy.predict(X, torch.tensor(7.0), cond, 1.0)
    assert len(calls) == 1


def test_slices_decode_one_picture_at_a_time_to_the_same_pixels(folders: dict[str, Path]) -> None:
    policy = load(folders["eps"])
    sizes: list[int] = []
    policy.pipeline.vae.decoder.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    together = policy.decode(X)
    memory.slice_vae(policy)
    torch.testing.assert_close(policy.decode(X), together, atol=1e-5, rtol=0)
    assert sizes == [2, 1, 1]


def test_tiles_bound_the_size_that_is_decoded(folders: dict[str, Path]) -> None:
    policy = load(folders["eps"])
    memory.tile_vae(policy)
    vae = policy.pipeline.vae
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 16
    sides: list[int] = []
    vae.decoder.register_forward_pre_hook(
        lambda module, inputs: sides.append(max(inputs[0].shape[2:]))
    )
    assert policy.decode(X).shape == (2, 3, 32, 32)
    assert len(sides) > 1 and max(sides) <= 8


def test_channels_last_is_a_layout_and_no_number(folders: dict[str, Path]) -> None:
    plain = load(folders["eps"], full=True, lora_rank=None)
    fast = load(folders["eps"], full=True, lora_rank=None)
    memory.use_channels_last(fast)
    modules: list[Any] = [fast.bare_denoiser, fast.reference_copy, fast.pipeline.vae.decoder]
    for module in modules:
        assert module.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(plain.bare_denoiser.parameters(), fast.bare_denoiser.parameters()):
        assert torch.equal(a, b)
    cond = plain.encode(["a", "b"], guidance_scale=1.0)
    time = torch.tensor(7.0)
    torch.testing.assert_close(
        fast.predict(X, time, cond, 1.0), plain.predict(X, time, cond, 1.0), atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow  # tracing alone takes half a minute
def test_compiled_blocks_train_and_switch_their_adapter(folders: dict[str, Path]) -> None:
    """With the compiler's tracing and without its code generation, which takes minutes."""
    plain, fast = load(folders["eps"]), load(folders["eps"])
    slot = fast.denoiser
    memory.compile_blocks(fast, backend="aot_eager")
    assert fast.denoiser is slot
    expected, _, _ = gradients(plain)
    found, _, _ = gradients(fast)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)
    cond = plain.encode(["a", "b"], guidance_scale=1.0)
    time = torch.tensor(7.0)
    with torch.no_grad():
        tuned = fast.predict(X, time, cond, 1.0)
        with fast.reference(), plain.reference():
            base = fast.predict(X, time, cond, 1.0)
            torch.testing.assert_close(base, plain.predict(X, time, cond, 1.0))
    assert (tuned - base).abs().max() > 1e-4  # the adapter is not compiled away


def test_a_backend_that_has_no_effect_is_said(folders: dict[str, Path]) -> None:
    policy = load(folders["eps"])
    told = memory.use_attention_backend(policy, "native")
    assert told is not None and "no effect" in told and "UNet2DConditionModel" in told


@pytest.mark.parametrize(("name", "says"), [("natve", "did you mean native"), ("flashh", "flash")])
def test_an_unknown_backend_is_answered_with_the_nearest(
    folders: dict[str, Path], name: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        memory.use_attention_backend(load(folders["eps"]), name)


def test_xformers_is_asked_for_where_a_unet_can_have_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs a GPU: without one the sentence says so, and nothing is silently left as it was."""
    policy = load(folders["eps"])
    if torch.cuda.is_available():
        pytest.skip("it would work")
    with pytest.raises(UserError, match="xformers cannot be used here"):
        memory.use_attention_backend(policy, "xformers")


def test_released_encoders_rest_after_every_encoding(folders: dict[str, Path]) -> None:
    policy = load(folders["eps"])
    told = memory.release_text_encoders(policy)
    assert told is not None and "CPU" in told and not policy.resting
    rested = []

    class Hook:
        def offload(self) -> None:
            rested.append(True)

    policy.resting.append(Hook())
    policy.encode(["something new"], guidance_scale=1.0)
    assert rested == [True]


def test_a_model_without_weights_has_every_shape_and_no_memory(folders: dict[str, Path]) -> None:
    for name in ("eps", "xl"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            hollow = Policy.load(folders[name], lora_rank=2, dtype="bfloat16", weights=False)
        real = Policy.load(folders[name], lora_rank=2, dtype="bfloat16")
        for component in ("unet", "vae", "text_encoder"):
            mine = dict(getattr(hollow.pipeline, component).named_parameters())
            theirs = dict(getattr(real.pipeline, component).named_parameters())
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                assert mine[key].device.type == "meta"
                assert (mine[key].shape, mine[key].dtype, mine[key].requires_grad) == (
                    value.shape,
                    value.dtype,
                    value.requires_grad,
                )
        assert (hollow.info.height, hollow.info.width) == (real.info.height, real.info.width)


def test_a_model_that_was_never_downloaded_is_named_with_the_command() -> None:
    with pytest.raises(UserError, match=r"hf download nobody/nothing --revision v2 --include"):
        Policy.load("nobody/nothing", weights=False, revision="v2")
