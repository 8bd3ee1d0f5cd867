"""A text is encoded once: the negative beside all prompts, every prompt for all iterations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_align import DDPO, DDPOOptions, Policy, SamplingOptions
from diffusion_align.policy.text_memory import KEPT

PROMPTS = ["a red circle", "a blue square", "a green star"]


class Texts:
    """Counts how often each text encoder of a policy is asked, and how often it really computes."""

    def __init__(self, policy: Policy) -> None:
        self.asked: Counter[str] = Counter()
        self.computed: Counter[str] = Counter()
        parts = policy.pipeline.components.items()
        self.encoders = {name: part for name, part in parts if name.startswith("text_encoder")}
        for name, part in self.encoders.items():
            inside = next(m for m in part.modules() if isinstance(m, torch.nn.Embedding))
            part.register_forward_hook(self._counting(self.asked, name))
            inside.register_forward_hook(self._counting(self.computed, name))

    def _counting(self, counter: Counter[str], name: str) -> Any:
        return lambda *_: counter.update([name])


@pytest.mark.parametrize("kind", ["eps", "xl"])
def test_the_negative_is_encoded_once_and_prompts_never_again(
    kind: str, folders: dict[str, Path]
) -> None:
    policy = Policy.load(folders[kind])
    policy.encode(["probe"], negative_prompts=["ugly"], guidance_scale=3.0)
    texts = Texts(policy)
    negatives = ["ugly"] * len(PROMPTS)
    conditioning = policy.encode(PROMPTS, negative_prompts=negatives, guidance_scale=3.0)
    # The pipeline asks for the negative beside each prompt; only the prompts are new.
    assert texts.asked == dict.fromkeys(texts.encoders, 2 * len(PROMPTS))
    assert texts.computed == dict.fromkeys(texts.encoders, len(PROMPTS))
    again = policy.encode(PROMPTS, negative_prompts=negatives, guidance_scale=3.0)
    assert texts.asked == dict.fromkeys(texts.encoders, 2 * len(PROMPTS))
    for one, other in zip(conditioning.branches, again.branches, strict=True):
        assert all(torch.equal(one.tensors[path], other.tensors[path]) for path in one.tensors)


@pytest.mark.parametrize("kind", ["eps", "xl"])
def test_what_is_remembered_is_what_would_have_been_said(
    kind: str, folders: dict[str, Path]
) -> None:
    """Bit for bit the conditioning of a policy that encodes the prompt as its first."""
    warm = Policy.load(folders[kind])
    for prompt in PROMPTS:
        warm.encode([prompt], negative_prompts=["ugly"], guidance_scale=3.0)
    cold = Policy.load(folders[kind])
    for prompt in [*PROMPTS, "one more"]:
        expected = cold.encode([prompt], negative_prompts=["ugly"], guidance_scale=3.0)
        found = warm.encode([prompt], negative_prompts=["ugly"], guidance_scale=3.0)
        cold = Policy.load(folders[kind]) if prompt == PROMPTS[0] else cold
        for one, other in zip(expected.branches, found.branches, strict=True):
            assert one.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(one.tensors[p], other.tensors[p]) for p in one.tensors)


def test_little_is_remembered_and_the_encoder_is_left_as_it_was(folders: dict[str, Path]) -> None:
    policy = Policy.load(folders["eps"])
    encoder = policy.pipeline.text_encoder
    policy.encode([f"prompt {n}" for n in range(KEPT + 3)], guidance_scale=1.0)
    said = policy._encoder._texts._said["text_encoder"]
    assert len(said) == KEPT
    assert "forward" not in vars(encoder)


def test_iterations_of_training_encode_a_prompt_once(folders: dict[str, Path]) -> None:
    """Collections of DDPO, guided in sampling and not in training, over the same two prompts."""
    policy = Policy.load(folders["eps"], lora_rank=2)
    ddpo = DDPO(
        policy,
        lambda images, prompts: images.mean(dim=(1, 2, 3)),
        PROMPTS[:2],
        options=DDPOOptions(
            prompts_per_iteration=2,
            samples_per_prompt=2,
            train_batch_size=2,
            train_guidance=False,
        ),
        sampling=SamplingOptions(steps=2, guidance_scale=3.0),
    )
    policy.encode(["probe"], guidance_scale=3.0)
    policy.encode(["probe"], guidance_scale=1.0)
    texts = Texts(policy)
    ddpo.collect(0)
    assert texts.computed == {"text_encoder": 2}
    ddpo.collect(1)
    assert texts.computed == {"text_encoder": 2}
