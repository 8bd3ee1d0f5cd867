"""PickScore: a CLIP ViT-H/14 trained on the choices of the Pick-a-Pic web application's users.

score = exp(logit_scale) * cos(image, text), about 19 to 24. Differences of two scores are the
logits of a choice between the two pictures. Prompts are cut at 77 tokens and read as transformers'
fast CLIP tokenizer does, which the authors' AutoProcessor loads: no ftfy, no HTML entities.

Source: Kirstain et al. 2023, "Pick-a-Pic" (arXiv 2305.01569); yuvalkirstain/PickScore.
"""

from __future__ import annotations

from reward_models.backbones import load_tower
from reward_models.clip_score import CosineReward
from reward_models.table import LoadOptions, Row


def load_pickscore(row: Row, options: LoadOptions) -> CosineReward:
    """Build ``pickscore``."""
    tower = load_tower(row.tower, device=options.device, dtype=options.dtype, given=options.tower)
    return CosineReward(
        row.info,
        tower,
        scale=tower.logit_scale,
        round_to_uint8=bool(row.settings["round_to_uint8"]),
        cleaning="nfc",
    )
