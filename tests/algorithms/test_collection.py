"""What is asked for reaches the model: every setting, prompt, negative prompt and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from diffusion_align.algorithms import collection
from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.data.prompts import Prompt
from diffusion_align.sampling.options import SamplingOptions

PROMPTS = [Prompt("a", "ugly", {"n": 1}), Prompt("bb", "", {"n": 2})]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What `rollout` was called with."""
    calls: dict[str, list[Any]] = {"rollout": [], "encode": [], "metadata": []}
    plain = collection.rollout

    def recording(*args: Any, **options: Any) -> Any:
        calls["rollout"].append(options)
        return plain(*args, **options)

    monkeypatch.setattr(collection, "rollout", recording)
    return calls


def make(
    toy: ModuleType, seen: dict[str, list[Any]], prompts: Sequence[Prompt], **options: Any
) -> DDPO:
    policy, reward = toy.ToyPolicy(), toy.Brightness()
    encode, score = policy.encode, reward.score

    def encoding(texts: Any, **asked: Any) -> Any:
        seen["encode"].append((tuple(texts), asked))
        return encode(texts, **asked)

    def scoring(media: Any, texts: Any, **asked: Any) -> Any:
        seen["metadata"].append((tuple(texts), asked.get("metadata")))
        return score(media, texts, **asked)

    policy.encode, reward.score = encoding, scoring
    return DDPO(
        policy,
        reward,
        prompts,
        options=DDPOOptions(
            prompts_per_iteration=2,
            samples_per_prompt=2,
            train_batch_size=4,
            clip_range=0.1,
            **options,
        ),
        sampling=SamplingOptions(
            steps=3,
            guidance_scale=4.0,
            eta=0.5,
            height=16,
            width=24,
            batch_size=2,
            flow_kind="cps",
            noise_level=0.3,
        ),
    )


def test_every_setting_of_sampling_is_the_one_that_was_asked_for(
    toy: ModuleType, seen: dict[str, list[Any]]
) -> None:
    make(toy, seen, PROMPTS).collect(0)
    assert len(seen["rollout"]) == 2
    for options in seen["rollout"]:
        assert options == {
            "guidance_scale": 4.0,
            "eta": 0.5,
            "flow_kind": "cps",
            "noise_level": 0.3,
            "reduction": "mean",
            "keep": "all",
            "batch_size": 2,
            "noisy": None,
            "starts": None,
        }


def test_prompts_go_with_their_own_negatives_sizes_and_metadata(
    toy: ModuleType, seen: dict[str, list[Any]]
) -> None:
    make(toy, seen, PROMPTS).collect(0)
    ((texts, asked),) = seen["encode"]
    assert dict(zip(texts, asked["negative_prompts"], strict=True)) == {"a": "ugly", "bb": ""}
    assert (asked["height"], asked["width"], asked["guidance_scale"]) == (16, 24, 4.0)
    for names, metadata in seen["metadata"]:
        assert [row["n"] for row in metadata] == [{"a": 1, "bb": 2}[name] for name in names]


def test_prompts_without_metadata_send_none(toy: ModuleType, seen: dict[str, list[Any]]) -> None:
    make(toy, seen, [Prompt("a"), Prompt("bb")]).collect(0)
    assert all(metadata is None for _, metadata in seen["metadata"])


def test_unguided_training_encodes_for_itself(toy: ModuleType, seen: dict[str, list[Any]]) -> None:
    ddpo = make(toy, seen, PROMPTS, train_guidance=False)
    batch = ddpo.collect(0)
    assert [asked["guidance_scale"] for _, asked in seen["encode"]] == [4.0, 1.0]
    assert batch.cond is not batch.trajectory.cond
    assert batch.cond.prompts == batch.trajectory.cond.prompts
    assert all(minibatch.cond.prompts for minibatch in ddpo.minibatches(batch))


@pytest.mark.parametrize("kind", ["prompt", "group", "global"])
def test_advantages_are_limited(toy: ModuleType, seen: dict[str, list[Any]], kind: Any) -> None:
    free = make(toy, seen, PROMPTS, advantages=kind).collect(0)
    assert float(free.advantages.abs().max()) > 0.7
    batch = make(toy, seen, PROMPTS, advantages=kind, advantage_clip=0.7).collect(0)
    torch.testing.assert_close(batch.advantages, free.advantages.clamp(-0.7, 0.7))
    assert batch.metrics["advantage/clipped"] > 0 and free.metrics["advantage/clipped"] == 0
