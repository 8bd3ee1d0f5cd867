"""The sections of a config: one frozen dataclass per kind of run, made of the rooms' own options.

    a policy:  model, lora, prompts, sampling, reward, algorithm, supervised, train, guards,
               evaluation, seed, output
    a reward:  reward, data, algorithm, train, guards, seed, output

Which of them a file is, its `algorithm.name` says. Importing this file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from diffusion_align.algorithms.catalogue import ALGORITHMS
from diffusion_align.algorithms.reward_options import RewardStart
from diffusion_align.algorithms.supervised_options import SupervisedOptions
from diffusion_align.data.judgement_options import JudgementOptions
from diffusion_align.evaluation.options import EvaluationOptions
from diffusion_align.policy.options import LoRAOptions, ModelOptions
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.options import TrainOptions


@dataclass(frozen=True)
class PromptOptions:
    """What is trained on."""

    source: str | list[str] = field(
        metadata={
            "doc": "a .txt or .jsonl file, a built-in list (animals, small-world), your own "
            "my_module:my_function that returns a list, or a list"
        }
    )
    negative: str = field(
        default="", metadata={"doc": "negative prompt of every prompt that brings none of its own"}
    )


@dataclass(frozen=True)
class AlgorithmChoice:
    """An algorithm of the catalogue and its options, which stand beside `name` in the config."""

    name: str
    options: Any


@dataclass(frozen=True)
class RunConfig:
    """A resolved config: everything that `assemble` needs to build a run."""

    model: ModelOptions
    prompts: PromptOptions
    reward: str = field(
        metadata={
            "doc": "name of a reward (diffusion-align rewards) or your own package.module:Class"
        }
    )
    algorithm: AlgorithmChoice = field(metadata={"doc": "name of an algorithm, and its options"})
    lora: LoRAOptions | None = field(
        default_factory=LoRAOptions, metadata={"doc": "the adapter; null trains the whole denoiser"}
    )
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    supervised: SupervisedOptions | None = field(
        default=None,
        metadata={"doc": "pictures fitted beside a reward's gradient; null = none"},
    )
    train: TrainOptions = field(default_factory=TrainOptions)
    guards: GuardOptions = field(default_factory=GuardOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    reward_device: str | None = field(
        default=None,
        metadata={
            "doc": "where rewards compute: cpu, cuda:1 ...; null = where the model is, unless "
            "memory says otherwise"
        },
    )
    memory: Literal["auto", "low", "high"] = field(
        default="high",
        metadata={
            "doc": "high trades nothing for memory; low takes every saving that leaves what is "
            "learnt unchanged; auto takes those that the estimate needs (docs/memory.md)"
        },
    )
    seed: int = field(
        default=0, metadata={"doc": "seed of the run, 0 to 2**63 - 1; same seed, same pictures"}
    )
    output: str | None = field(
        default=None, metadata={"doc": "folder of the run; null = runs/<name of the config>"}
    )


@dataclass(frozen=True, kw_only=True)
class RewardRunConfig:
    """A resolved config of reward training."""

    reward: RewardStart = field(default_factory=RewardStart)
    data: JudgementOptions
    algorithm: AlgorithmChoice = field(metadata={"doc": "name of an algorithm, and its options"})
    train: TrainOptions = field(default_factory=TrainOptions)
    guards: GuardOptions = field(default_factory=GuardOptions)
    seed: int = field(default=0, metadata={"doc": "seed of the run, 0 to 2**63 - 1"})
    output: str | None = field(
        default=None, metadata={"doc": "folder of the run; null = runs/<name of the config>"}
    )


# What an algorithm of the catalogue trains -> the sections of its config.
ROOTS: dict[str, type[RunConfig] | type[RewardRunConfig]] = {
    "policy": RunConfig,
    "reward": RewardRunConfig,
}


def root_of(algorithm: object) -> type[RunConfig] | type[RewardRunConfig]:
    """The kind of config that an algorithm's name asks for; a policy's where it is unknown."""
    row = ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
    return ROOTS[row.trains] if row else RunConfig
