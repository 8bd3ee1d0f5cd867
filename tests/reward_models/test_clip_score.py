"""Cosines on a CLIP tower: PickScore against transformers' own CLIP, sharing, batch mates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

open_clip = pytest.importorskip("open_clip")

from reward_models.aesthetic import AestheticHead, AestheticReward  # noqa: E402
from reward_models.backbones import build_tower  # noqa: E402
from reward_models.base import RewardError  # noqa: E402
from reward_models.catalogue import ROWS, load  # noqa: E402
from reward_models.clip_score import CosineReward  # noqa: E402
from reward_models.clip_tower import END, START, ClipTower, one_pass  # noqa: E402

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}
PROMPTS = ["a red circle", "two cats, asleep", "a red circle", "x " * 200]


@pytest.fixture(scope="module")
def huggingface() -> Any:
    """A small random CLIP of transformers, in PickScore's architecture."""
    from transformers import CLIPConfig, CLIPModel

    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = CLIPConfig(
            projection_dim=24,
            text_config={
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 49408,
                "hidden_act": "gelu",
                "bos_token_id": 49406,
                "eos_token_id": 49407,
                "pad_token_id": 49407,
            },
            vision_config={
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "hidden_act": "gelu",
            },
        )
        return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def tower(huggingface: Any) -> ClipTower:
    return build_tower(CONFIG, huggingface.state_dict(), Path("random"))


