"""Files that draw the policy's pictures pass; those that lost something on the way do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_align import Policy, UserError
from diffusion_align.policy.tuned import LORA_FILE, Tuned, find_tuned
from diffusion_align.publish.contents import COMFYUI_FILE
from diffusion_align.publish.layouts import write_comfyui
from diffusion_align.publish.merge import merge, save_merged
from diffusion_align.publish.self_check import Drawn, SelfCheck, draw_plainly, self_check
from diffusion_align.sampling import normal, stream
from diffusion_align.sampling.rollout import rollout

CPU = torch.device("cpu")
# More than the family's own targets: every kind of layer that both layouts have a name for.
WIDE = [
    "to_q",
    "to_k",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "conv1",
    "conv_shortcut",
]


def drawn_by(policy: Policy) -> Drawn:
    """Two pictures by our own loop, in evaluation noise."""
    prompts, negatives = ["a red circle", "b"], ["", "blurred"]

    def streams() -> list[Any]:
        return [stream(3, "eval", iteration=None, position=p, sample=0) for p in range(2)]

    with torch.no_grad():
        cond = policy.encode(prompts, negative_prompts=negatives, guidance_scale=4.0)
        path = rollout(policy, cond, policy.schedule(3), streams(), guidance_scale=4.0, eta=0.0)
        pixels = policy.decode(path.x_0)
    noise = normal(streams(), policy.latent_shape())
    return Drawn(prompts, negatives, noise, pixels, 3, 4.0, 32, 32)


def saved(policy: Policy, folder: Path) -> Tuned:
    policy.save(folder)
    tuned = find_tuned(folder)
    if not tuned.whole:
        write_comfyui(tuned.path, policy.family)
    return tuned


@pytest.mark.parametrize(("name", "targets"), [("sd", WIDE), ("xl", None)])
def test_both_files_of_a_lora_draw_the_policys_pictures_in_plain_diffusers(
    folders: dict[str, Path],
    moved: Callable[..., None],
    tmp_path: Path,
    name: str,
    targets: list[str] | None,
) -> None:
    policy = Policy.load(folders[name], lora_rank=4, lora_alpha=10, lora_targets=targets)
    moved(policy)
    drawn, tuned = drawn_by(policy), saved(policy, tmp_path)
    found = self_check(str(folders[name]), tuned, drawn, device=CPU)
    assert found.passed and found.comfyui is not None
    assert max(found.reloaded, found.comfyui) <= 1e-5 < 1e-3 < found.change
    with policy.reference("base"):
        base = drawn_by(policy).pixels
    assert found.change == pytest.approx(float((base - drawn.pixels).abs().max()), abs=1e-4)
    assert "the same pictures" in found.sentence() and "2 pictures in 3 steps" in found.sentence()


def rewritten(file: Path, change: Callable[[dict], dict], *, metadata: bool) -> None:
    with safe_open(file, "pt") as stored:
        told = stored.metadata()
    save_file(change(load_file(file)), file, metadata=told if metadata else {"format": "pt"})


def test_a_file_that_lost_its_alpha_or_a_layer_is_found(
    folders: dict[str, Path], moved: Callable[..., None], tmp_path: Path
) -> None:
    policy = Policy.load(folders["sd"], lora_rank=4, lora_alpha=16)
    moved(policy)
    drawn = drawn_by(policy)

    def check(tuned: Tuned) -> SelfCheck:
        return self_check(str(folders["sd"]), tuned, drawn, device=CPU)

    tuned = saved(policy, tmp_path / "alpha")
    rewritten(tuned.path, dict, metadata=False)
    found = check(tuned)
    assert found.reloaded > 1e-4 and not found.passed and "OTHER PICTURES" in found.sentence()
    assert found.comfyui is not None and found.comfyui <= 1e-5

    tuned = saved(policy, tmp_path / "layer")
    beside = tmp_path / "layer" / COMFYUI_FILE
    first = sorted(load_file(beside))[0].partition(".")[0]
    rewritten(
        beside, lambda t: {k: v for k, v in t.items() if not k.startswith(first)}, metadata=True
    )
    found = check(tuned)
    assert found.reloaded <= 1e-5
    assert found.comfyui is not None and found.comfyui > 1e-5 and not found.passed


def test_a_lora_that_changes_nothing_is_told_from_one_that_does(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    policy = Policy.load(folders["sd"], lora_rank=2)
    found = self_check(str(folders["sd"]), saved(policy, tmp_path), drawn_by(policy), device=CPU)
    assert found.same and not found.changes and not found.passed
    assert "base model's as well" in found.sentence()
    assert not SelfCheck(float("nan"), None, 0.1, 1, 1).same


def test_a_whole_model_is_loaded_again_and_told_from_its_base(
    folders: dict[str, Path], moved: Callable[..., None], tmp_path: Path
) -> None:
    policy = Policy.load(folders["sd"], full=True)
    moved(policy, 0.01)
    tuned = saved(policy, tmp_path)
    assert tuned.whole and not (tmp_path / COMFYUI_FILE).exists()
    found = self_check(str(folders["sd"]), tuned, drawn_by(policy), device=CPU)
    assert found.passed and found.comfyui is None and found.change > 1e-3


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_a_merged_model_draws_the_pictures_of_its_lora(
    folders: dict[str, Path], moved: Callable[..., None], tmp_path: Path, name: str
) -> None:
    from diffusers import DiffusionPipeline

    policy = Policy.load(folders[name], lora_rank=4, lora_alpha=8)
    moved(policy)
    drawn, tuned = drawn_by(policy), saved(policy, tmp_path / "lora")
    merged = merge(str(folders[name]), tuned.path)
    assert not [key for key, _ in merged.unet.named_parameters() if "lora" in key]
    torch.testing.assert_close(
        draw_plainly(merged, policy.family, drawn), drawn.pixels, atol=1e-5, rtol=0
    )
    save_merged(merged, tmp_path / "merged")
    again = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        draw_plainly(again, policy.family, drawn), drawn.pixels, atol=1e-5, rtol=0
    )
    save_merged(merged, tmp_path / "half", "bfloat16")
    stored = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_a_lora_of_another_model_cannot_be_merged(
    folders: dict[str, Path], moved: Callable[..., None], tmp_path: Path
) -> None:
    policy = Policy.load(folders["sd"], lora_rank=2)
    moved(policy)
    tuned = saved(policy, tmp_path)
    with pytest.raises(UserError, match="cannot be merged") as found:
        merge(str(folders["xl"]), tuned.path)
    assert LORA_FILE in str(found.value)
