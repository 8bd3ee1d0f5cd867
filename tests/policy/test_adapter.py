"""What is trained, what it is compared with, and what is written to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from diffusion_align import Policy, UserError
from diffusion_align.config import load_config
from diffusion_align.sampling import normal, stream

SCALE = 5.0


def latents(policy: Policy, count: int = 2) -> Tensor:
    sources = [stream(1, "rollout", iteration=0, position=i, sample=0) for i in range(count)]
    return normal(sources, policy.latent_shape())


def output(policy: Policy) -> Tensor:
    cond = policy.encode(["a red circle", "b"], guidance_scale=SCALE)
    return policy.predict(latents(policy), torch.tensor(601.0), cond, guidance_scale=SCALE)


def quiet(policy: Policy) -> Tensor:
    with torch.no_grad():
        return output(policy)


def disturb(policy: Policy, size: float = 0.2) -> None:
    """Stands for training: every trained weight moves."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=size)


@pytest.mark.parametrize("name", ["eps", "xl"])
def test_a_new_lora_changes_nothing_and_gradients_reach_it(
    folders: dict[str, Path], frozen: dict[str, Policy], name: str
) -> None:
    policy = Policy.load(folders[name], lora_rank=4)
    assert torch.equal(quiet(policy), quiet(frozen[name]))
    output(policy).square().mean().backward()
    trained = policy.trainable_parameters()
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    names = {
        key
        for key, parameter in policy.pipeline.unet.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
    }
    assert names == {key for key, _ in policy.pipeline.unet.named_parameters() if "lora_B" in key}
    assert not frozen[name].trainable_parameters()


def test_gradients_flow_through_prediction_and_decode_to_lora_and_latents(
    folders: dict[str, Path],
) -> None:
    policy = Policy.load(folders["eps"], lora_rank=2)
    disturb(policy)
    cond = policy.encode(["a", "b"], guidance_scale=SCALE)
    x = latents(policy).requires_grad_()
    step = policy.schedule(3).step(
        policy.predict(x, torch.tensor(1.0), cond, guidance_scale=SCALE), x, 2, eta=0.0
    )
    policy.decode(step.mean, checkpoint=True).mean().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0
    for parameter in policy.trainable_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())


def test_the_base_is_the_reference_of_a_new_lora(
    folders: dict[str, Path], frozen: dict[str, Policy]
) -> None:
    policy = Policy.load(folders["eps"], lora_rank=4, lora_alpha=8)
    disturb(policy)
    tuned = quiet(policy)
    with policy.reference():
        assert torch.equal(quiet(policy), quiet(frozen["eps"]))
    assert torch.equal(quiet(policy), tuned)
    assert float((tuned - quiet(frozen["eps"])).abs().max()) > 1e-3
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters())


