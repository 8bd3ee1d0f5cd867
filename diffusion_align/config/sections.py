"""The sections of a config: one frozen dataclass per run, made of the rooms' own options.

    model, lora, prompts, sampling, reward, algorithm, train, evaluation, seed, output

Importing this file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusion_align.evaluation.options import EvaluationOptions
from diffusion_align.policy.options import LoRAOptions, ModelOptions
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.options import TrainOptions


@dataclass(frozen=True)
class PromptOptions:
    """What is trained on."""

    source: str | list[str] = field(
        metadata={"doc": "a .txt or .jsonl file, a built-in list (animals, small-world), or a list"}
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
    train: TrainOptions = field(default_factory=TrainOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    seed: int = field(
        default=0, metadata={"doc": "seed of the run, 0 to 2**63 - 1; same seed, same pictures"}
    )
    output: str | None = field(
        default=None, metadata={"doc": "folder of the run; null = runs/<name of the config>"}
    )
