"""MPS: published files in our towers against transformers' CLIP and written-out formulas."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

from reward_models import backbones, mps  # noqa: E402
from reward_models.backbones import tower_config  # noqa: E402
from reward_models.base import RewardError, RewardInfo, Scores  # noqa: E402
from reward_models.clip_tower import ClipTower  # noqa: E402
from reward_models.cross_attention import CrossModel, cross_model_from  # noqa: E402
from reward_models.mps import CONDITION, MPSReward, load_mps, mps_from_tensors  # noqa: E402
from reward_models.table import ROWS, LoadOptions, Row  # noqa: E402
from reward_models.weights import WeightFile  # noqa: E402

# CLIP-H's own code and the published network's, at a size that runs in milliseconds.
D, HEADS, HEAD_DIM, LAYERS = 24, 2, 6, 2
CONFIG: dict[str, Any] = {
    "embed_dim": D,
    "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}
INFO = RewardInfo("mps", "image", True, "", "", "", needs_prompt=True)
FILE = Path("mps.pth")
PROMPTS = [
    "a red circle",
    "two cats on a mat, oil painting",
    "hands, face and hair",
    "a red circle",
]

Tensors = dict[str, Tensor]


def randomised(module: nn.Module, generator: torch.Generator) -> None:
    """Every part of it counts: no shift of zero, no scale of one."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn + float("norm" in name and name.endswith("weight"))
        elif parameter.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1.5 * drawn / parameter[0].numel() ** 0.5


@pytest.fixture(scope="module")
def clip() -> Any:
    """transformers' CLIP in float64, the class whose keys the published files have."""
    common = {"hidden_act": "gelu", "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **common,
            "hidden_size": 16,
            "intermediate_size": 64,
            "vocab_size": 49408,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        vision_config={
            **common,
            "hidden_size": 32,
            "intermediate_size": 128,
            "image_size": 24,
            "patch_size": 8,
        },
        projection_dim=D,
    )
    with torch.random.fork_rng():
        model = transformers.CLIPModel(config).eval()
    randomised(model, torch.Generator().manual_seed(2))
    model.logit_scale.data = torch.tensor(1.25)
    # One strong direction, along which tokens differ: matches spread from 0 to their maximum.
    model.text_projection.weight.data[0] *= 5
    return model.double()


@pytest.fixture(scope="module")
def network() -> Tensors:
    with torch.random.fork_rng():
        model = CrossModel(D, LAYERS, HEADS, HEAD_DIM, 2)
    randomised(model, torch.Generator().manual_seed(3))
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def published(clip: Any, network: Tensors) -> Tensors:
    """The flat layout: transformers' keys and the network's."""
    flat = {f"model.{key}": tensor.float() for key, tensor in clip.state_dict().items()}
    return flat | {f"cross_model.{key}": tensor for key, tensor in network.items()}


@pytest.fixture(scope="module")
def build(published: Tensors) -> Callable[..., MPSReward]:
    def make(dtype: torch.dtype = torch.float32, **options: Any) -> MPSReward:
        tower, cross = mps_from_tensors(published, FILE, CONFIG)
        tower.model.to(dtype)
        return MPSReward(INFO, tower, cross.to(dtype), **options)

    return make


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 32, 40, generator=torch.Generator().manual_seed(4))