def test_a_reference_between_forward_and_backward_disturbs_no_gradient(
    folders: dict[str, Path],
) -> None:
    gradients = []
    for look in (False, True):
        policy = Policy.load(folders["eps"], lora_rank=2)
        disturb(policy)
        loss = output(policy).square().mean()
        if look:
            with policy.reference(), torch.no_grad():
                output(policy)
        loss.backward()
        gradients.append([parameter.grad for parameter in policy.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("name", ["eps", "xl"])
def test_a_saved_lora_gives_the_same_pictures_in_ours_and_in_plain_diffusers(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    policy = Policy.load(folders[name], lora_rank=4, lora_alpha=16)
    disturb(policy)
    policy.save(tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [
        "pytorch_lora_weights.safetensors"
    ]
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert "lora_adapter_metadata" in file.metadata()
    again = Policy.load(folders[name], lora_path=tmp_path / "lora")
    assert torch.equal(quiet(again), quiet(policy))
    assert len(again.trainable_parameters()) == len(policy.trainable_parameters())

    plain = DiffusionPipeline.from_pretrained(folders[name])
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    call: dict[str, Any] = {
        "prompt": ["a red circle", "b"],
        "num_inference_steps": 3,
        "guidance_scale": SCALE,
        "latents": latents(policy),
        "output_type": "pt",
    }
    theirs = plain(**call).images
    torch.testing.assert_close(policy.pipeline(**call).images, theirs, atol=1e-6, rtol=0)
    plain.unload_lora_weights()
    assert float((plain(**call).images - theirs).abs().max()) > 1e-4


def test_a_lora_that_is_continued_is_compared_with_its_own_snapshot(
    folders: dict[str, Path], frozen: dict[str, Policy], tmp_path: Path
) -> None:
    first = Policy.load(folders["eps"], lora_rank=4, lora_alpha=2)
    disturb(first)
    first.save(tmp_path)
    start = quiet(first)
    second = Policy.load(folders["eps"], lora_path=tmp_path, lora_dropout=0.3)
    assert torch.equal(quiet(second), start)
    with second.reference():
        assert torch.equal(quiet(second), start)
    disturb(second)
    tuned = quiet(second)
    assert float((tuned - start).abs().max()) > 1e-3
    with second.reference():
        assert torch.equal(quiet(second), start)
        assert not output(second).requires_grad
    with second.reference("base"):
        assert torch.equal(quiet(second), quiet(frozen["eps"]))
    assert torch.equal(quiet(second), tuned)
    assert not any(
        parameter.requires_grad
        for key, parameter in second.pipeline.unet.named_parameters()
        if "snapshot" in key
    )
    second.save(tmp_path / "second")
    with second.reference():
        second.save(tmp_path / "during")
    for folder in ("second", "during"):
        assert torch.equal(quiet(Policy.load(folders["eps"], lora_path=tmp_path / folder)), tuned)


def test_full_fine_tuning_keeps_a_copy_and_saves_a_pipeline(
    folders: dict[str, Path], frozen: dict[str, Policy], tmp_path: Path
) -> None:
    policy = Policy.load(folders["v"], full=True, dtype="bfloat16")
    parameters = list(policy.pipeline.unet.parameters())
    assert len(policy.trainable_parameters()) == len(parameters)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert policy.pipeline.vae.dtype == torch.bfloat16
    start = quiet(policy)
    disturb(policy, 0.01)
    tuned = quiet(policy)
    assert float((tuned - start).abs().max()) > 1e-3
    for kind in ("start", "base"):
        with policy.reference(kind):
            assert torch.equal(quiet(policy), start)
    assert torch.equal(quiet(policy), tuned)
    policy.save(tmp_path)
    reloaded = Policy.load(tmp_path, full=True, dtype="bfloat16")
    assert torch.equal(quiet(reloaded), tuned)
    assert reloaded.schedule(5).prediction == "v"
    with pytest.raises(UserError, match="nothing to save"):
        frozen["v"].save(tmp_path)


def test_trained_weights_are_float32_over_a_frozen_bfloat16_model(
    folders: dict[str, Path], frozen: dict[str, Policy]
) -> None:
    policy = Policy.load(folders["eps"], lora_rank=4, dtype="bfloat16")
    assert {parameter.dtype for parameter in policy.trainable_parameters()} == {torch.float32}
    assert policy.pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    predicted = output(policy)
    assert predicted.dtype == torch.float32
    predicted.square().mean().backward()
    exact = quiet(frozen["eps"])
    error = (predicted.detach() - exact).square().mean() / exact.square().mean()
    assert 0.0 < float(error) < 0.01


def test_dropout_acts_in_training_forwards_only(folders: dict[str, Path]) -> None:
    policy = Policy.load(folders["eps"], lora_rank=4, lora_dropout=0.5)
    plain = Policy.load(folders["eps"], lora_rank=4)
    disturb(policy)
    disturb(plain)
    assert torch.equal(quiet(policy), quiet(policy))  # a rollout and its replay check: ratio 1
    assert torch.equal(quiet(policy), quiet(plain))
    torch.manual_seed(0)
    one, other = output(policy).detach(), output(policy).detach()
    assert float((one - other).abs().max()) > 1e-4
    assert torch.equal(output(plain).detach(), quiet(plain))
    assert not any(module.training for module in policy.pipeline.unet.modules())


def test_a_lora_is_drawn_from_its_seed_and_nothing_global(folders: dict[str, Path]) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        policy = Policy.load(folders["eps"], lora_rank=4, seed=seed)
        drawn.append(torch.cat([p.flatten() for p in policy.trainable_parameters()]).detach())
        torch.rand(1)
        if seed == 0 and len(drawn) == 1:
            torch.random.set_rng_state(before)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.random.set_rng_state(before)
    Policy.load(folders["eps"], lora_rank=4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_gaussian_first_matrices_have_one_width_and_published_ones_are_so(
    folders: dict[str, Path],
) -> None:
    """peft's `gaussian`: standard deviation 1 / rank, whatever the layer; the default's shrinks."""
    drawn = [
        {
            name: parameter.detach()
            for name, parameter in policy.pipeline.unet.named_parameters()
            if ".lora_A." in name
        }
        for policy in (
            Policy.load(folders["eps"], lora_rank=8, lora_init="gaussian"),
            Policy.load(folders["eps"], lora_rank=8, lora_init="gaussian", seed=1),
            Policy.load(folders["eps"], lora_rank=8),
        )
    ]
    gaussian, other = (torch.cat([a.flatten() for a in one.values()]) for one in drawn[:2])
    assert len(gaussian) > 2000 and not torch.equal(gaussian, other)
    assert float(gaussian.std()) == pytest.approx(1 / 8, rel=0.06)
    assert float(gaussian.abs().max()) > 3 / 8  # no bounded draw
    for name, matrix in drawn[2].items():
        assert float(matrix.abs().max()) <= matrix.shape[1] ** -0.5, name
    for name in ("ddpo_sd15_aesthetic", "ddpo_tiny_published"):
        lora = load_config(name).lora
        assert lora is not None and (lora.init, lora.rank, lora.alpha) == ("gaussian", 4, 4)


def test_an_unknown_init_and_one_beside_a_path_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="'guassian' is none of kaiming, gaussian"):
        Policy.load(folders["eps"], lora_rank=4, lora_init="guassian")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="init of a LoRA that is continued"):
        Policy.load(folders["eps"], lora_path="x", lora_init="gaussian")


def test_a_seed_of_any_size_draws_a_lora(folders: dict[str, Path]) -> None:
    for seed in (10**20, -3):
        assert Policy.load(folders["eps"], lora_rank=2, seed=seed).trainable_parameters()


def test_targets_can_be_named_and_are_remembered(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = Policy.load(folders["eps"], lora_rank=2, lora_targets=["to_k", "conv_in"])
    disturb(policy)
    policy.save(tmp_path)
    assert torch.equal(quiet(Policy.load(folders["eps"], lora_path=tmp_path)), quiet(policy))
    adapted = {
        key.split(".lora_")[0].rpartition(".")[2]
        for key, parameter in policy.pipeline.unet.named_parameters()
        if parameter.requires_grad
    }
    assert adapted == {"to_k", "conv_in"}


def test_a_file_whose_layers_do_not_all_find_a_place_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # What diffusers' own conversion writes for these targets: half of the keys renamed. Its
    # loader would drop every attention layer without a word.
    policy = Policy.load(folders["eps"], lora_rank=2, lora_targets=["to_k", "conv_in"])
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(policy.pipeline.unet))
    type(policy.pipeline).save_lora_weights(tmp_path, unet_lora_layers=state)
    with pytest.raises(UserError, match="only 2 of its 18 matrices"):
        Policy.load(folders["eps"], lora_path=tmp_path)


def test_a_text_encoder_lora_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = Policy.load(folders["eps"], lora_rank=2)
    policy.pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    type(policy.pipeline).save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(policy.pipeline.unet),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(
            get_peft_model_state_dict(policy.pipeline.text_encoder)
        ),
    )
    with pytest.raises(UserError, match="also changes the text_encoder"):
        Policy.load(folders["eps"], lora_path=tmp_path)


def test_lora_mistakes_are_explained(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["eps"]
    with pytest.raises(UserError, match=r"'to_w' matches no layer[^$]*did you mean to_"):
        Policy.load(folder, lora_rank=4, lora_targets=["to_q", "to_w"])
    with pytest.raises(UserError, match=r"lora\.targets"):
        Policy.load(folder, lora_rank=4, lora_targets=["norm1"])
    with pytest.raises(UserError, match=r"lora\.rank: 0"):
        Policy.load(folder, lora_rank=0)
    with pytest.raises(UserError, match=r"lora\.dropout: 1\.0"):
        Policy.load(folder, lora_rank=1, lora_dropout=1.0)
    with pytest.raises(UserError, match="not both"):
        Policy.load(folder, lora_rank=1, full=True)
    with pytest.raises(UserError, match="holds no LoRA weights"):
        Policy.load(folder, lora_path=tmp_path)
    with pytest.raises(UserError, match="no such LoRA"):
        Policy.load(folder, lora_path=tmp_path / "missing")
    with pytest.raises(UserError, match="a whole model, not a LoRA"):
        Policy.load(folder, lora_path=folder)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors"):
        Policy.load(folder, lora_path=tmp_path)
    other = Policy.load(folders["xl"], lora_rank=2)
    other.save(tmp_path / "xl")
    with pytest.raises(UserError, match="does not fit the model"):
        Policy.load(folder, lora_path=tmp_path / "xl")
    with pytest.raises(UserError, match="rank 3 was asked for, but this LoRA has rank 2"):
        Policy.load(folders["xl"], lora_path=tmp_path / "xl", lora_rank=3)


def test_a_module_put_into_the_slot_is_the_one_that_is_called(folders: dict[str, Path]) -> None:
    policy = Policy.load(folders["eps"], lora_rank=2)
    disturb(policy)
    expected = quiet(policy)
    with policy.reference():
        base = quiet(policy)

    class Prepared(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.module(*args, **kwargs)

    prepared = Prepared(policy.denoiser)
    policy.denoiser = prepared
    assert torch.equal(quiet(policy), expected) and prepared.calls == 1
    with policy.reference():
        assert torch.equal(quiet(policy), base) and prepared.calls == 2
