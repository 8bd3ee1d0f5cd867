"""What goes in and comes out as files: prompts, judgements of pictures, pictures with captions,
pictures, labelled grids.

Nothing is imported until it is used (PEP 562), so the command line can name this room cheaply.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.data.ava import read_ava
    from diffusion_align.data.captioned import Captioned, read_captioned
    from diffusion_align.data.images import draw_grid, save_grid, write_png
    from diffusion_align.data.judgement_files import read_pairs, read_ratings
    from diffusion_align.data.judgements import (
        Judgements,
        Pair,
        Rating,
        small_world_judgements,
    )
    from diffusion_align.data.prompts import BUILT_IN, Prompt, load_prompts

_HOMES = {
    "BUILT_IN": "diffusion_align.data.prompts",
    "Captioned": "diffusion_align.data.captioned",
    "read_captioned": "diffusion_align.data.captioned",
    "Prompt": "diffusion_align.data.prompts",
    "load_prompts": "diffusion_align.data.prompts",
    "draw_grid": "diffusion_align.data.images",
    "save_grid": "diffusion_align.data.images",
    "write_png": "diffusion_align.data.images",
    "Judgements": "diffusion_align.data.judgements",
    "Pair": "diffusion_align.data.judgements",
    "Rating": "diffusion_align.data.judgements",
    "small_world_judgements": "diffusion_align.data.judgements",
    "read_pairs": "diffusion_align.data.judgement_files",
    "read_ratings": "diffusion_align.data.judgement_files",
    "read_ava": "diffusion_align.data.ava",
}

__all__ = [
    "BUILT_IN",
    "Captioned",
    "Judgements",
    "Pair",
    "Prompt",
    "Rating",
    "draw_grid",
    "load_prompts",
    "read_ava",
    "read_captioned",
    "read_pairs",
    "read_ratings",
    "save_grid",
    "small_world_judgements",
    "write_png",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
