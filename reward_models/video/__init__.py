"""Video: any image scorer on chosen frames of a clip, temporal scores, and reading clip files.

`reward` and `frames` put an image scorer on clips; `temporal` and `motion` are what only clips
have; `files`, `index` and `container` read files frame by frame.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_models.video.files import VIDEO_SUFFIXES, probe_video, read_frames
    from reward_models.video.reward import FrameReward, score_video_file

_HOMES = {
    "FrameReward": "reward",
    "VIDEO_SUFFIXES": "files",
    "probe_video": "files",
    "read_frames": "files",
    "score_video_file": "reward",
}

__all__ = ["VIDEO_SUFFIXES", "FrameReward", "probe_video", "read_frames", "score_video_file"]


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` on first use: listing endings needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
