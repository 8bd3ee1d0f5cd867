"""The small world: captioned pictures of shapes whose truth is known, drawn and read by code.

``grammar`` (captions), ``render`` (scenes to pictures), ``verify`` (pictures back to claims),
``taste`` (how good a picture is, and the crowds that judge it) and ``judged`` (pictures with what a
crowd said of them, to learn from). numpy and scipy only.
"""

from reward_models.small_world.grammar import (
    Caption,
    Thing,
    captions,
    change_one_attribute,
    parse_caption,
    random_caption,
)
from reward_models.small_world.judged import (
    JudgedPairs,
    JudgedRatings,
    judged_pairs,
    judged_ratings,
)
from reward_models.small_world.render import Scene, random_scene, render
from reward_models.small_world.taste import (
    AESTHETIC_CROWD,
    HPS_CROWD,
    MPS_CROWD,
    Crowd,
    Taste,
    realised_ceiling,
    taste,
)
from reward_models.small_world.verify import Claims, Reading, read_scene, verify

__all__ = [
    "AESTHETIC_CROWD",
    "Caption",
    "Claims",
    "Crowd",
    "HPS_CROWD",
    "JudgedPairs",
    "JudgedRatings",
    "MPS_CROWD",
    "Reading",
    "Scene",
    "Taste",
    "Thing",
    "captions",
    "change_one_attribute",
    "judged_pairs",
    "judged_ratings",
    "parse_caption",
    "random_caption",
    "random_scene",
    "read_scene",
    "realised_ceiling",
    "render",
    "taste",
    "verify",
]
