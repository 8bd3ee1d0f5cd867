"""ImageReward from pixels and prompts to scores, on a small model in the published layout."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from reward_models import image_reward
from reward_models.base import RewardError, RewardInfo, require_gradient
from reward_models.image_reward import ImageReward, load_image_reward, model_from_tensors
from reward_models.preprocess import clip_pixels
from reward_models.table import ROWS, LoadOptions, Row
from reward_models.weights import WeightFile
from reward_models.wordpiece import PromptTokenizer, PromptTokens
from tests.reward_models import small_blip as small

FILE = Path("ImageReward.pt")
INFO = RewardInfo("image-reward", "image", True, "-2 to 2", "Apache-2.0", "test", needs_prompt=True)
LONG = " ".join(["dog"] * 60)
PROMPTS = [
    "a red circle",
    "",
    LONG,
    "the large blue square on a white background .",
    "dogs running",
    "a",
    "a red circle",
    "small green triangle above black",
]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = small.random_tensors(small.SMALL, seed=3)
    return loaded


@pytest.fixture(scope="module")
def reward(tensors: dict[str, Tensor]) -> ImageReward:
    return ImageReward(INFO, *model_from_tensors(tensors, FILE), PromptTokenizer(small.WORDS))


@pytest.fixture(scope="module")
def reward64(tensors: dict[str, Tensor]) -> ImageReward:
    """The same in float64, head included, for finite differences."""
    blip, head = model_from_tensors({key: t.double() for key, t in tensors.items()}, FILE)
    return ImageReward(INFO, blip, head.double(), PromptTokenizer(small.WORDS))


def pictures(count: int, height: int = 40, width: int = 52, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator)


def test_scores_are_those_of_the_formula(tensors: dict[str, Tensor], reward: ImageReward) -> None:
    images = pictures(len(PROMPTS))
    tokens = reward.tokenizer(PROMPTS)
    exact = {key: tensor.double() for key, tensor in tensors.items()}
    pixels = clip_pixels(images.double(), 32)
    raw = small.head(exact, small.class_states(exact, pixels, tokens.ids, tokens.mask))
    expected = (raw - 0.16717362830052426) / 1.0333394966054072
    scores = reward.score(images, PROMPTS)
    assert scores.values.dtype == torch.float32
    assert expected.std() > 0.03
    assert (scores.values - expected).abs().max() < 1e-5


def test_both_the_picture_and_the_prompt_count(reward: ImageReward) -> None:
    images = pictures(2)
    here = reward.score(images, ["a red circle"] * 2).values
    there = reward.score(images, ["dogs running"] * 2).values
    assert (here[0] - here[1]).abs() > 1e-3
    assert (here - there).abs().min() > 1e-3


def test_long_prompts_are_counted(reward: ImageReward) -> None:
    assert reward.score(pictures(len(PROMPTS)), PROMPTS).truncated == 1
    assert reward.score(pictures(3), [LONG, "a", LONG]).truncated == 2
    assert reward.score(pictures(1), [" ".join(["dog"] * 33)]).truncated == 0


def test_padding_does_not_take_part(reward64: ImageReward) -> None:
    pixels = clip_pixels(pictures(1).double(), 32)
    tokens = reward64.tokenizer(["a red circle"])
    used = int(tokens.mask.sum())
    short = PromptTokens(tokens.ids[:, :used], tokens.mask[:, :used], 0)
    other = PromptTokens(tokens.ids + 7 * (1 - tokens.mask), tokens.mask, 0)
    padded, bare, filled = (
        reward64.score_pixels(pixels, these).item() for these in (tokens, short, other)
    )
    assert padded == pytest.approx(bare, abs=1e-12)
    assert padded == pytest.approx(filled, abs=1e-12)
    # Without the mask it would.
    seen = PromptTokens(tokens.ids, torch.ones_like(tokens.mask), 0)
    assert abs(padded - reward64.score_pixels(pixels, seen).item()) > 1e-3


def test_a_score_does_not_depend_on_batch_mates(reward: ImageReward) -> None:
    images = pictures(len(PROMPTS))
    together = reward.score(images, PROMPTS).values
    for index, prompt in enumerate(PROMPTS):
        alone = reward.score(images[index : index + 1], [prompt]).values
        assert (alone - together[index]).abs().item() < 1e-5


def test_the_gradient_is_that_of_finite_differences(reward64: ImageReward) -> None:
    """Along random directions, in float64, from the picture on and within [0, 1]."""
    images = (0.3 + 0.4 * pictures(2)).double().requires_grad_()
    tokens = reward64.tokenizer(PROMPTS[:2])

    def total(x: Tensor) -> Tensor:
        scores = reward64.score_pixels(clip_pixels(x, 32), tokens)
        return (scores * torch.tensor([1.0, -2.0], dtype=torch.float64)).sum()

    (gradient,) = torch.autograd.grad(total(images), images)
    for seed in (5, 6, 7):
        way = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad():
            step = 1e-5
            slope = (total(images + step * way) - total(images - step * way)) / (2 * step)
        assert slope.item() == pytest.approx((gradient * way).sum().item(), rel=1e-6)


@pytest.mark.parametrize("round_to_uint8", [False, True])
def test_the_gradient_reaches_the_pixels(tensors: dict[str, Tensor], round_to_uint8: bool) -> None:
    blip, head = model_from_tensors(tensors, FILE)
    tokenizer = PromptTokenizer(small.WORDS)
    made = ImageReward(INFO, blip, head, tokenizer, round_to_uint8=round_to_uint8)
    assert require_gradient(made) is made
    images = pictures(2).requires_grad_()
    made.score(images, PROMPTS[:2]).values.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 1e-6).all()


def test_rounding_is_an_option_that_is_heeded(
    tensors: dict[str, Tensor], reward: ImageReward
) -> None:
    rounded = ImageReward(INFO, reward.blip, reward.head, reward.tokenizer, round_to_uint8=True)
    images = pictures(2)
    exact = (clip_pixels(images, 32), clip_pixels(images, 32, round_to_uint8=True))
    tokens = reward.tokenizer(PROMPTS[:2])
    for scorer, pixels in zip((reward, rounded), exact, strict=True):
        values = scorer.score(images, PROMPTS[:2]).values
        assert torch.allclose(values, scorer.score_pixels(pixels, tokens), atol=1e-6)
    assert not torch.equal(*(s.score(images, PROMPTS[:2]).values for s in (reward, rounded)))


def test_a_picture_with_nan_scores_nan_and_harms_no_other(reward: ImageReward) -> None:
    clean = pictures(4)
    spoilt = clean.clone()
    spoilt[1, 2, 3, 4] = float("nan")
    spoilt.requires_grad_()
    prompts = ["a dog", LONG, "", "red"]
    scores = reward.score(spoilt, prompts)
    assert scores.values.isnan().tolist() == [False, True, False, False]
    assert scores.truncated == 0  # the long prompt's picture was not scored
    expected = reward.score(clean, prompts).values
    kept = [0, 2, 3]
    assert torch.allclose(scores.values[kept], expected[kept], atol=1e-5)
    scores.values.nansum().backward()
    assert spoilt.grad is not None and spoilt.grad.isfinite().all()
    assert spoilt.grad[1].abs().max() == 0 and (spoilt.grad[kept].abs().amax((1, 2, 3)) > 0).all()


def test_nothing_to_score_is_no_error(reward: ImageReward) -> None:
    assert reward.score(torch.full((2, 3, 40, 40), float("nan")), ["a", "b"]).values.isnan().all()
    assert reward.score(torch.zeros(0, 3, 40, 40), []).values.shape == (0,)


def test_the_head_stays_in_float32_beside_half_precision_transformers(
    tensors: dict[str, Tensor], reward: ImageReward
) -> None:
    blip, head = model_from_tensors({key: t.bfloat16() for key, t in tensors.items()}, FILE)
    half = ImageReward(INFO, blip, head, PromptTokenizer(small.WORDS))
    assert {parameter.dtype for parameter in half.head.parameters()} == {torch.float32}
    assert blip.dtype == torch.bfloat16
    assert not any(module.training for module in half.head.modules())
    images = pictures(len(PROMPTS))
    scores, exact = half.score(images, PROMPTS).values, reward.score(images, PROMPTS).values
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().max() < 0.1


def test_autocast_reaches_neither_the_transformers_nor_the_head(reward: ImageReward) -> None:
    images = pictures(len(PROMPTS))
    expected = reward.score(images, PROMPTS).values
    pixels, tokens = clip_pixels(images, 32), reward.tokenizer(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward.score(images, PROMPTS).values
        rough = reward.head(reward.blip.class_states(pixels, tokens)).float()
    assert scores.dtype == torch.float32 and (scores - expected).abs().max() < 1e-5
    # Without care it would.
    rough = (rough - image_reward.MEAN) / image_reward.DEVIATION
    assert (rough - expected).abs().max() > 1e-4


# ---- files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp.layers.6.bias": None}, r"missing mlp\.layers\.6\.bias"),
        ({"mlp.layers.9.bias": torch.zeros(1)}, r"unexpected mlp\.layers\.9\.bias"),
        ({"temperature": torch.zeros(1)}, "unexpected temperature"),
        ({"blip.itm_head.weight": torch.zeros(1)}, r"unexpected blip\.itm_head\.weight"),
    ],
)
def test_a_key_too_few_or_too_many_is_named(
    tensors: dict[str, Tensor], change: dict[str, Tensor | None], message: str
) -> None:
    changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(RewardError, match=message):
        model_from_tensors(changed, FILE)


def test_blip_without_a_head_is_recognised(tensors: dict[str, Tensor]) -> None:
    bare = {key.removeprefix("blip."): value for key, value in tensors.items()}
    with pytest.raises(RewardError, match="no ImageReward checkpoint; it looks like a BLIP"):
        model_from_tensors(bare, FILE)


def test_another_scorers_checkpoint_is_refused() -> None:
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        other = CLIPModel(CLIPConfig()).state_dict()
    with pytest.raises(RewardError, match=r"no ImageReward checkpoint; it looks like .*CLIP"):
        model_from_tensors(other, FILE)
    with pytest.raises(RewardError, match="no ImageReward checkpoint"):
        model_from_tensors({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, FILE)


def test_parts_of_different_models_are_refused(
    tensors: dict[str, Tensor], reward: ImageReward
) -> None:
    with pytest.raises(RewardError, match="the vocabulary has 44 words, the model 45"):
        ImageReward(INFO, reward.blip, reward.head, PromptTokenizer(small.WORDS[:-1]))
    narrow = replace(small.SMALL, head=(64, 32, 24, 16, 8, 1))
    _, head = model_from_tensors(small.random_tensors(narrow, seed=1), FILE)
    with pytest.raises(RewardError, match="takes states of 64, BERT gives 128"):
        ImageReward(INFO, reward.blip, head, reward.tokenizer)


@pytest.fixture
def files(tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder with a small ImageReward.pt and its vocabulary; every cache is empty."""
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    folder = tmp_path / "mine"
    folder.mkdir()
    ids = torch.arange(40)[None]  # in the published file, and of no use
    torch.save({**tensors, "blip.text_encoder.embeddings.position_ids": ids}, folder / "small.pt")
    (folder / "vocab.txt").write_text("\n".join(small.WORDS) + "\n", encoding="utf-8")
    image_reward.MODELS_READ.clear()
    image_reward.TOKENIZERS_READ.clear()
    return folder


