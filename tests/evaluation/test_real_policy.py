"""The whole comparison on a real (small, random) Stable Diffusion with a LoRA."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_align import Policy
from diffusion_align.evaluation.compare import compare
from diffusion_align.sampling.options import SamplingOptions


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Its LoRA is moved away from zero, so that tuned differs from base."""
    path = Path(__file__).parent.parent / "policy" / "tiny_pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines_of_evaluation", path)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    root = tmp_path_factory.mktemp("pipeline")
    tiny.stable_diffusion(tiny.ddim()).save_pretrained(root)
    made = Policy.load(root, lora_rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return made


def test_base_and_tuned_are_the_pictures_of_adapter_off_and_on(
    policy: Policy, brightness: Any, tmp_path: Path
) -> None:
    size = policy.info.height or 32
    sampling = SamplingOptions(steps=2, eta=0.0, height=size, width=size, batch_size=3)
    prompts = ["a red circle", "a dog"]
    rewards = {"light": brightness()}
    how = {"rewards": rewards, "seeds": 2, "sampling": sampling}
    found = compare(policy, prompts, output=tmp_path / "lora", **how)  # type: ignore[arg-type]
    light = found.result("light")
    assert light.paired.ties == 0
    assert found.setup.sampler == "DDIM (eta 0)"

    # A saved adapter, loaded on its own, is compared with the same base and not with itself.
    policy.save(tmp_path / "saved")
    again = Policy.load(policy.info.source, lora_path=tmp_path / "saved")
    loaded = compare(again, prompts, output=tmp_path / "loaded", **how)  # type: ignore[arg-type]
    assert loaded.result("light").base == pytest.approx(light.base, abs=2e-3)
    assert loaded.result("light").tuned == pytest.approx(light.tuned, abs=2e-3)
