"""The page on plug-ins: its code runs as it stands there, on small weights of the same layout."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import reward_models

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plugins.md"


def blocks() -> dict[str, str]:
    """File name -> source of every Python block that begins with its file's name."""
    found = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    return dict(found)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, source in blocks().items():
        (tmp_path / name).write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_the_function_of_the_page_is_a_reward_with_a_gradient(here: Path) -> None:
    reward = reward_models.load("my_rewards:redness", needs_gradient=True, notice=lambda _: None)
    images = torch.zeros(2, 3, 8, 8)
    images[1, 0] = 1
    assert reward.score(images, ["", ""]).values.tolist() == [0, 1]


def test_aesthetic_v25_of_the_page_scores_and_has_a_gradient(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    tower = SiglipVisionModel(config)

    def from_pretrained(name: str, torch_dtype: Any) -> Any:
        assert name == "google/siglip-so400m-patch14-384"
        return tower.to(torch_dtype)

    monkeypatch.setattr(SiglipVisionModel, "from_pretrained", from_pretrained)
    widths = (24, 16, 12, 8, 4, 1)
    head = {}
    for place, (before, after) in zip((0, 2, 4, 6, 8), itertools.pairwise(widths), strict=True):
        head[f"scoring_head.{place}.weight"] = torch.randn(after, before, dtype=torch.bfloat16)
        head[f"scoring_head.{place}.bias"] = torch.randn(after, dtype=torch.bfloat16)
    torch.save(head, here / "aesthetic_predictor_v2_5.pth")
    reward = reward_models.load(
        "aesthetic_v25:AestheticV25", needs_gradient=True, notice=lambda _: None
    )
    images = torch.rand(3, 3, 28, 28)
    images[1, 0, 0, 0] = float("nan")
    values = reward.score(images.requires_grad_(), ["", "", ""]).values
    assert values.isnan().tolist() == [False, True, False]
    # By hand, of the first picture: no resize is needed at this size.
    with torch.no_grad():
        x = tower(pixel_values=(images[:1] - 0.5) / 0.5).pooler_output
        x = x / x.norm()
        for place in (0, 2, 4, 6, 8):
            weight, bias = (
                head[f"scoring_head.{place}.{part}"].float() for part in ("weight", "bias")
            )
            x = x @ weight.T + bias
    assert torch.allclose(values[0], x[0, 0], atol=1e-4)
    (slope,) = torch.autograd.grad(values[[0, 2]].sum(), images)
    assert slope[0].abs().max() > 0 and slope[1].abs().max() == 0
