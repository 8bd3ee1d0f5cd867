"""HPS against the published package's own model code, and against numbers written down from it.

`pip install --no-deps hpsv2==1.2.0` brings the code (its pins are years old; its wheel lacks the
byte-pair file, which open_clip has). Without it the golden numbers below still hold; with it they
are made anew and compared.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

open_clip = pytest.importorskip("open_clip")

from reward_models.backbones import build_tower  # noqa: E402
from reward_models.catalogue import ROWS  # noqa: E402
from reward_models.clip_score import CosineReward  # noqa: E402

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}
PROMPTS = [
    "A cat with two horns on its head",
    "  Zwei   Hörner, &amp; a hat  ",
    "word " * 100,
    "",
]
# (Their transform fails on a picture whose longer side needs no resize: it then forgets the bars.)
SHAPES = [(48, 48), (40, 72), (91, 33), (36, 20)]
# cos(image, text) of the four pairs by hpsv2 1.2.0's model, tokenizer and transform.
GOLDEN = [-0.053360, 0.350517, 0.102997, -0.187902]


def random_state() -> dict[str, Tensor]:
    """Weights that every version of every library makes alike: NumPy's Philox, scaled by size."""
    rng = np.random.Generator(np.random.Philox(key=20230609))
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in open_clip.CLIP(**CONFIG).state_dict().items()}
    state = {}
    for key in sorted(shapes):
        shape = tuple(shapes[key])
        drawn = rng.standard_normal(shape, dtype=np.float32)
        norm = ".ln_" in key or key.startswith("ln_") or "visual.ln" in key
        scale = 0.1 if norm or len(shape) < 2 else float(np.prod(shape[1:])) ** -0.5
        offset = 1.0 if norm and key.endswith("weight") else 0.0
        state[key] = torch.from_numpy(np.asarray(drawn * scale + offset, dtype=np.float32))
    state["logit_scale"] = torch.tensor(4.6052)
    return state


def pictures() -> list[np.ndarray]:
    rng = np.random.Generator(np.random.Philox(key=7))
    return [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
                (width, height), Image.Resampling.NEAREST
            )
        )
        for height, width in SHAPES
    ]


@pytest.fixture(scope="module")
def reward() -> CosineReward:
    tower = build_tower(CONFIG, random_state(), Path("random"))
    return CosineReward(ROWS["hpsv2"].info, tower, framing="letterbox")


@pytest.fixture(scope="module")
def published() -> Iterator[Any]:
    """hpsv2's vendored open_clip, imported without the package's own needs."""
    found = importlib.util.find_spec("hpsv2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("hpsv2 is not installed (pip install --no-deps hpsv2==1.2.0)")
    root = Path(next(iter(found.submodule_search_locations)))
    added: dict[str, types.ModuleType] = {"turtle": types.ModuleType("turtle")}
    added["turtle"].forward = None  # type: ignore[attr-defined]  # an import by mistake of theirs
    # Its __init__ wants a download library; the model code does not.
    for name, folder in (("hpsv2", root), ("hpsv2.src", root / "src")):
        added[name] = types.ModuleType(name)
        added[name].__path__ = [str(folder)]
    before = set(sys.modules)
    kept = {name: sys.modules.get(name) for name in added}
    sys.modules.update(added)
    real = gzip.open

    def with_open_clips(path: Any, *arguments: Any, **options: Any) -> Any:
        if not Path(path).exists():
            path = Path(open_clip.__file__).parent / Path(path).name
        return real(path, *arguments, **options)

    try:
        gzip.open = with_open_clips  # type: ignore[assignment]
        yield importlib.import_module("hpsv2.src.open_clip")
    finally:
        gzip.open = real
        for name in set(sys.modules) - before | set(added):
            if name in added or name.startswith("hpsv2"):
                sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in kept.items() if module})


def theirs(package: Any) -> Tensor:
    """The four scores by their model, tokenizer and transform."""
    model = package.CLIP(**CONFIG, output_dict=True).eval()
    model.load_state_dict(random_state())
    transform = package.image_transform(32, is_train=False, resize_longest_max=True)
    scores = []
    with torch.no_grad():
        for array, prompt in zip(pictures(), PROMPTS, strict=True):
            image = transform(Image.fromarray(array))[None]
            found = model(image, package.get_tokenizer("ViT-H-14")([prompt]))
            scores.append((found["image_features"] @ found["text_features"].T)[0, 0])
    return torch.stack(scores)


def ours(reward: CosineReward) -> Tensor:
    scores = []
    for array, prompt in zip(pictures(), PROMPTS, strict=True):
        image = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            scores.append(reward.score(image, [prompt]).values[0])
    return torch.stack(scores)


def test_the_score_is_that_of_the_published_package(reward: CosineReward, published: Any) -> None:
    assert (ours(reward) - theirs(published)).abs().max() < 1e-5


def test_the_score_is_that_which_the_published_package_once_gave(reward: CosineReward) -> None:
    found = ours(reward)
    assert (found - torch.tensor(GOLDEN)).abs().max() < 1e-5
    assert found.std() > 1e-3  # four different numbers, or agreement would mean little


def test_the_golden_numbers_are_still_the_packages(published: Any) -> None:
    assert (theirs(published) - torch.tensor(GOLDEN)).abs().max() < 1e-5


def test_features_and_tokens_are_those_of_the_published_package(
    reward: CosineReward, published: Any
) -> None:
    model = published.CLIP(**CONFIG).eval()
    model.load_state_dict(random_state())
    tokens = published.tokenize(PROMPTS)
    assert torch.equal(reward.tower.tokenize(PROMPTS).ids, tokens)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(
            reward.tower.image_features(pixels), model.encode_image(pixels), atol=1e-5
        )
        assert torch.allclose(
            reward.tower.text_features(PROMPTS), model.encode_text(tokens), atol=1e-5
        )


def test_a_full_size_checkpoint_has_the_keys_and_shapes_of_our_tower(published: Any) -> None:
    config = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        mine = open_clip.CLIP(**config).state_dict()
        them = published.CLIP(**published.get_model_config("ViT-H-14")).state_dict()
    assert len(them) == 686
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in them.items()}


def test_without_antialias_the_score_is_that_of_older_torchvision(reward: CosineReward) -> None:
    from torchvision.transforms.v2 import functional

    sharp = CosineReward(reward.info, reward.tower, framing="letterbox", antialias=False)
    array = pictures()[0]
    image = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
    small = functional.resize(
        image,
        [32, 32],
        interpolation=functional.InterpolationMode.BICUBIC,
        antialias=False,
    )
    with torch.no_grad():
        expected = ours_of_pixels(sharp, small, PROMPTS[0])
        found = sharp.score(image, [PROMPTS[0]]).values
        filtered = reward.score(image, [PROMPTS[0]]).values
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found - filtered).abs() > 1e-4


def ours_of_pixels(reward: CosineReward, pixels: Tensor, prompt: str) -> Tensor:
    """The cosine of pixels that need no resize any more, by open_clip's own calls."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    image = reward.tower.model.encode_image((pixels - mean) / std)
    text = reward.tower.model.encode_text(open_clip.tokenize([prompt]))
    return torch.cosine_similarity(image, text)
