"""What a config names: its prompts, its rewards, its algorithm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.algorithms.base import Algorithm
    from diffusion_align.algorithms.supervised import Supervised
    from diffusion_align.config import RunConfig
    from diffusion_align.data.prompts import Prompt
    from diffusion_align.policy import Policy
    from reward_models.base import Reward

_PATH = re.compile(r"[^\s*()+]*[/\\][^\s*()+]*")
"""A term of a sum that is a path; names in a sum hold no blanks."""


def training_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts trained on; those without a negative prompt get the config's."""
    from diffusion_align.data.prompts import load_prompts

    return with_negative(load_prompts(config.prompts.source), config)


def heldout_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts of pictures during training and of the comparison."""
    from diffusion_align.data.prompts import load_prompts

    prompts = load_prompts(config.evaluation.prompts)[: config.evaluation.limit]
    return with_negative(prompts, config)


def with_negative(prompts: Sequence[Prompt], config: RunConfig) -> list[Prompt]:
    """`prompts`, where those without a negative prompt get the config's."""
    negative = config.prompts.negative
    return [p if p.negative else replace(p, negative=negative) for p in prompts]


def run_name(folder: Path) -> str:
    """What a run is called where others read it: the last part of its path, not the path."""
    folder = folder.expanduser().resolve()
    return folder.parent.name if folder.name == "final" else folder.name


def shown_name(words: str | Sequence[str]) -> str:
    """A list's, file's or reward's name without the path, which tells of its owner's machine.

    >>> shown_name("0.7*aesthetic + 0.3*/home/me/runs/mine")
    '0.7*aesthetic + 0.3*mine'
    """
    from reward_models.expression import is_expression

    if not isinstance(words, str):
        return "a list in the config"
    if "/" not in words and "\\" not in words:
        return words
    if not is_expression(words):
        return _last_part(words)
    return _PATH.sub(lambda term: _last_part(term[0]), words)


def shown_names(names: Iterable[str]) -> dict[str, str]:
    """Every name -> how others read it; no two are read alike."""
    shown: dict[str, str] = {}
    for name in dict.fromkeys(names):
        short = reads = shown_name(name)
        number = 1
        while reads in shown.values():
            number += 1
            reads = f"{short} ({number})"
        shown[name] = reads
    return shown


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name  # it splits at both kinds of slash


def scored_with(config: RunConfig) -> list[str]:
    """Names of all rewards of the evaluation: the trained one first, none twice."""
    return list(dict.fromkeys([config.reward, *config.evaluation.rewards]))


def trained_on(config: RunConfig) -> list[str]:
    """Names of what the run learns from: its reward and, of a sum, every term."""
    from reward_models.catalogue import components

    return list(dict.fromkeys([config.reward, *components(config.reward)]))


def load_algorithm(
    config: RunConfig, policy: Policy, reward: Reward, prompts: Sequence[Prompt]
) -> Algorithm[Any, Any]:
    """The algorithm that a config names, with its options."""
    from diffusion_align.algorithms import catalogue

    build = catalogue.load(catalogue.resolve(config.algorithm.name).target)
    supervised = _supervised(config, policy)
    algorithm: Algorithm[Any, Any] = build(
        policy,
        reward,
        prompts,
        options=config.algorithm.options,
        sampling=config.sampling,
        seed=config.seed,
        **({"supervised": supervised} if supervised else {}),
    )
    return algorithm


def _supervised(config: RunConfig, policy: Policy) -> Supervised | None:
    """The supervised step that a config asks for."""
    if config.supervised is None:
        return None
    from diffusion_align.algorithms.supervised import Supervised
    from diffusion_align.sampling.options import resolve_sampling

    sampling = resolve_sampling(config.sampling, policy.info)
    height, width = sampling.height, sampling.width
    return Supervised(
        policy,
        config.supervised,
        schedule=policy.schedule(sampling.steps, height=height, width=width),
        seed=config.seed,
        guidance_scale=sampling.guidance_scale,
        height=height,
        width=width,
    )
