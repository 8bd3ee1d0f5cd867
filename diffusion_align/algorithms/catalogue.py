"""Which algorithms there are: name -> "module:Class", options, needs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal

from diffusion_align.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks of the system (DESIGN section 4). Everything defaults to no."""

    trajectory: bool = False
    clean_latents: bool = False
    old_policy: bool = False
    reference: bool = False
    differentiable_reward: bool = False
    chained_losses: bool = False
    """Each loss is made of the gradient of the one before: nothing may scale them on the way."""

    def words(self) -> str:
        """The needs as text for a table, for example ``trajectory, reference``."""
        return ", ".join(name.replace("_", " ") for name, on in vars(self).items() if on) or "-"


@dataclass(frozen=True)
class AlgorithmInfo:
    """One row of the catalogue.

    target: ``"module:Class"``; options: ``"module:Dataclass"`` (a module without torch).
    trains: what it trains, which decides the sections of its config.
    """

    name: str
    target: str
    options: str
    description: str
    source: str
    needs: Needs = field(default_factory=Needs)
    trains: Literal["policy", "reward"] = "policy"


ALGORITHMS: dict[str, AlgorithmInfo] = {
    "ddpo": AlgorithmInfo(
        name="ddpo",
        target="diffusion_align.algorithms.ddpo:DDPO",
        options="diffusion_align.algorithms.options:DDPOOptions",
        description="policy gradient on exact per-step likelihoods; any reward, no gradient needed",
        source="Black et al. 2023, arXiv 2305.13301",
        needs=Needs(trajectory=True),
    ),
    "rwr": AlgorithmInfo(
        name="rwr",
        target="diffusion_align.algorithms.rwr:RWR",
        options="diffusion_align.algorithms.rwr_options:RWROptions",
        description="denoising regression on its own samples, weighted by reward; any reward",
        source="Black et al. 2023, arXiv 2305.13301; Lee et al. 2023, arXiv 2302.12192",
        needs=Needs(clean_latents=True),
    ),
    "draft": AlgorithmInfo(
        name="draft",
        target="diffusion_align.algorithms.draft:Draft",
        options="diffusion_align.algorithms.draft_options:DraftOptions",
        description="the reward's own gradient: DRaFT, -K, -LV, AlignProp, ReFL, DRTune, VADER",
        source="Clark et al. 2023, arXiv 2309.17400",
        needs=Needs(differentiable_reward=True, chained_losses=True),
    ),
    "reward": AlgorithmInfo(
        name="reward",
        target="diffusion_align.algorithms.reward_training:RewardTraining",
        options="diffusion_align.algorithms.reward_options:RewardOptions",
        description="fits a reward model to preferences or ratings: the last blocks, a head, all",
        source="Bradley and Terry 1952; HPS v2, arXiv 2306.09341; PickScore, arXiv 2305.01569",
        trains="reward",
    ),
}


def names() -> list[str]:
    """Names of all algorithms, sorted."""
    return sorted(ALGORITHMS)


def resolve(name: str) -> AlgorithmInfo:
    """The row of `name`; a UserError with the nearest name otherwise."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    near = did_you_mean(name, names())
    fix = f"did you mean {near} ?" if near else f"known: {', '.join(names())}"
    raise UserError(f"unknown algorithm {name!r}", fix=fix)


def load(dotted: str) -> type:
    """Import the class behind ``"module:Class"`` (a row's `target` or `options`)."""
    module, _, attribute = dotted.partition(":")
    return getattr(import_module(module), attribute)
