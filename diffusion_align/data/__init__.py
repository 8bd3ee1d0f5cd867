"""What goes in and comes out as files: prompt lists, pictures and labelled grids.

Nothing is imported until it is used (PEP 562), so the command line can name this room cheaply.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.data.images import draw_grid, save_grid, write_png
    from diffusion_align.data.prompts import BUILT_IN, Prompt, load_prompts

_HOMES = {
    "BUILT_IN": "diffusion_align.data.prompts",
    "Prompt": "diffusion_align.data.prompts",
    "load_prompts": "diffusion_align.data.prompts",
    "draw_grid": "diffusion_align.data.images",
    "save_grid": "diffusion_align.data.images",
    "write_png": "diffusion_align.data.images",
}

__all__ = ["BUILT_IN", "Prompt", "draw_grid", "load_prompts", "save_grid", "write_png"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
