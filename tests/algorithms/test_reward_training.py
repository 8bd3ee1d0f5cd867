"""Reward training on the small world: every recipe learns, resumes exactly and keeps its best."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import reward_models
from diffusion_align.algorithms.reward_deck import Deck
from diffusion_align.algorithms.reward_options import RewardOptions
from diffusion_align.algorithms.reward_training import RewardTraining
from diffusion_align.data.ava import read_ava
from diffusion_align.data.judgement_files import read_pairs
from diffusion_align.data.judgements import Judgements, Pair, Rating
from diffusion_align.errors import UserError
from diffusion_align.reporting.console import Quiet
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions
from diffusion_align.training.result import TrainResult
from reward_models.backbones import load_tower
from reward_models.plan import RewardPlan
from reward_models.small_world import Crowd, JudgedPairs, judged_pairs

# A crowd that looks at neatness alone, of which tiny-clip's cosine knows next to nothing.
CROWD = Crowd("tidy", 0.0, 0.9, 0.1, noise=0.2, seed=99)
COSINE = RewardPlan("tiny-clip")
CROSS = RewardPlan(
    "tiny-clip", head="cross", cross_layers=1, cross_heads=4, cross_head_dim=16, cross_ff=1
)
LINEAR = RewardPlan("tiny-clip", head="regression")
DROPOUT = RewardPlan("tiny-clip", head="regression", layers="relu", hidden=(32, 16, 8, 8))
HELD_OUT = 160
# 0.5 + 3.8 standard deviations of guessing.
NO_LUCK = 0.65


def as_pairs(judged: JudgedPairs, tie: float = 0.0) -> Judgements:
    """Choices as judgements; opinions less than `tie` apart are ties."""
    near = np.abs(judged.opinion_first - judged.opinion_second) < tie
    labels = np.where(near, 0.5, judged.preferred.astype(float))
    return Judgements.of(
        [
            Pair(caption, first, second, {"overall": float(label)})
            for caption, first, second, label in zip(
                judged.captions, judged.first, judged.second, labels, strict=True
            )
        ]
    )


def as_ratings(judged: JudgedPairs) -> Judgements:
    return Judgements.of(
        [
            Rating(caption, picture, {"overall": float(opinion)})
            for caption, picture, opinion in zip(
                judged.captions, judged.first, judged.opinion_first, strict=True
            )
        ]
    )


@pytest.fixture(scope="module")
def judged() -> tuple[JudgedPairs, JudgedPairs]:
    """Pairs to learn from, and pairs of held-out captions."""
    return judged_pairs(200, 0, "train", CROWD), judged_pairs(HELD_OUT, 0, "heldout", CROWD)


def run(
    training: RewardTraining, folder: Path, steps: int, rate: float = 1e-3, **others: Any
) -> TrainResult:
    resume = others.pop("resume", False)
    options = TrainOptions(steps=steps, learning_rate=rate, **{"checkpoint_every": 0, **others})
    return train(training, options=options, output=folder, resume=resume, reporter=Quiet())


def accuracy(reward: Any, pairs: JudgedPairs) -> float:
    """Share of choices that the reward agrees with, from its scores alone."""
    first, second = (
        reward.score(torch.from_numpy(side).float() / 255, pairs.captions).values
        for side in (pairs.first, pairs.second)
    )
    return float(np.mean((first > second).numpy() == pairs.preferred))


@pytest.mark.parametrize(
    ("plan", "loss", "steps", "rate"),
    [
        (COSINE, "soft-label", 40, 3e-3),
        (replace(COSINE, trains="blocks", image_blocks=1), "soft-label", 16, 1e-3),
        (CROSS, "bradley-terry", 30, 2e-3),
    ],
    ids=["cosine", "cosine, last block", "cross"],
)
def test_pairs_teach_what_the_start_does_not_know(
    plan: RewardPlan,
    loss: Any,
    steps: int,
    rate: float,
    judged: tuple[JudgedPairs, JudgedPairs],
    tmp_path: Path,
) -> None:
    base = load_tower("tiny-clip").model.state_dict()
    before = {key: value.clone() for key, value in base.items()}
    learnt, held_out = judged
    training = RewardTraining(
        plan,
        as_pairs(learnt),
        validation=as_pairs(held_out),
        options=RewardOptions(loss=loss, batch_size=16, validate_every=10),
        trained_on=["small-world:tidy"],
    )
    result = run(training, tmp_path / "run", steps, rate)
    start, best = training.history[0]["accuracy"], training.best
    assert best is not None and best["accuracy"] > max(NO_LUCK, start + 0.05)
    # The file holds the best weights: an independent count over its scores gives the same share.
    reward = reward_models.load(str(result.folder))
    assert accuracy(reward, held_out) == pytest.approx(best["accuracy"], abs=1 / HELD_OUT)
    assert best["accuracy"] == max(entry["accuracy"] for entry in training.history)
    assert all(torch.equal(base[key], value) for key, value in before.items())
    rows = [row for row in result.rows() if "validation/accuracy" in row]
    assert rows[0]["validation/accuracy"] == start and rows[0]["step"] == 1
    record = json.loads((result.folder / "run.json").read_text())
    assert record["trained_on"] == ["small-world:tidy"]


def test_ties_are_modelled_and_told_apart(
    judged: tuple[JudgedPairs, JudgedPairs], tmp_path: Path
) -> None:
    learnt, held_out = (as_pairs(pairs, tie=0.4) for pairs in judged)
    training = RewardTraining(
        replace(DROPOUT, hidden=(64, 32, 16, 8)),
        learnt,
        validation=held_out,
        options=RewardOptions(loss="bradley-terry-ties", validate_every=20),
    )
    run(training, tmp_path, 60, 3e-3)
    best = training.best
    assert best is not None and best["accuracy"] > max(NO_LUCK, training.history[0]["accuracy"])
    labels = held_out.labels()
    ties = (labels == 0.5).float().mean().item()
    assert 0.1 < ties < 0.9
    # Better than to say "tie" always, or never and to guess.
    assert best["accuracy_with_ties"] > max(ties, 0.5 * (1 - ties)) + 0.03
    assert any("labels ties (modelled by this loss)" in line for line in training.describe())


@pytest.mark.parametrize("plan", [LINEAR, DROPOUT], ids=["linear", "layers with dropout"])
def test_ratings_teach_a_regression_head(
    plan: RewardPlan, judged: tuple[JudgedPairs, JudgedPairs], tmp_path: Path
) -> None:
    learnt, held_out = map(as_ratings, judged)
    training = RewardTraining(
        plan, learnt, validation=held_out, options=RewardOptions(validate_every=20)
    )
    result = run(training, tmp_path, 80, 1e-2)
    best = training.best
    assert best is not None and best["correlation"] > training.history[0]["correlation"] + 0.2
    assert best["correlation"] > 0.4  # 5 standard deviations of none
    constant = held_out.labels().std(correction=0).item()
    assert best["rmse"] < constant
    reward = reward_models.load(str(result.folder))
    pictures = torch.stack(held_out.load_pixels(range(HELD_OUT)))
    scores = reward.score(pictures, [""] * HELD_OUT).values.double()
    seen = torch.corrcoef(torch.stack([scores, held_out.labels()[:, 0].double()]))[0, 1]
    assert seen.item() == pytest.approx(best["correlation"], abs=1e-4)


def test_the_recipe_of_ava(judged: tuple[JudgedPairs, JudgedPairs], tmp_path: Path) -> None:
    """Votes by hand, pictures as JPEG files of two sizes, a linear head over the frozen tower."""
    lines = []
    for number in range(200):
        opinion = judged[0].opinion_first[number]
        counts = [0] * 10  # ten people, whose mean is the opinion to a tenth
        low, share = math.floor(opinion), opinion - math.floor(opinion)
        counts[low - 1] += 10 - round(10 * share)
        counts[min(low, 9)] += round(10 * share)
        lines.append(f"{number + 1} {7000 + number} {' '.join(map(str, counts))} 0 0 1")
        picture = Image.fromarray(judged[0].first[number].transpose(1, 2, 0))
        size = (96, 96) if number % 2 else (128, 96)
        picture.resize(size).save(tmp_path / f"{7000 + number}.jpg", quality=95)
    (tmp_path / "AVA.txt").write_text("\n".join(lines))
    learnt, held_out = read_ava(tmp_path / "AVA.txt", tmp_path).split(0.4, 0)
    training = RewardTraining(
        LINEAR, learnt, validation=held_out, options=RewardOptions(validate_every=20)
    )
    result = run(training, tmp_path / "run", 80, 1e-2)
    assert training.best is not None and training.best["correlation"] > 0.4
    reward = reward_models.load(str(result.folder))
    assert type(reward).__name__ == "AestheticReward"
    one = reward_models.read_image(tmp_path / "7000.jpg")[None]
    assert 1 < reward.score(one, [""]).values.item() < 10


def test_the_recipe_of_hps(judged: tuple[JudgedPairs, JudgedPairs], tmp_path: Path) -> None:
    """HPD v2's train.json by hand, pictures that are not square as files, the last blocks."""
    rows = []
    for number, caption in enumerate(judged[0].captions[:96]):
        names = [f"{number}_{side}.png" for side in (0, 1)]
        for name, pixels in zip(names, (judged[0].first, judged[0].second), strict=True):
            picture = Image.new("RGB", (64, 96))
            picture.paste(Image.fromarray(pixels[number].transpose(1, 2, 0)), (0, 16))
            picture.save(tmp_path / name)
        chosen = bool(judged[0].preferred[number])
        votes = [int(chosen), int(not chosen)]
        rows.append({"prompt": caption, "file_path": names, "human_preference": votes})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    pairs = read_pairs(tmp_path / "train.json")
    training = RewardTraining(
        replace(COSINE, framing="letterbox", trains="blocks", image_blocks=1, text_blocks=1),
        pairs,
        validation=pairs,  # too few files to hold some out: that it learns at all is asked here
        options=RewardOptions(
            loss="soft-label", batch_size=8, batches_per_iteration=2, validate_every=12
        ),
    )
    result = run(training, tmp_path / "run", 12, 1e-3, accumulation=2)
    assert training.best is not None
    assert training.best["accuracy"] > max(NO_LUCK + 0.05, training.history[0]["accuracy"] + 0.1)
    reward: Any = reward_models.load(str(result.folder))
    assert reward.framing == "letterbox"
    stored = load_file(result.folder / "final" / "reward.safetensors")
    assert set(stored) == set(training.reward.trained())