def row(**settings: object) -> Row:
    published = ROWS["image-reward"]
    # A small model's vocabulary has not the published sum.
    words = WeightFile("bert-base-uncased-vocab.txt", files=("vocab.txt",), repo="nobody/nothing")
    return replace(published, extra=(words,), settings={"round_to_uint8": False, **settings})


def test_loading_from_files_gives_the_same_scores(files: Path, reward: ImageReward) -> None:
    loaded = load_image_reward(row(), LoadOptions(weights=files / "small.pt"))
    images = pictures(3)
    expected = reward.score(images, PROMPTS[:3]).values
    assert torch.allclose(loaded.score(images, PROMPTS[:3]).values, expected, atol=1e-6)
    assert loaded.info.needs_prompt and loaded.info.differentiable


def test_each_file_is_read_once_for_two_loads(files: Path, monkeypatch: Any) -> None:
    read: list[Path] = []
    for name in ("read_tensors", "read_vocabulary"):
        real = getattr(image_reward, name)

        def counted(path: Path, real: Any = real) -> Any:
            read.append(path)
            return real(path)

        monkeypatch.setattr(image_reward, name, counted)
    options = LoadOptions(weights=files / "small.pt")
    first, second = load_image_reward(row(), options), load_image_reward(row(), options)
    rounded = load_image_reward(row(round_to_uint8=True), options)
    for made in (first, second, rounded):
        made.score(pictures(2), PROMPTS[:2])
    assert sorted(path.name for path in read) == ["small.pt", "vocab.txt"]
    assert first.blip is second.blip is rounded.blip
    assert rounded.round_to_uint8 and not first.round_to_uint8


