"""Named normalisations: the affine maps that others publish their scores with. Data only.

Scores of different rewards do not add up: HPS lives around 0.27, LAION's aesthetic around 5.5. A
preset brings one to the scale that a paper, table or trainer prints it on,

    percent(hpsv2.1) = 100 * hpsv2.1 + 0        unit(aesthetic) = 1/9 * aesthetic - 1/9

and every row names where its numbers come from. There are no means and deviations here: none that
can be trusted for real photographs are published, and numbers of our own would look like facts.
Maps are affine, so a preset never changes which of two pictures a reward prefers; where the source
also clamps (CLIPScore at 0) we do not, because a clamp has no gradient.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from reward_models.base import RewardError


@dataclass(frozen=True)
class Normalisation:
    """scale * score + offset.

    Args:
        preset: its name, as written in an expression.
        source: who prints scores like that.
    """

    preset: str
    scale: float
    offset: float
    source: str = "the user's own"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and math.isfinite(self.offset)) or self.scale == 0:
            raise RewardError(
                f"scale {self.scale} and offset {self.offset} make no normalisation",
                where=f"preset {self.preset}",
                fix="both are finite, and the scale is not 0",
            )

    @property
    def formula(self) -> str:
        """For people, e.g. `0.111111 * score - 0.111111`."""
        sign = "-" if self.offset < 0 else "+"
        shift = f" {sign} {abs(self.offset):g}" if self.offset else ""
        return f"{self.scale:g} * score{shift}"


_HPS = "HPSv2 evaluation.py prints 100 times the mean cosine"
_TORCHMETRICS = "torchmetrics CLIPScore: 100 times the cosine (clamped at 0 there)"
_CLIPSCORE = "Hessel et al. 2021, CLIPScore, section 3: w = 2.5 (clamped at 0 there)"
_LAION_V2 = "https://laion.ai/blog/laion-aesthetics: people rated from 1 to 10"
_LAION_V1 = "LAION-AI/laion-datasets laion-aesthetic.md: rated from 0 to 10"
_CROWD = "reward_models.small_world: the crowd rates from 1 to 10"
_FLOW_GRPO = "yifan123/flow_grpo"

# preset -> reward -> (scale, offset, source)
_TABLE: dict[str, dict[str, tuple[float, float, str]]] = {
    "percent": {
        "hpsv2": (100, 0, _HPS),
        "hpsv2.1": (100, 0, _HPS),
        "tiny-hps": (100, 0, "as hpsv2.1, whose small twin it is"),
        "clip": (100, 0, _TORCHMETRICS),
        "tiny-clip": (100, 0, "as clip, whose small twin it is"),
    },
    "unit": {
        "aesthetic": (1 / 9, -1 / 9, _LAION_V2),
        "aesthetic-relu": (1 / 9, -1 / 9, _LAION_V2),
        "aesthetic-v1": (1 / 10, 0, _LAION_V1),
        "tiny-aesthetic": (1 / 9, -1 / 9, _CROWD),
        "verifier": (1, 0, "reward_models.small_world: a share"),
        "taste": (1, 0, "reward_models.small_world: 0 to 1 as it is written"),
    },
    "clipscore": {
        "clip": (2.5, 0, _CLIPSCORE),
        "tiny-clip": (2.5, 0, "as clip, whose small twin it is"),
    },
    "flow_grpo": {
        "aesthetic": (1, 0, f"{_FLOW_GRPO} rewards.py: as it is"),
        "hpsv2.1": (1, 0, f"{_FLOW_GRPO} hpsv2_scorer.py: as it is"),
        "pickscore": (1 / 26, 0, f"{_FLOW_GRPO} pickscore_scorer.py: divided by 26"),
        "clip": (100 / 30, 0, f"{_FLOW_GRPO} clip_scorer.py: logits (100 * cosine) divided by 30"),
        "compressibility": (1 / 500, 0, f"{_FLOW_GRPO} rewards.py: kilobytes divided by 500"),
        "incompressibility": (1, 0, f"{_FLOW_GRPO} rewards.py: kilobytes as they are"),
    },
    "vbench": {
        "aesthetic-v1": (1 / 10, 0, "Vchitect/VBench aesthetic_quality.py: divided by 10"),
    },
}

PRESETS: Mapping[str, Mapping[str, Normalisation]] = MappingProxyType(
    {
        preset: MappingProxyType(
            {name: Normalisation(preset, *numbers) for name, numbers in rows.items()}
        )
        for preset, rows in _TABLE.items()
    }
)


def check_preset(preset: str) -> str:
    """The preset's name as the table has it; case and `-` for `_` do not matter.

    Raises:
        RewardError: with the nearest name.
    """
    word = preset.strip().lower().replace("-", "_")
    if word in PRESETS:
        return word
    close = difflib.get_close_matches(word, PRESETS, n=1)
    hint = f"did you mean {close[0]} ?   " if close else ""
    raise RewardError(f"unknown preset {preset!r}", fix=f"{hint}Presets: {', '.join(PRESETS)}")


def normalisation(preset: str, reward: str) -> Normalisation:
    """What a preset makes of a reward's score.

    Args:
        reward: a name of the catalogue.

    Raises:
        RewardError: unknown preset, or one that does not know the reward (it lists those it does).
    """
    rows = PRESETS[check_preset(preset)]
    if reward in rows:
        return rows[reward]
    others = [name for name, known in PRESETS.items() if reward in known]
    instead = f"; {reward} has {', '.join(others)}" if others else ""
    raise RewardError(
        f"preset {preset} does not know {reward}",
        fix=f"it knows {', '.join(rows)}{instead}; or give the weight yourself: 0.5*{reward}",
    )


def describe() -> list[tuple[str, str, str, str]]:
    """The table for people: (preset, reward, formula, source) in its order."""
    return [
        (preset, reward, row.formula, row.source)
        for preset, rows in PRESETS.items()
        for reward, row in rows.items()
    ]
