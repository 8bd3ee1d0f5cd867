"""CLIP towers and pixels to scores: the one module here that imports open_clip."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

open_clip = pytest.importorskip("open_clip")

from reward_models import aesthetic, backbones, trained, weights  # noqa: E402
from reward_models.aesthetic import AestheticReward, head_from_tensors  # noqa: E402
from reward_models.backbones import build_tower, load_tower, torch_device  # noqa: E402
from reward_models.base import RewardError, RewardInfo  # noqa: E402
from reward_models.catalogue import ROWS, TOWERS, load  # noqa: E402
from reward_models.preprocess import clip_pixels, shortest_edge_crop  # noqa: E402

# ViT-L/14's own code at a size that runs in milliseconds.
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}
WIDTHS = (24, 20, 16, 12, 8, 1)


@pytest.fixture(scope="module")
def reference() -> Any:
    """open_clip's own model, built its own way."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return open_clip.CLIP(**CONFIG).eval()


@pytest.fixture(scope="module")
def head_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for index, before, after in zip((0, 3, 6, 9, 11), WIDTHS[:-1], WIDTHS[1:], strict=True):
        tensors[f"layers.{index}.weight"] = torch.randn(after, before, generator=generator) / 3
        tensors[f"layers.{index}.bias"] = torch.randn(after, generator=generator) / 3
    return tensors


@pytest.fixture
def assets(tmp_path: Path, reference: Any, head_tensors: Any, monkeypatch: Any) -> Path:
    """An assets folder as it is shipped: fp16, sparse token table, sums, JSON config."""
    state = {key: tensor.half() for key, tensor in reference.state_dict().items()}
    table = state.pop("token_embedding.weight")
    rows = torch.arange(0, 49408, 7, dtype=torch.int32)
    state["token_embedding.rows"], state["token_embedding.values"] = rows, table[rows.long()]
    save_file(state, tmp_path / "tiny-clip.safetensors")
    tower = build_tower(CONFIG, {key: tensor.float() for key, tensor in state.items()}, Path("a"))
    card = trained.Card(
        "tiny-aesthetic",
        head="regression",
        tower="tiny-clip",
        tower_values=trained.fingerprint(tower),
        layers="relu",
    )
    head = {f"head.{key}": tensor for key, tensor in head_tensors.items()}
    trained.write_trained(tmp_path / "tiny-aesthetic.safetensors", card, head, "float16")
    (tmp_path / "tiny-clip.json").write_text(json.dumps(CONFIG))
    sums = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tmp_path.glob("*.safetensors")
    }
    (tmp_path / "SHA256SUMS").write_text(json.dumps(sums))
    monkeypatch.setattr(weights.files, "ASSETS", tmp_path)
    monkeypatch.setattr(backbones, "ASSETS", tmp_path)
    forget()
    return tmp_path


def forget() -> None:
    """A fresh process as far as loaded weights go."""
    backbones._TOWERS_READ.clear()
    trained.REWARDS_READ.clear()
    aesthetic.HEADS_READ.clear()


def reward(reference: Any, head_tensors: Any, dtype: torch.dtype) -> AestheticReward:
    tower = build_tower(CONFIG, reference.state_dict(), Path("a"))
    tower.model.to(dtype)
    head = head_from_tensors(head_tensors, Path("b"))
    return AestheticReward(ROWS["tiny-aesthetic"].info, tower, head)


def test_a_tower_equals_open_clips_own_model(reference: Any) -> None:
    tower = build_tower(CONFIG, reference.state_dict(), Path("a"))
    pixels = torch.randn(3, 3, 32, 32)
    prompts = ["a red circle", "two cats", "x " * 200]
    tokens = open_clip.tokenize(prompts)
    with torch.no_grad():
        assert torch.equal(tower.image_features(pixels), reference.encode_image(pixels))
        texts = reference.encode_text(tokens)
    assert torch.allclose(tower.text_features(prompts), texts, atol=1e-5)
    assert (tower.image_size, tower.width) == (32, 24)


def test_building_a_tower_draws_no_random_numbers(reference: Any) -> None:
    before = torch.get_rng_state()
    build_tower(CONFIG, reference.state_dict(), Path("a"))
    assert torch.equal(torch.get_rng_state(), before)