def images(count: int, side: int = 48, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_pickscore_is_transformers_own_logit(huggingface: Any, tower: ClipTower) -> None:
    reward = CosineReward(ROWS["pickscore"].info, tower, scale=tower.logit_scale)
    batch = images(4)
    ids = open_clip.tokenize(PROMPTS)
    padded = ids.masked_fill((ids == 0), 49407)  # as its tokenizer pads
    with torch.no_grad():
        logits = huggingface(input_ids=padded, pixel_values=tower.prepare(batch)).logits_per_image
        found = reward.score(batch, PROMPTS)
    assert torch.allclose(found.values, logits.diagonal(), atol=1e-4)  # logits of about 10
    assert found.truncated == 1


def test_tokens_before_the_last_norm_are_transformers(huggingface: Any, tower: ClipTower) -> None:
    pixels = tower.prepare(images(2))
    ids = open_clip.tokenize(PROMPTS[:2])
    with torch.no_grad():
        hidden = huggingface.vision_model(pixel_values=pixels).last_hidden_state
        text = huggingface.text_model(input_ids=ids).last_hidden_state
        assert torch.allclose(
            tower.image_tokens(pixels), huggingface.visual_projection(hidden), atol=1e-5
        )
        assert torch.allclose(tower.text_tokens(ids), huggingface.text_projection(text), atol=1e-5)


def test_a_remembered_prompt_is_the_same_and_costs_nothing(tower: ClipTower, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    seen: list[int] = []
    real = tower.encode_text
    monkeypatch.setattr(tower, "encode_text", lambda ids: seen.append(len(ids)) or real(ids))  # type: ignore[func-returns-value]
    tower._texts.clear()
    first = tower.text_features(PROMPTS)
    again = tower.text_features(PROMPTS[::-1])
    assert seen == [3]  # one of the four is a repetition
    assert torch.equal(first.flip(0), again)
    alone = real(tower.tokenize([PROMPTS[1]]).ids)
    assert torch.allclose(alone[0], first[1], atol=1e-5)


def test_two_scorers_share_one_forward_and_one_graph(tower: ClipTower, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    calls: list[int] = []
    real = tower.image_features
    monkeypatch.setattr(tower, "image_features", lambda p: calls.append(len(p)) or real(p))  # type: ignore[func-returns-value]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = AestheticHead((24, 8, 1), relu=False)
    beauty = AestheticReward(ROWS["aesthetic"].info, tower, head)
    match = CosineReward(ROWS["clip"].info, tower)
    batch, prompts = images(2).requires_grad_(), PROMPTS[:2]

    def gradient(*, shared: bool) -> Tensor:
        if shared:
            with one_pass():
                total = beauty.score(batch, prompts).values + match.score(batch, prompts).values
        else:
            total = beauty.score(batch, prompts).values + match.score(batch, prompts).values
        return torch.autograd.grad(total.sum(), batch)[0]

    apart, together = gradient(shared=False), gradient(shared=True)
    assert calls == [2, 2, 2]
    assert torch.allclose(apart, together, atol=1e-6)
    with one_pass(), torch.no_grad():
        beauty.score(batch, prompts)
        changed = batch.detach().clone()
        match.score(changed, prompts)
        changed.zero_()  # the same tensor with other pixels is another picture
        match.score(changed, prompts)
    assert calls == [2] * 6


def test_a_letterboxed_scorer_does_not_take_the_cropped_embedding(tower: ClipTower) -> None:
    wide = images(1)[..., :20, :]
    crop = CosineReward(ROWS["clip"].info, tower)
    box = CosineReward(ROWS["hpsv2"].info, tower, framing="letterbox")
    with torch.no_grad():
        alone = box.score(wide, [""]).values
        with one_pass():
            crop.score(wide, [""])
            assert torch.equal(box.score(wide, [""]).values, alone)


@pytest.mark.parametrize("name", ["tiny-aesthetic", "tiny-clip", "tiny-hps", "tiny-mps"])
def test_a_score_does_not_depend_on_batch_mates(name: str) -> None:
    reward = load(name)
    batch = images(8, side=64)
    prompts = [f"a {size} red circle" for size in ("small", "large")] * 3 + ["x " * 99, ""]
    with torch.no_grad():
        together = reward.score(batch, prompts).values
        alone = [reward.score(batch[i : i + 1], prompts[i : i + 1]).values for i in range(8)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny-aesthetic", "tiny-clip", "tiny-hps", "tiny-mps"])
def test_the_gradient_on_the_pixels_is_the_slope(name: str) -> None:
    reward = load(name, dtype="float64")
    batch = (0.25 + images(1, side=70).double() / 2).requires_grad_()
    prompts = ["a small red circle at the top left on a white background"]
    (slope,) = torch.autograd.grad(reward.score(batch, prompts).values.sum(), batch)
    assert slope.isfinite().all() and slope.abs().max() > 0
    rng = np.random.default_rng(4)
    way = torch.from_numpy(rng.standard_normal(batch.shape))
    way = way / way.norm()
    with torch.no_grad():
        step = 2e-2  # heads answer in float32, so the step cannot be small
        ends = [
            reward.score((batch + sign * step * way).detach(), prompts).values.double()
            for sign in (1, -1)
        ]
    measured = float(ends[0] - ends[1]) / (2 * step)
    assert measured == pytest.approx(float((slope * way).sum()), abs=2e-3, rel=0.05)


def test_an_empty_batch_and_a_nan_picture(tower: ClipTower) -> None:
    reward = CosineReward(ROWS["clip"].info, tower)
    assert reward.score(images(0), []).values.shape == (0,)
    batch = images(3)
    batch[1, 0, 0, 0] = float("nan")
    batch.requires_grad_()
    values = reward.score(batch, PROMPTS[:3]).values
    assert values.isnan().tolist() == [False, True, False]
    (slope,) = torch.autograd.grad(values[[0, 2]].sum(), batch)
    assert slope.isfinite().all() and slope[1].abs().max() == 0


def test_a_prompt_per_picture_is_asked_for(tower: ClipTower) -> None:
    reward = CosineReward(ROWS["clip"].info, tower)
    with pytest.raises(RewardError, match="one string for 2 images"):
        reward.score(images(2), "a cat")


def test_settings_of_the_table_reach_the_scorer() -> None:
    assert load("tiny-clip", settings={"round_to_uint8": True}).round_to_uint8  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="it has: round_to_uint8"):
        load("tiny-clip", settings={"antialias": False})
    with pytest.raises(RewardError, match="not a bool"):
        load("tiny-clip", settings={"round_to_uint8": 1})


@pytest.fixture(scope="module")
def hub_tokenizer() -> Any:
    """transformers' fast CLIP tokenizer on the vocabulary that open_clip ships."""
    from transformers import CLIPTokenizerFast

    ours = open_clip.SimpleTokenizer()
    vocabulary = dict(ours.encoder)
    for name, index in (("<|startoftext|>", START), ("<|endoftext|>", END)):
        vocabulary = {key: i for key, i in vocabulary.items() if i != index} | {name: index}
    return CLIPTokenizerFast(vocab=vocabulary, merges=list(ours.bpe_ranks), model_max_length=77)


ODD_PROMPTS = [
    "a cat’s “big” day",
    "Tom &amp; Jerry",
    "ｆｕｌｌ width",
    "ﬁsh",
    "café",
    "cafe\u0301",
    "a 🐈\u200d⬛ and ❤️",
    "two  blanks,\ttab\nand\u00a0more \u3000",
    "UPPER Case, it's 1234 İΣΑΣ ſ",
    "ÃƒÂ© mojibake…  don't!!",
    "",
    "x " * 99,
]


def test_nfc_cleaning_reads_as_transformers_tokenizer(tower: ClipTower, hub_tokenizer: Any) -> None:
    theirs = hub_tokenizer(
        ODD_PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    found = tower.tokenize(ODD_PROMPTS, pad=END, cleaning="nfc")
    for prompt, ids, expected in zip(ODD_PROMPTS, found.ids, theirs, strict=True):
        assert ids.tolist() == expected.tolist(), prompt
    assert found.truncated == tower.count_truncated(ODD_PROMPTS, cleaning="nfc") == 1


def test_nfc_cleaning_agrees_on_random_unicode(tower: ClipTower, hub_tokenizer: Any) -> None:
    rng = np.random.default_rng(7)
    # Blocks whose letter classes no Unicode version moved: Latin to Hebrew, signs, CJK, emoji.
    points = [*range(0x20, 0x370), *range(0x391, 0x3CA), *range(0x400, 0x500)]
    points += [*range(0x2000, 0x2070), *range(0xFB00, 0xFB07), *range(0x1F600, 0x1F640)]
    prompts = ["".join(map(chr, rng.choice(points, 12))) for _ in range(300)]
    for prompt in prompts:
        found = tower.tokenize([prompt], pad=END, cleaning="nfc").ids[0].tolist()
        expected = hub_tokenizer(prompt).input_ids
        assert found[: len(expected)] == expected[:77], ascii(prompt)


def test_ftfy_cleaning_stays_open_clips_own(tower: ClipTower) -> None:
    assert torch.equal(tower.tokenize(ODD_PROMPTS).ids, open_clip.tokenize(ODD_PROMPTS))
    differ = tower.tokenize(ODD_PROMPTS).ids.ne(tower.tokenize(ODD_PROMPTS, cleaning="nfc").ids)
    assert differ.any(dim=1)[:4].all()  # so the two can be told apart


def test_the_two_cleanings_are_remembered_apart(tower: ClipTower) -> None:
    odd = ["Tom &amp; Jerry"]
    apart = [tower.text_features(odd, cleaning=how) for how in ("ftfy", "nfc", "ftfy", "nfc")]
    assert torch.equal(apart[0], apart[2]) and torch.equal(apart[1], apart[3])
    assert (apart[0] - apart[1]).abs().max() > 1e-3
    pick = CosineReward(ROWS["pickscore"].info, tower, cleaning="nfc")
    with torch.no_grad():
        image = tower.embed(images(1))
        cosine = torch.cosine_similarity(image, apart[1])
        assert torch.allclose(pick.score(images(1), odd).values, cosine, atol=1e-6)


def test_pickscore_reads_prompts_as_its_authors_do(
    tower: ClipTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reward_models import clip_score, hps, pickscore
    from reward_models.table import LoadOptions

    for module in (pickscore, hps, clip_score):
        monkeypatch.setattr(module, "load_tower", lambda *_, **__: tower)
    found = pickscore.load_pickscore(ROWS["pickscore"], LoadOptions())
    assert found.cleaning == "nfc"
    assert hps.load_hps(ROWS["hpsv2"], LoadOptions()).cleaning == "ftfy"
    assert clip_score.load_clip_score(ROWS["clip"], LoadOptions()).cleaning == "ftfy"


def test_pictures_of_inference_mode_share_a_pass(tower: ClipTower, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    calls: list[int] = []
    real = tower.image_features
    monkeypatch.setattr(tower, "image_features", lambda p: calls.append(len(p)) or real(p))  # type: ignore[func-returns-value]
    reward = CosineReward(ROWS["clip"].info, tower)
    with torch.inference_mode():
        batch = images(2).clone()
        assert batch.is_inference()
        with one_pass():
            first = reward.score(batch, PROMPTS[:2]).values
            again = reward.score(batch, PROMPTS[:2]).values
    assert calls == [2] and torch.equal(first, again)


def test_text_remembered_in_inference_mode_takes_part_in_a_gradient(tower: ClipTower) -> None:
    reward = CosineReward(ROWS["clip"].info, tower)
    tower._texts.clear()
    with torch.inference_mode():
        reward.score(images(2), PROMPTS[:2])
    batch = images(2).requires_grad_()
    (slope,) = torch.autograd.grad(reward.score(batch, PROMPTS[:2]).values.sum(), batch)
    assert slope.isfinite().all() and slope.abs().max() > 0


def test_autocast_changes_no_score(tower: ClipTower) -> None:
    reward = CosineReward(ROWS["pickscore"].info, tower, scale=tower.logit_scale)
    plain = reward.score(images(3), PROMPTS[:3]).values
    tower._texts.clear()
    with torch.autocast("cpu", torch.bfloat16):
        cast = reward.score(images(3), PROMPTS[:3]).values
        assert (images(2)[0, 0] @ images(2)[0, 1]).dtype == torch.bfloat16  # it is on
    assert cast.dtype == torch.float32
    assert torch.allclose(cast, plain, atol=1e-5)
    assert torch.allclose(reward.score(images(3), PROMPTS[:3]).values, plain, atol=1e-5)
