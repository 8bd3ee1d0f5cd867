"""The table of reward models: a name, what the scorer is, who builds it and from which files.

A row is data. Adding a scorer is a module with one `load_...(row, options)` function and a row
here. Nothing in this module imports torch, so a mistyped name is answered at once.

Besides the names below, `load` takes the user's own reward as `package.module:Name`, where Name
is a class that keeps the `Reward` contract or a plain function `fn(images, prompts) -> [B]`.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from reward_models.base import Reward, RewardError, RewardInfo, require_gradient
from reward_models.weights import WeightFile, on_disk

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Tower:
    """A CLIP tower shared between scorers.

    Args:
        config: an open_clip model name, or a JSON file of assets/ with the same keys.
        weights: its file.
        archive_sha256: of the original TorchScript archive, which is accepted in its place.
    """

    config: str
    weights: WeightFile
    archive_sha256: str = ""


@dataclass(frozen=True)
class Row:
    """One reward model.

    Args:
        info: what the scorer is.
        target: "module:function", called as function(row, options) -> Reward.
        weights: the scorer's own file, if it has one.
        tower: a name in `TOWERS`, if it stands on one.
    """

    info: RewardInfo
    target: str
    weights: WeightFile | None = None
    tower: str = ""

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """Every weight file that the scorer needs."""
        tower = (TOWERS[self.tower].weights,) if self.tower else ()
        return (self.weights, *tower) if self.weights else tower

    @property
    def installed(self) -> bool:
        """Whether it can be loaded without a network."""
        return all(on_disk(file) is not None for file in self.files)


@dataclass(frozen=True)
class LoadOptions:
    """How to load a scorer: device, dtype of its tower, the user's own files instead of ours."""

    device: str = "cpu"
    dtype: str = "float32"
    weights: FilePath | None = None
    tower: FilePath | None = None