def fuse(network: Tensors, image: Tensor, text: Tensor) -> Tensor:
    """The network of one picture in float64: [N, D] reads [K, D]; rotations are complex."""
    w = {key: tensor.double() for key, tensor in network.items()}
    position = torch.arange(len(image), dtype=torch.float64)

    def norm(x: Tensor, name: str) -> Tensor:
        return (
            torch.stack([(t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt() for t in x])
            * w[f"{name}.norm.weight"]
        )

    def gated(x: Tensor) -> Tensor:
        value, gate = x.tensor_split(2, dim=-1)
        return value * gate * gate.sigmoid()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        answers = []
        for head in range(HEADS):
            scores = torch.einsum("nd,kd->nk", q[:, head], k) / HEAD_DIM**0.5
            answers.append((scores.exp() / scores.exp().sum(1, keepdim=True)) @ v)
        return torch.cat(answers, dim=-1)

    def turned(x: Tensor) -> Tensor:
        half = HEAD_DIM // 2
        speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.exp(1j * position[:, None] * speed)
        z = torch.complex(x[..., :half], x[..., half:])
        z = z * (turn if x.ndim == 2 else turn[:, None])
        return torch.cat([z.real, z.imag], dim=-1)

    x = image
    for layer in range(LAYERS):
        name = f"layers.{layer}.0.fn"
        n = norm(x, name)
        k, v = (text @ w[f"{name}.to_kv.weight"].T).tensor_split(2, dim=1)
        q = (n @ w[f"{name}.to_q.weight"].T).reshape(len(x), HEADS, HEAD_DIM)
        found = attend(q, k, v) @ w[f"{name}.to_out.weight"].T
        x = x + found + gated(n @ w[f"{name}.ff.0.weight"].T) @ w[f"{name}.ff.2.weight"].T
        name = f"layers.{layer}.1.fn"
        fused = norm(x, name) @ w[f"{name}.fused_attn_ff_proj.weight"].T
        inner = HEADS * HEAD_DIM
        q, k, v, ff = fused.tensor_split((inner, inner + HEAD_DIM, inner + 2 * HEAD_DIM), dim=1)
        q = turned(q.reshape(len(x), HEADS, HEAD_DIM))
        found = attend(q, turned(k), v) @ w[f"{name}.attn_out.weight"].T
        x = x + found + gated(ff) @ w[f"{name}.ff_out.1.weight"].T
    return x


def padded(prompts: list[str]) -> Tensor:
    """open_clip's ids with its padding, 0, replaced by the end token."""
    ids: Tensor = open_clip.tokenize(prompts)
    assert not (ids[:, 1:-1] == 0).logical_and(ids[:, 2:] != 0).any()
    return ids.masked_fill(ids == 0, 49407)


def reference(
    clip: Any, network: Tensors, pixels: Tensor, prompts: list[str], threshold: float
) -> list[float]:
    """The authors' evaluation of one picture after the other, in float64."""
    scores = []
    with torch.no_grad():
        condition = clip.text_projection(clip.text_model(padded([CONDITION])).last_hidden_state)[0]
        for picture, prompt in zip(pixels.double(), prompts, strict=True):
            text = clip.text_model(padded([prompt]))
            tokens = clip.text_projection(text.last_hidden_state)[0]
            end = clip.text_projection(text.pooler_output)[0]
            match = [max(float(token @ other) for other in condition) for token in tokens]
            kept = [s / max(match) > threshold for s in match]
            vision = clip.vision_model(picture[None]).last_hidden_state
            image = clip.visual_projection(vision)[0]
            fused = fuse(network, image, tokens[torch.tensor(kept)])[0]
            cosine = fused @ end / (fused.norm() * end.norm())
            scores.append(float(clip.logit_scale.exp() * cosine))
    return scores


@pytest.mark.parametrize("threshold", [0.3, 0.01, 0.8])
def test_a_score_is_the_authors_formula_at_batch_one(
    clip: Any, network: Tensors, build: Any, images: Tensor, threshold: float
) -> None:
    """Towers in transformers' own code, the fusion written out, both in float64."""
    prompts = [*PROMPTS[:3], "a word of a very long text " * 30]
    reward = build(threshold=threshold)
    expected = reference(clip, network, reward.tower.prepare(images), prompts, threshold)
    found = reward.score(images, prompts)
    assert found.values.dtype == torch.float32
    assert found.values.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1
    assert found.truncated == 1


def test_the_threshold_chooses_among_the_tokens(build: Any, images: Tensor) -> None:
    shares = [build(threshold=t).read(PROMPTS).mask.float().mean() for t in (0.01, 0.3, 0.8)]
    assert 1 >= shares[0] > shares[1] > shares[2] > 0
    low, high = (build(threshold=t).score(images, PROMPTS).values for t in (0.01, 0.3))
    assert (low - high).abs().min() > 1e-3


def test_padding_is_read(build: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build().score(images, PROMPTS).values
    tokenize = ClipTower.tokenize
    monkeypatch.setattr(
        ClipTower,
        "tokenize",
        lambda self, prompts, *, pad=0, cleaning: tokenize(self, prompts, cleaning=cleaning),
    )
    assert (build().score(images, PROMPTS).values - before).abs().min() > 1e-3


def test_batch_mates_do_not_matter(build: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(8, 3, 30, 36, generator=generator)
    prompts = [*PROMPTS, "x", "light, color, clarity", "", "a very large word " * 40]
    reward = build()
    together = reward.score(images, prompts)
    alone = torch.cat([build().score(images[i : i + 1], [prompts[i]]).values for i in range(8)])
    assert torch.allclose(together.values, alone, atol=1e-5)
    assert together.truncated == 1
    # The batch's own maximum belongs to one prompt only, so the reference's scores would move.
    others = [*prompts[:4], *PROMPTS]
    moved = build().score(images, others).values
    assert torch.allclose(moved[:4], alone[:4], atol=1e-5)
    assert (moved[4:] - alone[4:]).abs().min() > 1e-4


def test_the_batch_maximum_would_have_mattered(build: Any) -> None:
    """The reference divides by the maximum over the batch: the test above can fail."""
    reward = build()
    tokens = reward.tower.text_tokens(padded(PROMPTS[:3]))
    match = (tokens @ mps.condition_tokens(reward.tower, CONDITION).T).amax(dim=-1)
    assert (match / match.max() > 0.3).ne(reward.read(PROMPTS[:3]).mask).any()


def test_gradient_equals_finite_differences(build: Any, images: Tensor) -> None:
    reward = build(torch.float64)
    pictures = (0.1 + 0.8 * images[:2].double()).requires_grad_()

    def total(x: Tensor) -> Tensor:
        tokens = reward.tower.image_tokens(reward.tower.prepare(x))
        reading = reward.read(PROMPTS[:2])
        return mps.fused_score(reward.cross, tokens, reading, reward.tower.logit_scale).sum()

    (gradient,) = torch.autograd.grad(total(pictures), pictures)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            slope = (total(pictures + 1e-6 * direction) - total(pictures - 1e-6 * direction)) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


def test_the_gradient_skips_nan_pictures(build: Any, images: Tensor) -> None:
    reward = build()
    whole = reward.score(images, PROMPTS).values
    broken = images.clone()
    broken[1, 0, 3, 3] = float("nan")
    broken.requires_grad_()
    values = reward.score(broken, PROMPTS).values
    assert values.isnan().tolist() == [False, True, False, False]
    assert torch.allclose(values[[0, 2, 3]], whole[[0, 2, 3]], atol=1e-5)
    values[~values.isnan()].sum().backward()
    assert broken.grad is not None and broken.grad.isfinite().all()
    assert [bool(g.abs().sum() > 0) for g in broken.grad] == [True, False, True, True]


def test_a_prompt_without_features_is_not_scored(build: Any, images: Tensor) -> None:
    """Zero features have no maximum to divide by; the reference's softmax gives NaN as well."""
    reward = build()
    text_tokens = reward.tower.text_tokens
    tokens = text_tokens(padded(PROMPTS)) * torch.tensor([1.0, 0, 1, 1])[:, None, None]
    how = (reward.tower.device, reward.tower.dtype)
    reward._condition_tokens[how] = mps.condition_tokens(reward.tower, CONDITION)
    reward.tower.text_tokens = lambda ids: tokens[: len(ids)]
    pictures = images.clone().requires_grad_()
    values = reward.score(pictures, [*PROMPTS[:3], "other"]).values
    assert values.isnan().tolist() == [False, True, False, False]
    values[~values.isnan()].sum().backward()
    assert pictures.grad is not None and pictures.grad.isfinite().all()
    # Attention over nothing is not defined, and not every kernel survives it.
    assert reward.read([PROMPTS[1]]).mask.all()


def test_prompts_are_encoded_once(
    build: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = build()
    encoded: list[int] = []
    text_tokens = reward.tower.text_tokens

    def counted(ids: Tensor) -> Tensor:
        encoded.append(len(ids))
        return text_tokens(ids)

    reward.tower.text_tokens = counted
    first = reward.score(images, PROMPTS).values
    assert encoded == [1, 3]  # the condition, and what differs among four prompts
    assert torch.equal(reward.score(images, PROMPTS).values, first)
    assert encoded == [1, 3]
    reward.score(images, ["new", *PROMPTS[1:]])
    assert encoded == [1, 3, 1]
    monkeypatch.setattr(mps, "REMEMBERED_PROMPTS", 6)
    reward.read([f"prompt {number}" for number in range(4)])
    reward.read([f"another {number}" for number in range(4)])
    kept = ["prompt 2", "prompt 3", *(f"another {number}" for number in range(4))]
    assert [prompt for prompt, *_ in reward._known] == kept
    for reading in reward._known.values():  # not views that keep their whole batch
        assert reading.tokens.untyped_storage().nbytes() == 77 * D * 4


class CLIPModel(nn.Module):
    """The published class's attributes; pickled under the published class's name."""

    def __init__(self, clip: Any, network: Tensors) -> None:
        super().__init__()
        self.model = clip
        self.cross_model = cross_model_from(network, FILE)
        # A cache that is in a pickle and in no state dict.
        own: Any = self.cross_model.layers[0][1].fn  # type: ignore[index]
        own.register_buffer("pos_emb", torch.zeros(10, HEAD_DIM), persistent=False)


@pytest.fixture
def files(
    tmp_path: Path, clip: Any, network: Tensors, published: Tensors, monkeypatch: Any
) -> dict[str, Path]:
    """The three published forms of one model."""
    paths = {name: tmp_path / name for name in ("flat.pth", "module.pth", "mirror.safetensors")}
    positions = {"model.text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(published | positions, paths["flat.pth"])
    save_file(
        {f"mps.{key}": tensor.contiguous() for key, tensor in published.items()},
        paths["mirror.safetensors"],
    )
    module = ModuleType("trainer.models.clip_model")
    module.CLIPModel = CLIPModel  # type: ignore[attr-defined]
    monkeypatch.setattr(CLIPModel, "__module__", module.__name__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trainer", ModuleType("trainer"))
        patch.setitem(sys.modules, "trainer.models", ModuleType("trainer.models"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(CLIPModel(clip, network).float(), paths["module.pth"])
        clip.double()  # the fixture is shared
    monkeypatch.setattr(mps, "tower_config", lambda name: CONFIG)
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path / "home"))
    mps._PUBLISHED_READ.clear()
    return paths


ROW = Row(
    info=INFO,
    target="reward_models.mps:load_mps",
    weights=WeightFile("MPS_overall.pth"),
    settings={"threshold": 0.3, "round_to_uint8": False},
)


def test_the_three_published_files_give_the_same_scores(
    files: dict[str, Path], build: Any, images: Tensor
) -> None:
    expected = build().score(images, PROMPTS).values
    for name, path in files.items():
        scores = load_mps(ROW, LoadOptions(weights=path)).score(images, PROMPTS)
        assert torch.equal(scores.values, expected), name


def test_one_file_is_read_once(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    read_tensors = mps.read_tensors

    def counted(path: Path, **options: Any) -> Tensors:
        read.append(path)
        return read_tensors(path, **options)

    monkeypatch.setattr(mps, "read_tensors", counted)
    options = LoadOptions(weights=files["flat.pth"])
    first, second = load_mps(ROW, options), load_mps(ROW, options)
    other = Row(INFO, ROW.target, ROW.weights, settings={"threshold": 0.01, "round_to_uint8": True})
    third = load_mps(other, options)
    assert read == [files["flat.pth"].resolve()]
    assert first.tower is second.tower is third.tower and first.cross is third.cross
    assert (first.threshold, third.threshold) == (0.3, 0.01)
    assert (first.round_to_uint8, third.round_to_uint8) == (False, True)


def test_the_published_row_is_loaded_with_the_authors_choices(files: dict[str, Path]) -> None:
    reward = load_mps(ROWS["mps"], LoadOptions(weights=files["flat.pth"]))
    assert reward.threshold == 0.3 and not reward.round_to_uint8
    assert reward.condition == CONDITION and CONDITION.endswith("word, things.")
    assert reward.info.needs_prompt and reward.info.differentiable


def test_half_precision_towers_keep_a_float32_network(
    files: dict[str, Path], images: Tensor
) -> None:
    full = load_mps(ROW, LoadOptions(weights=files["flat.pth"])).score(images, PROMPTS).values
    reward = load_mps(ROW, LoadOptions(weights=files["flat.pth"], dtype="bfloat16"))
    half: Scores = reward.score(images, PROMPTS)
    assert reward.tower.dtype == torch.bfloat16
    assert {p.dtype for p in reward.cross.parameters()} == {torch.float32}
    assert half.values.dtype == torch.float32
    assert 0 < (half.values - full).abs().max() < 0.3


def test_a_wrong_checkpoint_is_refused_by_name(
    tmp_path: Path, published: Tensors, files: dict[str, Path]
) -> None:
    def refused(tensors: Tensors, match: str) -> None:
        torch.save(tensors, tmp_path / "wrong.pth")
        mps._PUBLISHED_READ.clear()
        with pytest.raises(RewardError, match=match) as error:
            load_mps(ROW, LoadOptions(weights=tmp_path / "wrong.pth"))
        assert "wrong.pth" in str(error.value)

    clip = {k.removeprefix("model."): v for k, v in published.items() if k.startswith("model.")}
    refused(clip, r"is no MPS checkpoint: it has no model\.\*\s+it looks like a CLIP")
    refused(
        {f"model.{k}": v for k, v in clip.items()}, r"no cross_model\.\*\s+it looks like a CLIP"
    )
    refused({"layers.0.weight": torch.zeros(1, 768)}, "is no MPS checkpoint")
    refused(published | {"head.weight": torch.zeros(1)}, "MPS has not: head.weight")
    refused(published | {"model.extra": torch.zeros(1)}, "unexpected extra")
    short = dict(published)
    del short["cross_model.layers.1.0.fn.to_q.weight"]
    refused(short, r"missing layers.1.0.fn.to_q.weight")
    short = dict(published)
    del short["model.vision_model.post_layernorm.weight"]
    refused(short, r"missing visual.ln_post.weight")


def test_network_and_tower_must_be_of_one_width(build: Any, network: Tensors) -> None:
    with torch.device("meta"):
        wide = CrossModel(D + 2, 1, 2, 4, 2)
    with pytest.raises(RewardError, match="reads tokens of 26, the tower gives 24"):
        MPSReward(INFO, build().tower, wide)


@pytest.mark.parametrize("threshold", [1.0, -0.1, float("nan")])
def test_a_threshold_that_makes_no_sense_is_refused(build: Any, threshold: float) -> None:
    with pytest.raises(RewardError, match="threshold is"):
        build(threshold=threshold)


@pytest.mark.parametrize("condition", ["", "  ", "word " * 80])
def test_a_condition_that_cannot_be_read_whole_is_refused(build: Any, condition: str) -> None:
    with pytest.raises(RewardError, match="condition is empty or longer than 77 tokens"):
        build(condition=condition)


def test_another_condition_gives_another_score(build: Any, images: Tensor) -> None:
    whole = build(threshold=0.5).score(images, PROMPTS).values
    other = build(threshold=0.5, condition="a red circle").score(images, PROMPTS).values
    assert (whole - other).abs().max() > 1e-3


@pytest.mark.parametrize("prefix", ["", "mps."])
def test_full_size_files_have_the_published_keys(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,104.6 million numbers on the meta device: CLIP-H in transformers' keys and 52 more."""
    common = {"hidden_act": "gelu", "num_attention_heads": 16}
    config = transformers.CLIPConfig(
        text_config={
            **common,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
        },
        vision_config={
            **common,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "patch_size": 14,
        },
        projection_dim=1024,
    )
    monkeypatch.setattr(backbones, "_refuse_unfilled", lambda model: None)
    with torch.device("meta"):
        clip, cross = transformers.CLIPModel(config), CrossModel()
        file = {f"{prefix}model.{k}": v for k, v in clip.state_dict().items()}
        file |= {f"{prefix}cross_model.{k}": v for k, v in cross.state_dict().items()}
        assert round(sum(v.numel() for v in file.values()) / 1e6, 1) == 1104.6
        assert len([key for key in file if "cross_model" in key]) == 52
        # Strict: nothing is missing, left over or of another shape.
        tower, network = mps_from_tensors(file, FILE, tower_config("clip-h"))
    assert sum(p.numel() for p in tower.model.parameters()) == 986_109_441
    assert (tower.width, tower.image_size, network.dim) == (1024, 224, 1024)


def test_prompts_are_read_without_ftfy(build: Any, images: Tensor) -> None:
    """An HTML entity stays what was typed, as in the tokenizer that the authors use."""
    reward = build()
    assert not torch.equal(reward.read(["a &amp; b"]).tokens, reward.read(["a & b"]).tokens)
    # Typed out with blanks, so that ftfy and html leave it alone as well: the same words.
    assert torch.equal(reward.read(["a &amp; b"]).tokens, reward.read(["a & amp ; b"]).tokens)


def test_autocast_changes_no_score(build: Any, images: Tensor) -> None:
    plain = build().score(images, PROMPTS).values
    reward = build()
    with torch.autocast("cpu", torch.bfloat16):
        cast = reward.score(images, PROMPTS).values
    assert cast.dtype == torch.float32
    assert torch.allclose(cast, plain, atol=1e-5)
    assert torch.allclose(reward.score(images, PROMPTS).values, plain, atol=1e-5)


def test_what_inference_mode_loaded_and_read_gives_gradients_later(
    files: dict[str, Path], images: Tensor
) -> None:
    with torch.inference_mode():
        load_mps(ROW, LoadOptions(weights=files["flat.pth"])).score(images, PROMPTS)
        reward = load_mps(ROW, LoadOptions(weights=files["flat.pth"]))
        reward.score(images, PROMPTS)
    pictures = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward.score(pictures, PROMPTS).values.sum(), pictures)
    assert slope.isfinite().all() and slope.abs().max() > 0


def test_a_moved_tower_reads_its_prompts_again(build: Any, images: Tensor) -> None:
    reward = build()
    reward.score(images, PROMPTS)
    reward.tower.model.double()
    assert reward.read(PROMPTS).tokens.dtype == torch.float64
    fresh = build(torch.float64).read(PROMPTS).tokens
    assert torch.allclose(reward.read(PROMPTS).tokens, fresh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"dtype": "float8"}, {"device": "gpu"}])
def test_unknown_options_are_refused_before_the_file_is_touched(
    options: dict[str, str], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[object] = []
    monkeypatch.setattr(mps, "locate", lambda *path: touched.append(path))
    with pytest.raises(RewardError, match=r"unknown (dtype|device)"):
        load_mps(ROW, LoadOptions(weights=files["flat.pth"], **options))
    assert not touched
