"""Human Preference Score v2: a CLIP ViT-H/14 that learnt which of two pictures people choose.

score = cos(image, text), without the logit scale; published tables print 100 times it. The picture
keeps its shape: its longer side is resized to the tower's, the rest is black (`letterbox`).

The authors resize a float tensor without saying `antialias`, whose default torchvision turned from
off to on in 0.17; the two differ by 0.15 in normalised pixels on average, so scores computed with
different versions do not compare. Here it is on unless `antialias=False` is set.

Source: Wu et al. 2023, "Human Preference Score v2" (arXiv 2306.09341); tgxs002/HPSv2 `score.py`.
"""

from __future__ import annotations

from reward_models.backbones import load_tower
from reward_models.clip_score import CosineReward
from reward_models.table import LoadOptions, Row


def load_hps(row: Row, options: LoadOptions) -> CosineReward:
    """Build ``hpsv2`` or ``hpsv2.1``."""
    tower = load_tower(row.tower, device=options.device, dtype=options.dtype, given=options.tower)
    antialias = bool(row.settings["antialias"])
    return CosineReward(row.info, tower, framing="letterbox", antialias=antialias)