TOWERS: dict[str, Tower] = {
    # OpenAI's CLIP was trained with quick GELU, which the plain "ViT-L-14" of open_clip has not.
    "clip-l": Tower(
        config="ViT-L-14-quickgelu",
        weights=WeightFile(
            name="open_clip_model.safetensors",
            repo="timm/vit_large_patch14_clip_224.openai",
            files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
            megabytes=1710,
        ),
        archive_sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "tiny-clip": Tower(
        config="tiny-clip.json", weights=WeightFile("tiny-clip.safetensors", asset=True)
    ),
}

_LAION = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
_LAION_V1 = "https://github.com/LAION-AI/aesthetic-predictor"
_DDPO = "https://arxiv.org/abs/2305.13301"
_SMALL_WORLD = "reward_models.small_world"

_ROWS = (
    Row(
        info=RewardInfo(
            name="aesthetic",
            modality="image",
            differentiable=True,
            range="about 4 to 7 (photographs; higher after optimisation)",
            licence="Apache-2.0 (head), MIT (CLIP)",
            source=f"{_LAION} sac+logos+ava1-l14-linearMSE: LAION v2, the one that DDPO uses",
        ),
        target="reward_models.aesthetic:load_aesthetic",
        weights=WeightFile(
            name="sac+logos+ava1-l14-linearMSE.pth",
            sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
            repo="trl-lib/ddpo-aesthetic-predictor",
            files=("aesthetic-model.pth",),
            url=f"{_LAION}/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
            megabytes=3.7,
        ),
        tower="clip-l",
    ),
    Row(
        info=RewardInfo(
            name="aesthetic-relu",
            modality="image",
            differentiable=True,
            range="1 to 10 by training; five test photographs lie between 4.0 and 4.4",
            licence="Apache-2.0 (head), MIT (CLIP)",
            source=f"{_LAION} ava+logos-l14-reluMSE",
        ),
        target="reward_models.aesthetic:load_aesthetic",
        weights=WeightFile(
            name="ava+logos-l14-reluMSE.pth",
            sha256="0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4",
            url=f"{_LAION}/raw/main/ava%2Blogos-l14-reluMSE.pth",
            megabytes=3.7,
        ),
        tower="clip-l",
    ),
    Row(
        info=RewardInfo(
            name="aesthetic-v1",
            modality="image",
            differentiable=True,
            range="about -3 to 11",
            licence="MIT",
            source=f"{_LAION_V1} sa_0_4_vit_l_14_linear",
        ),
        target="reward_models.aesthetic:load_aesthetic",
        weights=WeightFile(
            name="sa_0_4_vit_l_14_linear.pth",
            sha256="2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
            url=f"{_LAION_V1}/raw/main/sa_0_4_vit_l_14_linear.pth",
            megabytes=0.004,
        ),
        tower="clip-l",
    ),
    Row(
        info=RewardInfo(
            name="tiny-aesthetic",
            modality="image",
            differentiable=True,
            range="1 to 10 (ratings of small-world pictures)",
            licence="Apache-2.0",
            source=f"{_SMALL_WORLD}: trained on a simulated crowd's ratings",
        ),
        target="reward_models.aesthetic:load_aesthetic",
        weights=WeightFile("tiny-aesthetic.safetensors", asset=True),
        tower="tiny-clip",
    ),
    Row(
        info=RewardInfo(
            name="compressibility",
            modality="image",
            differentiable=False,
            range="-300 to -20 at 512 x 512 (minus kilobytes, scales with resolution)",
            licence="Apache-2.0",
            source=f"{_DDPO} section 5.1: JPEG quality 95",
        ),
        target="reward_models.compressibility:load_compressibility",
    ),
    Row(
        info=RewardInfo(
            name="incompressibility",
            modality="image",
            differentiable=False,
            range="20 to 300 at 512 x 512 (kilobytes, scales with resolution)",
            licence="Apache-2.0",
            source=f"{_DDPO} section 5.1: JPEG quality 95",
        ),
        target="reward_models.compressibility:load_incompressibility",
    ),
    Row(
        info=RewardInfo(
            name="verifier",
            modality="image",
            differentiable=False,
            range="0 to 1 (share of the caption's claims that hold)",
            licence="Apache-2.0",
            source=f"{_SMALL_WORLD}: reads the picture back",
            needs_prompt=True,
        ),
        target="reward_models.small_world_rewards:load_verifier",
    ),
    Row(
        info=RewardInfo(
            name="taste",
            modality="image",
            differentiable=False,
            range="0 to 1",
            licence="Apache-2.0",
            source=f"{_SMALL_WORLD}: claims held, neatness, palette",
            needs_prompt=True,
        ),
        target="reward_models.small_world_rewards:load_taste",
    ),
)

ROWS: dict[str, Row] = {row.info.name: row for row in _ROWS}

_ALIASES = {"aesthetic-v2": "aesthetic"}


def names() -> list[str]:
    """The names that `load` knows, in the order of the table."""
    return list(ROWS)


def find(name: str) -> Row:
    """The row of a name; case and surrounding blanks do not matter.

    Raises:
        RewardError: with the nearest name.
    """
    word = name.strip().lower()
    word = _ALIASES.get(word, word)
    if word in ROWS:
        return ROWS[word]
    close = difflib.get_close_matches(word, [*ROWS, *_ALIASES], n=1)
    hint = f"did you mean {close[0]} ?   " if close else ""
    raise RewardError(
        f"unknown reward {name!r}",
        fix=f"{hint}Rewards: {', '.join(ROWS)}; or your own as package.module:Name",
    )


def check_name(name: str) -> None:
    """Refuse an unknown name without loading anything; a `module:Name` is believed.

    Raises:
        RewardError: with the nearest name.
    """
    if ":" not in name:
        find(name)


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    weights: FilePath | None = None,
    tower: FilePath | None = None,
    needs_gradient: bool = False,
    notice: Callable[[str], None] | None = None,
) -> Reward:
    """Build the reward of that name.

    Args:
        name: a name of `names()`, or the user's own `package.module:Name`.
        device: where its tower runs, e.g. "cpu" or "cuda:0".
        dtype: of its tower ("float32", "bfloat16", "float16"); heads and scores stay float32.
        weights: the user's own file instead of the published head.
        tower: the user's own copy of the CLIP tower's weights.
        needs_gradient: the caller will back-propagate through the score.
        notice: told which of the user's modules is about to run; the default writes to stderr.

    Raises:
        RewardError: unknown name, weights that cannot be had or are damaged, no gradient.
    """
    options = LoadOptions(str(device), str(dtype).removeprefix("torch."), weights, tower)
    if ":" in name:
        from reward_models.plugin import load_plugin

        _refuse_files(name, options, weights_taken=False, tower_taken=False)
        return load_plugin(
            name, options, needs_gradient=needs_gradient, notice=notice or _to_stderr
        )
    row = find(name)
    _refuse_files(
        row.info.name, options, weights_taken=row.weights is not None, tower_taken=bool(row.tower)
    )
    module, _, function = row.target.partition(":")
    build: Callable[[Row, LoadOptions], Any] = getattr(import_module(module), function)
    reward: Reward = build(row, options)
    return require_gradient(reward) if needs_gradient else reward


def _refuse_files(
    name: str, options: LoadOptions, *, weights_taken: bool, tower_taken: bool
) -> None:
    """A file given to a reward that reads none would be ignored silently."""
    if options.weights is not None and not weights_taken:
        raise RewardError("takes no weights of its own", where=f"reward {name}")
    if options.tower is not None and not tower_taken:
        raise RewardError("stands on no tower", where=f"reward {name}")


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)