def test_preprocessing_is_open_clips_up_to_one_level(photo) -> None:  # type: ignore[no-untyped-def]
    transform = open_clip.image_transform(32, is_train=False)
    for shape in [(64, 64), (50, 70), (91, 47), (33, 32), (32, 40), (47, 200)]:
        pixels = photo(*shape)
        theirs = transform(Image.fromarray(pixels))
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255
        assert (clip_pixels(image, 32)[0] - theirs).abs().max() < 0.0156, shape
        exact = clip_pixels(image, 32, round_to_uint8=True)[0]
        assert (exact - theirs).abs().mean() < 1e-4, shape


def test_parity_mode_scores_what_open_clips_own_pipeline_does(  # type: ignore[no-untyped-def]
    photo, reference: Any, head_tensors: Any
) -> None:
    plain = reward(reference, head_tensors, torch.float32)
    exact = AestheticReward(plain.info, plain.tower, plain.head, round_to_uint8=True)
    transform = open_clip.image_transform(32, is_train=False)
    pixels = [photo(64, 64, seed=seed) for seed in range(4)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        theirs = plain.score_embeddings(
            reference.encode_image(torch.stack([transform(Image.fromarray(p)) for p in pixels]))
        )
        error, parity_error = (
            (scorer.score(images, [""] * 4).values - theirs).abs().max()
            for scorer in (plain, exact)
        )
    assert parity_error < error / 3


def test_the_sparse_token_table_becomes_dense(assets: Path, reference: Any) -> None:
    table = load_tower("tiny-clip").model.token_embedding.weight
    full = reference.token_embedding.weight
    assert table.shape == full.shape
    assert torch.allclose(table[::7], full[::7], atol=1e-3)
    assert table[1:7].abs().sum() == 0


@pytest.mark.parametrize(
    ("rows", "values"),
    [([0, 1], 3), ([0, 49408], 2), ([-1, 1], 2), ([0, 1], None)],
)
def test_a_broken_token_table_is_refused(
    reference: Any, rows: list[int], values: int | None
) -> None:
    state = dict(reference.state_dict())
    del state["token_embedding.weight"]
    state["token_embedding.rows"] = torch.tensor(rows, dtype=torch.int32)
    if values is not None:
        state["token_embedding.values"] = torch.zeros(values, 16)
    with pytest.raises(RewardError, match=r"token_embedding.rows"):
        build_tower(CONFIG, state, Path("a"))


def test_a_file_of_another_model_is_refused(reference: Any) -> None:
    state = dict(reference.state_dict())
    del state["visual.proj"]
    with pytest.raises(RewardError, match=r"missing visual.proj"):
        build_tower(CONFIG, state, Path("a"))
    with pytest.raises(RewardError, match="size mismatch"):
        build_tower({**CONFIG, "embed_dim": 12}, reference.state_dict(), Path("a"))


def test_a_head_of_another_width_is_refused(reference: Any) -> None:
    tower = build_tower(CONFIG, reference.state_dict(), Path("a"))
    head = head_from_tensors({"weight": torch.ones(1, 8), "bias": torch.ones(1)}, Path("b"))
    with pytest.raises(RewardError, match="embeddings of 8, the tower gives 24"):
        AestheticReward(RewardInfo("x", "image", True, "", "", ""), tower, head)


def test_gradient_equals_finite_differences(reference: Any, head_tensors: Any) -> None:
    scorer = reward(reference, head_tensors, torch.float64)
    scorer.head.double()
    images = 0.2 + 0.6 * torch.rand(2, 3, 40, 44, dtype=torch.float64)
    images.requires_grad_()

    def score(x: Tensor) -> Tensor:
        return scorer.score_embeddings(scorer.embed(x)).sum()

    (gradient,) = torch.autograd.grad(score(images), images)
    assert gradient.abs().sum() > 0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        step = 1e-5 * direction
        with torch.no_grad():
            slope = (score(images + step) - score(images - step)) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_the_gradient_skips_nan_pictures(reference: Any, head_tensors: Any) -> None:
    scorer = reward(reference, head_tensors, torch.float32)
    images = torch.rand(3, 3, 32, 32)
    whole = scorer.score(images, [""] * 3).values
    broken = images.clone()
    broken[1, 0, 3, 3] = float("nan")
    broken.requires_grad_()
    values = scorer.score(broken, [""] * 3).values
    assert values.isnan().tolist() == [False, True, False]
    assert torch.allclose(values[[0, 2]], whole[[0, 2]], atol=1e-6)
    values[~values.isnan()].sum().backward()
    assert broken.grad is not None and broken.grad.isfinite().all()
    assert broken.grad[1].abs().sum() == 0 and broken.grad[0].abs().sum() > 0
    assert scorer.score(broken[1:2], [""]).values.isnan().all()


def test_a_file_scores_like_its_tensor_whatever_the_batch(
    reference: Any, head_tensors: Any
) -> None:
    scorer = reward(reference, head_tensors, torch.float32)
    images = torch.rand(5, 3, 48, 36)
    together = scorer.score(images, [""] * 5).values
    alone = torch.cat([scorer.score(images[i : i + 1], [""]).values for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_half_precision_towers_keep_a_float32_head(assets: Path) -> None:
    images = torch.rand(4, 3, 32, 32)
    full = load("tiny-aesthetic").score(images, [""] * 4).values
    scorer = load("tiny-aesthetic", dtype="bfloat16")
    half = scorer.score(images, [""] * 4).values
    assert scorer.tower.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert scorer.head.layers[0].weight.dtype == torch.float32  # type: ignore[attr-defined]
    assert half.dtype == torch.float32 and torch.allclose(half, full, atol=0.1)
    with pytest.raises(RewardError, match="unknown dtype 'float31'"):
        load("tiny-aesthetic", dtype="float31")


def test_each_weight_file_is_opened_once_and_towers_are_shared(
    assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    load_file = safetensors.torch.load_file

    def counted(path: Path, device: str) -> dict[str, Tensor]:
        opened.append(Path(path).name)
        return load_file(path, device=device)

    monkeypatch.setattr(safetensors.torch, "load_file", counted)
    first, second = load("tiny-aesthetic"), load("tiny-aesthetic", needs_gradient=True)
    assert sorted(opened) == ["tiny-aesthetic.safetensors", "tiny-clip.safetensors"]
    own = load("tiny-aesthetic", tower=assets / "tiny-clip.safetensors")
    assert opened.count("tiny-clip.safetensors") == 1  # however the file is named
    assert first.tower is second.tower  # type: ignore[attr-defined]
    assert own.tower is first.tower  # type: ignore[attr-defined]
    assert not any(p.requires_grad for p in first.tower.model.parameters())  # type: ignore[attr-defined]


def test_a_damaged_embedded_tower_is_named(assets: Path) -> None:
    path = assets / "tiny-clip.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RewardError, match=r"tiny-clip.safetensors: sha256"):
        load("tiny-aesthetic")


def test_a_users_own_head_and_tower_are_taken(
    assets: Path, tmp_path: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOWERS, "clip-l", TOWERS["tiny-clip"])
    torch.save({"weight": torch.zeros(1, 24), "bias": torch.tensor([2.5])}, tmp_path / "my.pth")
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "clip.pt")
    scorer = load("aesthetic-v1", weights=tmp_path / "my.pth", tower=tmp_path / "clip.pt")
    assert scorer.score(torch.rand(2, 3, 20, 20), ["", ""]).values.tolist() == [2.5, 2.5]


def test_openais_archive_is_read_like_the_plain_file(reference: Any, tmp_path: Path) -> None:
    class Stored(torch.nn.Module):
        """The archive's form: half weights and three numbers beside them."""

        def __init__(self) -> None:
            super().__init__()
            self.visual, self.transformer = reference.visual, reference.transformer
            self.token_embedding, self.ln_final = reference.token_embedding, reference.ln_final
            self.positional_embedding = reference.positional_embedding
            self.text_projection, self.logit_scale = (
                reference.text_projection,
                reference.logit_scale,
            )
            for name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, torch.tensor(3))

        def forward(self, pixels: Tensor) -> Tensor:
            return pixels

    path = tmp_path / "ViT.pt"
    traced = torch.jit.trace(Stored().eval(), torch.zeros(1, 3, 32, 32))
    torch.jit.save(traced, str(path))
    with pytest.raises(RewardError, match="is a TorchScript archive"):
        weights.read_tensors(path)
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    tower = build_tower(CONFIG, weights.read_tensors(path, archive_sha256=known), path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(tower.image_features(pixels), reference.encode_image(pixels))


def test_the_full_size_layout_is_vit_l_14_with_quick_gelu() -> None:
    """The published file's keys, without its memory: 427,616,513 parameters."""
    config = backbones._config("ViT-L-14-quickgelu")
    assert config["quick_gelu"] is True
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 427_616_513
    assert model.visual.image_size in (224, (224, 224)) and model.text_projection.shape[1] == 768


def test_a_missing_tower_comes_with_its_command(
    published,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    import huggingface_hub

    forget()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path))
    command = "hf download timm/vit_large_patch14_clip_224.openai open_clip_model.safetensors"
    with pytest.raises(RewardError, match=command):
        load("aesthetic", weights=published("aesthetic/sac+logos+ava1-l14-linearMSE.pth"))


def test_shortest_edge_crop_is_torchvisions(photo) -> None:  # type: ignore[no-untyped-def]
    """Sizes and margins: a one-pixel shift would show on a ramp."""
    functional = sys.modules["torchvision.transforms.functional"]
    for height in range(17, 60, 3):
        for width in range(17, 60, 5):
            ramp = torch.rand(1, 3, height, width)
            resized = functional.resize(ramp, 16, functional.InterpolationMode.BICUBIC)
            cropped = functional.center_crop(resized, [16, 16]).clamp(0, 1)
            assert (shortest_edge_crop(ramp, 16) - cropped).abs().mean() < 0.01, (height, width)


def test_threads_and_names_of_one_file_share_one_read(
    assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    read_tensors = backbones.read_tensors

    def counted(path: Path, **options: Any) -> Any:
        read.append(path)
        return read_tensors(path, **options)

    monkeypatch.setattr(backbones, "read_tensors", counted)
    path = assets / "tiny-clip.safetensors"
    (assets / "link.safetensors").symlink_to(path)
    ways: list[dict[str, Any]] = [
        {},
        {"given": path},
        {"given": str(assets / "link.safetensors")},
        {"device": "cpu:0"},
    ]
    with ThreadPoolExecutor(4) as pool:
        towers = list(pool.map(lambda way: load_tower("tiny-clip", **way), ways * 2))
    assert len(read) == 1 and len(set(map(id, towers))) == 1
    assert load_tower("tiny-clip", dtype="float64") is not towers[0]


def test_an_overwritten_file_is_read_again(assets: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    state = safetensors.torch.load_file(assets / "tiny-clip.safetensors")
    save_file(state, own)
    old = load_tower("tiny-clip", given=own)
    state["visual.proj"] = state["visual.proj"] * 2
    stamp = own.stat().st_mtime_ns
    own.unlink()
    save_file(state, own)
    os.utime(own, ns=(stamp + 10**9, stamp + 10**9))
    new = load_tower("tiny-clip", given=own)
    assert torch.equal(new.model.visual.proj, 2 * old.model.visual.proj)
    assert load_tower("tiny-clip", given=own) is new


def test_a_tower_loaded_in_inference_mode_gives_gradients_later(assets: Path) -> None:
    with torch.inference_mode():
        tower = load_tower("tiny-clip")
        tower.text_features(["a red circle"])
    images = torch.rand(1, 3, 40, 40).requires_grad_()
    image = tower.embed(images)
    text = tower.text_features(["a red circle"])
    (gradient,) = torch.autograd.grad((image * text).sum(), images)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "vulkan", ""])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(RewardError, match="unknown device"):
        load_tower("tiny-clip", device=name)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RewardError, match="cuda asked for, but torch finds none"):
        load_tower("tiny-clip", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert torch_device("cuda") == torch_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RewardError, match="cuda:2 asked for, but torch finds only 2"):
        torch_device("cuda:2")