def test_attributes_come_out_as_parts_and_masked_ones_have_no_gradient(
    judged: tuple[JudgedPairs, JudgedPairs], tmp_path: Path
) -> None:
    rows = [
        Rating("", picture, {"neat": 1.0 + n % 3} if n % 2 else {"neat": 2.0, "loud": 7.0})
        for n, picture in enumerate(judged[0].first[:32])
    ]
    only_neat = Judgements("ratings", tuple(rows[1::2]), ("neat", "loud"))
    training = RewardTraining(LINEAR, only_neat, options=RewardOptions(batch_size=16))
    (minibatch,) = training.collect(0).minibatches
    (loss, _), *_ = training.losses(minibatch, 1.0)
    loss.backward()
    for parameter in training.reward.trained().values():
        assert parameter.grad is not None
        assert parameter.grad[0].abs().sum() > 0 and parameter.grad[1].abs().sum() == 0
    both = RewardTraining(LINEAR, Judgements.of(rows), options=RewardOptions(batch_size=16))
    result = run(both, tmp_path, 60, 1e-1)
    scores = reward_models.load(str(result.folder)).score(
        torch.from_numpy(judged[0].first[:8]).float() / 255, [""] * 8
    )
    assert set(scores.parts) == {"neat", "loud"}
    assert (scores.parts["loud"] - 7).abs().max() < 0.5
    torch.testing.assert_close(
        scores.values, (scores.parts["neat"] + scores.parts["loud"]) / 2, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("plan", [DROPOUT, replace(COSINE, trains="blocks", text_blocks=1)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    plan: RewardPlan, judged: tuple[JudgedPairs, JudgedPairs], tmp_path: Path
) -> None:
    ratings = plan is DROPOUT
    learnt, held_out = (as_ratings(p) if ratings else as_pairs(p) for p in judged)

    def training() -> RewardTraining:
        options = RewardOptions(batch_size=24, validate_every=3)
        return RewardTraining(
            plan, learnt.pick(range(40)), validation=held_out.pick(range(24)), options=options
        )

    whole, parted = training(), training()
    run(whole, tmp_path / "whole", 8, 1e-2, checkpoint_every=2)
    run(parted, tmp_path / "parted", 4, 1e-2, checkpoint_every=2)
    again = training()
    run(again, tmp_path / "parted", 8, 1e-2, checkpoint_every=2, resume=True)
    for name in ("final/reward.safetensors", "checkpoints/step_000008/parameters.safetensors"):
        wanted, found = (load_file(tmp_path / side / name) for side in ("whole", "parted"))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert again.history == whole.history and again.best == whole.best
    assert [entry["iteration"] for entry in again.history] == [0, 3, 6, 8]


def test_the_best_weights_are_saved_where_the_last_ones_are_worse(
    judged: tuple[JudgedPairs, JudgedPairs], tmp_path: Path
) -> None:
    learnt, held_out = judged
    contrary = replace(learnt, preferred=~learnt.preferred)  # what it learns is wrong
    training = RewardTraining(
        COSINE,
        as_pairs(contrary),
        validation=as_pairs(held_out),
        options=RewardOptions(validate_every=5),
    )
    untrained = accuracy(training.reward.scorer(), held_out)
    run(training, tmp_path, 20, 3e-3)
    history, best = training.history, training.best
    assert best is not None and best["accuracy"] > history[-1]["accuracy"] + 0.05
    assert best["iteration"] < history[-1]["iteration"] == 20
    measured = accuracy(reward_models.load(str(tmp_path)), held_out)
    assert measured == pytest.approx(best["accuracy"], abs=1 / HELD_OUT)
    assert measured >= untrained - 1 / HELD_OUT
    last = accuracy(training.reward.scorer(), held_out)
    assert last == pytest.approx(history[-1]["accuracy"], abs=1 / HELD_OUT)


def test_without_validation_the_last_weights_are_saved(
    judged: tuple[JudgedPairs, JudgedPairs], tmp_path: Path
) -> None:
    training = RewardTraining(COSINE, as_pairs(judged[0]).pick(range(64)))
    run(training, tmp_path, 3)
    stored = load_file(tmp_path / "final" / "reward.safetensors")
    trained = training.reward.trained()
    assert all(torch.equal(stored[key], trained[key].detach()) for key in trained)
    assert training.best is None and training.history == []


@pytest.mark.parametrize("plan", [COSINE, CROSS, replace(COSINE, trains="blocks", image_blocks=1)])
def test_what_is_kept_in_memory_changes_no_number(
    plan: RewardPlan, judged: tuple[JudgedPairs, JudgedPairs]
) -> None:
    def first_losses(gigabytes: float) -> Tensor:
        pairs = as_pairs(judged[0]).pick(range(40))
        training = RewardTraining(plan, pairs, options=RewardOptions(cache_gb=gigabytes))
        (minibatch,) = training.collect(1).minibatches
        return next(training.losses(minibatch, 1.0))[0].detach()

    torch.testing.assert_close(first_losses(2.0), first_losses(0.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", [LINEAR, replace(LINEAR, trains="blocks", image_blocks=1)])
def test_flips_mirror_about_half_of_the_pictures(
    plan: RewardPlan, judged: tuple[JudgedPairs, JudgedPairs]
) -> None:
    pictures = judged[0].first[:64]
    ratings = Judgements.of([Rating("", p, {"overall": float(n)}) for n, p in enumerate(pictures)])

    def outputs(flip: bool) -> Tensor:
        """Untrained scores of the first deal, one for each picture, in the pictures' order."""
        training = RewardTraining(plan, ratings, options=RewardOptions(batch_size=64, flip=flip))
        (minibatch,) = training.collect(0).minibatches
        training.reward.network.eval()
        with torch.no_grad():
            scores = training.reward.network(minibatch.images, minibatch.texts)
        return scores[minibatch.labels[:, 0].argsort()]

    plain, flipped = outputs(False), outputs(True)
    with torch.no_grad():
        training = RewardTraining(plan, ratings)
        images = torch.from_numpy(pictures).float().flip(-1) / 255
        mirrored = training.reward.scorer().score(images, [""] * 64).values[:, None]
    is_mirrored = (flipped - mirrored).abs() < 1e-4
    is_plain = (flipped - plain).abs() < 1e-4
    assert (is_mirrored | is_plain).all()
    assert 15 < (is_mirrored & ~is_plain).sum() < 49


def test_a_deck_deals_every_row_once_before_any_twice() -> None:
    deck = Deck(torch.arange(100, 110), batch_size=4, batches=2, seed=5)
    dealt = [row for i in range(5) for rows in deck.deal(i) for row in rows.tolist()]
    for start in range(0, 40, 10):
        assert sorted(dealt[start : start + 10]) == list(range(100, 110))
    assert dealt[:10] != dealt[10:20]
    assert [rows.tolist() for rows in deck.deal(3)] == [dealt[24:28], dealt[28:32]]
    other = replace(deck, seed=6)
    assert [rows.tolist() for rows in other.deal(0)] != [dealt[:4], dealt[4:8]]
    large = Deck(torch.arange(3), batch_size=8, batches=1, seed=0)
    assert max(Counter(torch.cat(list(large.deal(0))).tolist()).values()) == 3


def test_the_rows_of_a_minibatch_stay_together() -> None:
    pictures = np.zeros((6, 3, 64, 64), dtype=np.uint8)
    pictures += np.arange(6, dtype=np.uint8)[:, None, None, None] * 40
    pairs = Judgements.of(
        [
            Pair(f"p{n}", pictures[n], pictures[(n + 1) % 6], {"overall": n / 10}, weight=1.0 + n)
            for n in range(6)
        ]
    )
    plan = replace(COSINE, trains="all")  # so that the network takes pixels and prompts
    training = RewardTraining(plan, pairs, options=RewardOptions(batch_size=6))
    (found,) = training.collect(0).minibatches
    order = [round(label * 10) for label in found.labels[:, 0].tolist()]
    assert sorted(order) == list(range(6)) and order != list(range(6))
    assert found.texts == [f"p{n}" for n in order]
    assert found.weights.tolist() == [1.0 + n for n in order]
    pixels = training.reward.prepare(torch.from_numpy(pictures).float() / 255)
    wanted = torch.cat([pixels[order], pixels[[(n + 1) % 6 for n in order]]])
    assert torch.equal(found.images, wanted)


@pytest.mark.parametrize("plan", [COSINE, CROSS, LINEAR])
def test_mixed_precision_is_that_of_training_and_never_of_scores(
    judged: tuple[JudgedPairs, JudgedPairs], tmp_path: Path, plan: RewardPlan
) -> None:
    as_judged = as_ratings if plan.head == "regression" else as_pairs
    learnt, held_out = (as_judged(half) for half in judged)
    training = RewardTraining(
        replace(plan, trains="blocks", image_blocks=1),
        learnt.pick(range(16)),
        options=RewardOptions(batch_size=8, validate_every=1),
        validation=held_out.pick(range(16)),
    )
    computed: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    block = training.reward.network.model.visual.transformer.resblocks[-1]

    def look(_: Any, __: Any, output: torch.Tensor) -> None:
        computed[training.reward.network.training].add(output.dtype)

    with block.mlp.register_forward_hook(look):
        result = run(training, tmp_path, 2, 1e-4, mixed_precision="bf16")
    assert computed == {True: {torch.bfloat16}, False: {torch.float32}}
    assert all(math.isfinite(row["train/loss"]) for row in result.rows())
    assert all(p.dtype == torch.float32 for p in training.reward.trained().values())


def rated(*names: str) -> Judgements:
    picture = np.zeros((3, 8, 8), dtype=np.uint8)
    return Judgements.of([Rating("", picture + n, dict.fromkeys(names, 1.0)) for n in range(4)])


def preferred(labels: Sequence[float]) -> Judgements:
    picture = np.zeros((3, 8, 8), dtype=np.uint8)
    return Judgements.of(
        [Pair("a", picture, picture + n + 1, {"overall": p}) for n, p in enumerate(labels)]
    )


@pytest.mark.parametrize(
    ("plan", "judgements", "loss", "said"),
    [
        (COSINE, rated("overall"), "soft-label", "learns from pairs, but the judgements are"),
        (LINEAR, preferred([1, 0]), "regression", "learns from ratings, but the judgements are"),
        (CROSS, rated("overall"), None, "a cross head gives no ratings"),
        (COSINE, preferred([0.5, 0.5]), "bradley-terry", "learns from none of these"),
        (COSINE, preferred([0.7, 0.5]), "bradley-terry", "takes the labels 1, 0 and 0.5"),
        (replace(LINEAR, attributes=("colur",)), rated("colour"), None, "did you mean colour"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    plan: RewardPlan, judgements: Judgements, loss: Any, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        RewardTraining(plan, judgements, options=RewardOptions(loss=loss))
    assert said in str(caught.value)


def test_a_picture_that_cannot_be_read_is_named_and_the_run_is_saved(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (64, 64), (number * 60, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [Rating("", tmp_path / f"{n}.png", {"overall": float(n)}) for n in range(4)]
    (tmp_path / "3.png").write_bytes(b"\x89PNG nothing more")
    training = RewardTraining(LINEAR, Judgements.of(rows), options=RewardOptions(batch_size=2))
    with pytest.raises(reward_models.RewardError, match=r"3\.png"):
        run(training, tmp_path / "run", 4)


@pytest.mark.parametrize("loss", ["bradley-terry", "bradley-terry-ties", "soft-label"])
def test_accuracy_with_ties_does_not_depend_on_the_loss(
    loss: Any, judged: tuple[JudgedPairs, JudgedPairs]
) -> None:
    learnt, held_out = (as_pairs(pairs, tie=0.6).pick(range(80)) for pairs in judged)
    training = RewardTraining(COSINE, learnt, validation=held_out, options=RewardOptions(loss=loss))
    training.finish()
    scorer = training.reward.scorer()

    def differences(pairs: JudgedPairs) -> np.ndarray:
        first, second = (
            scorer.score(torch.from_numpy(side[:80]).float() / 255, pairs.captions[:80]).values
            for side in (pairs.first, pairs.second)
        )
        return (first - second).double().numpy()

    def credit(difference: np.ndarray, labels: np.ndarray, threshold: float) -> float:
        said = np.where(np.abs(difference) <= threshold, 0.5, difference > 0)
        return float(np.mean(said == labels))

    labels = [pairs.labels()[:, 0].numpy() for pairs in (learnt, held_out)]
    known = differences(judged[0])
    candidates = np.append(-1.0, np.sort(np.abs(known)))
    best = max(candidates, key=lambda t: (credit(known, labels[0], t), -t))
    assert best > 0  # ties are said at all
    wanted = credit(differences(judged[1]), labels[1], float(best))
    # Scores of two batch sizes differ in the last digits: a pair may cross the threshold.
    assert training.history[0]["accuracy_with_ties"] == pytest.approx(wanted, abs=1.5 / 80)


def pairs_of(judged: JudgedPairs, count: int, **labels: Any) -> Judgements:
    return Judgements.of(
        [
            Pair(
                judged.captions[n],
                judged.first[n],
                judged.second[n],
                {name: float(told(n)) for name, told in labels.items() if told(n) is not None},
            )
            for n in range(count)
        ]
    )


def test_held_out_pairs_that_are_all_ties_decide_by_accuracy_with_ties(
    judged: tuple[JudgedPairs, JudgedPairs],
) -> None:
    learnt, held_out = judged
    training = RewardTraining(
        COSINE,
        pairs_of(learnt, 40, overall=lambda n: [0, 0.5, 1][n % 3]),
        validation=pairs_of(held_out, 20, overall=lambda n: 0.5),
    )
    training.finish()
    validations = training._validations
    assert validations is not None and validations.best is not None
    assert math.isnan(training.history[0]["accuracy"])
    assert validations.best.goodness == training.history[0]["accuracy_with_ties"]
    assert any("accuracy with ties" in line for line in training.describe())


def test_where_overall_is_not_labelled_the_other_attributes_decide(
    judged: tuple[JudgedPairs, JudgedPairs],
) -> None:
    names = ("overall", "light", "colour")
    learnt = pairs_of(judged[0], 40, **{name: lambda n: n % 2 for name in names})
    told = pairs_of(judged[1], 20, light=lambda n: n % 2, colour=lambda n: n < 7)
    training = RewardTraining(
        LINEAR, learnt, validation=replace(told, attributes=names), options=RewardOptions()
    )
    training.finish()
    validations, found = training._validations, training.history[0]
    assert validations is not None and validations.best is not None
    mean = (found["light/accuracy"] + found["colour/accuracy"]) / 2
    assert validations.best.goodness == pytest.approx(mean)


def test_held_out_judgements_that_tell_nothing_are_refused(
    judged: tuple[JudgedPairs, JudgedPairs],
) -> None:
    rows = [Rating("", picture, {"overall": 3.0}) for picture in judged[1].first[:8]]
    with pytest.raises(UserError, match="nothing can be measured on the held-out judgements"):
        RewardTraining(LINEAR, as_ratings(judged[0]), validation=Judgements.of(rows))


def test_rows_without_a_score_are_counted(judged: tuple[JudgedPairs, JudgedPairs]) -> None:
    rows = as_ratings(judged[0]).rows[:12]
    training = RewardTraining(LINEAR, as_ratings(judged[0]), validation=Judgements.of(list(rows)))
    validations = training._validations
    assert validations is not None
    batch = training.collect(0)
    assert "validation/unscored" not in batch.metrics
    (minibatch,) = batch.minibatches
    images = minibatch.images.clone()
    images[:3] = math.nan
    ((loss, metrics),) = training.losses(replace(minibatch, images=images), 1.0)
    assert metrics["train/unscored"].item() == 3 and loss.isfinite()
    kept = validations.held_out._images
    assert kept is not None
    kept[:2] = math.nan
    assert validations.run(training.policy.denoiser, 1)["unscored"] == 2


def test_equal_scores_are_half_right_and_ties_are_no_pairs(
    judged: tuple[JudgedPairs, JudgedPairs],
) -> None:
    picture = judged[0].first[0]

    def metrics(*labels: float) -> dict[str, Tensor]:
        other = picture.copy()  # another picture that looks the same
        same = [Pair(str(n), picture, other, {"overall": p}) for n, p in enumerate(labels)]
        training = RewardTraining(
            COSINE, Judgements.of(same), options=RewardOptions(batch_size=len(labels))
        )
        (minibatch,) = training.collect(0).minibatches
        ((_, found),) = training.losses(minibatch, 1.0)
        return found

    assert metrics(1.0, 0.0, 1.0, 1.0)["train/accuracy"].item() == 0.5
    assert "train/accuracy" not in metrics(0.5, 0.5)


def test_a_new_head_over_a_start_is_told(tmp_path: Path) -> None:
    start = RewardTraining(LINEAR, rated("light", "colour"))
    file = str(start.save(tmp_path))
    assert "new regression head" in start.describe()[0]
    same = RewardTraining(RewardPlan(file), rated("colour", "light"))
    assert "new" not in same.describe()[0] and same.reward.attributes == ("light", "colour")
    other = RewardTraining(RewardPlan(file), rated("light", "shape"))
    assert "new regression head" in other.describe()[0]