def test_the_dtype_is_that_of_the_transformers(files: Path) -> None:
    loaded = load_image_reward(row(), LoadOptions(dtype="bfloat16", weights=files / "small.pt"))
    assert loaded.blip.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.head.parameters()} == {torch.float32}
    with pytest.raises(RewardError, match="unknown dtype 'half'"):
        load_image_reward(row(), LoadOptions(dtype="half", weights=files / "small.pt"))


def test_a_vocabulary_that_cannot_be_had_names_the_command(files: Path) -> None:
    (files / "vocab.txt").unlink()
    with pytest.raises(RewardError, match=r"hf download nobody/nothing vocab\.txt"):
        load_image_reward(row(), LoadOptions(weights=files / "small.pt"))


def test_of_another_models_file_is_told_before_of_a_vocabulary(files: Path) -> None:
    (files / "vocab.txt").unlink()
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, files / "v1.pth")
    with pytest.raises(RewardError, match="no ImageReward checkpoint; it looks like a LAION"):
        load_image_reward(row(), LoadOptions(weights=files / "v1.pth"))


def test_a_model_that_was_loaded_in_inference_mode_can_be_back_propagated_through(
    files: Path,
) -> None:
    options = LoadOptions(weights=files / "small.pt")
    with torch.inference_mode():
        load_image_reward(row(), options)
    loaded = load_image_reward(row(), options)
    images = pictures(1).requires_grad_()
    loaded.score(images, PROMPTS[:1]).values.sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


