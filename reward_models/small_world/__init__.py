"""The small world: captioned pictures of shapes whose truth is known, drawn and read by code.

``grammar`` (captions), ``render`` (scenes to pictures), ``verify`` (pictures back to claims) and
``taste`` (how good a picture is, and the crowd that rates it). numpy and scipy only.
"""

from reward_models.small_world.grammar import (
    Caption,
    Thing,
    captions,
    change_one_attribute,
    parse_caption,
    random_caption,
)
from reward_models.small_world.render import Scene, random_scene, render
from reward_models.small_world.taste import AESTHETIC_CROWD, Crowd, Taste, taste
from reward_models.small_world.verify import Claims, Reading, read_scene, verify

__all__ = [
    "AESTHETIC_CROWD",
    "Caption",
    "Claims",
    "Crowd",
    "Reading",
    "Scene",
    "Taste",
    "Thing",
    "captions",
    "change_one_attribute",
    "parse_caption",
    "random_caption",
    "random_scene",
    "read_scene",
    "render",
    "taste",
    "verify",
]