def test_four_threads_read_each_file_once(files: Path, monkeypatch: Any) -> None:
    read: list[str] = []
    for name in ("read_tensors", "read_vocabulary"):
        real = getattr(image_reward, name)

        def slow(path: Path, real: Any = real) -> Any:
            read.append(path.name)
            time.sleep(0.05)
            return real(path)

        monkeypatch.setattr(image_reward, name, slow)
    start = Barrier(4)

    def load_one(_: int) -> ImageReward:
        start.wait()
        return load_image_reward(row(), LoadOptions(weights=files / "small.pt"))

    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load_one, range(4)))
    assert sorted(read) == ["small.pt", "vocab.txt"]
    assert all(each.blip is loaded[0].blip for each in loaded)


def test_a_changed_checkpoint_is_read_again(files: Path, tensors: dict[str, Tensor]) -> None:
    options = LoadOptions(weights=files / "small.pt")
    before = load_image_reward(row(), options).score(pictures(1), ["a"]).values
    torch.save({**tensors, "mlp.layers.7.bias": torch.full((1,), 5.0)}, files / "small.pt")
    after = load_image_reward(row(), options).score(pictures(1), ["a"]).values
    moved = (5 - tensors["mlp.layers.7.bias"].item()) / 1.0333394966054072
    assert (after - before).item() == pytest.approx(moved, abs=1e-4)


def test_an_unknown_device_is_refused_in_words(files: Path) -> None:
    with pytest.raises(RewardError, match="gpu7"):
        load_image_reward(row(), LoadOptions(device="gpu7", weights=files / "small.pt"))


def test_the_vocabulary_may_lie_in_the_common_folder(files: Path) -> None:
    home = files.parent / "home"
    home.mkdir()
    (files / "vocab.txt").rename(home / "bert-base-uncased-vocab.txt")
    loaded = load_image_reward(row(), LoadOptions(weights=files / "small.pt"))
    assert loaded.tokenizer.vocabulary == loaded.blip.vocabulary


def test_the_table_names_checkpoint_and_vocabulary() -> None:
    published = ROWS["image-reward"]
    assert [file.name for file in published.files] == [
        "ImageReward.pt",
        "bert-base-uncased-vocab.txt",
    ]
    assert published.extra[0].hub_files == ("vocab.txt",)
    assert published.weights is not None
    assert "--revision 5736be03b265" in published.weights.fetch_command()
