"""What a person may ask of a policy, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from diffusion_align.errors import UserError
from diffusion_align.policy.catalogue import ModelInfo
from diffusion_align.policy.families import Family
from diffusion_align.policy.options import LoRAInit


def check_trained(
    *,
    full: bool,
    rank: int | None,
    path: str | Path | None,
    alpha: float | None,
    targets: Sequence[str] | None,
    init: LoRAInit,
) -> None:
    """Refuse arguments of `Policy.load` of which some would be ignored.

    Raises:
        UserError: names the argument.
    """
    if init not in (known := get_args(LoRAInit)):
        raise UserError(f"{init!r} is none of {', '.join(known)}", where="lora.init")
    if full and (rank is not None or path is not None):
        raise UserError("choose a LoRA or full fine-tuning, not both", where="lora")
    if path is not None and (alpha is not None or targets is not None or init != "kaiming"):
        raise UserError(
            "alpha, targets and init of a LoRA that is continued are the file's",
            where="lora.path",
        )


def check_negatives(family: Family, negatives: Sequence[str] | None, name: str) -> None:
    """Refuse negative prompts for a model that has no branch for them.

    Raises:
        UserError: names the model.
    """
    if family.guidance == "embedded" and any(negatives or ()):
        raise UserError(
            f"{name} takes guidance as an input and has no negative branch",
            where="negative prompt",
            fix="leave negative prompts out",
        )


def check_size(family: Family, height: int, width: int) -> None:
    """Refuse a size the family cannot make.

    Raises:
        UserError: names the nearest one that it can.
    """
    multiple = family.size_multiple
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise UserError(
                f"{value} is not a multiple of {multiple} pixels",
                where=name,
                fix=f"the nearest that is: {nearest}",
            )


def picture_size(
    family: Family, info: ModelInfo, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width in pixels, the model's own for None.

    Raises:
        UserError: as `check_size`.
    """
    if info.height is None or info.width is None:
        raise RuntimeError("the policy was built without its model's size")
    height = info.height if height is None else height
    width = info.width if width is None else width
    check_size(family, height, width)
    return height, width


def clip_length(family: Family, info: ModelInfo, frames: int | None) -> int | None:
    """Frames of a clip, the model's own for None; None for a model of images.

    Raises:
        UserError: a length that the model cannot make (with the nearest), or one for images.
    """
    video = family.frames
    if video is None:
        if frames is not None:
            raise UserError(
                f"{info.name} makes images, which have no frames",
                where="frames",
                fix="leave frames out (null)",
            )
        return None
    length = info.frames if frames is None else frames
    if length is None:
        raise RuntimeError("the policy was built without its model's number of frames")
    if length < 1 or (length - 1) % video.multiple:
        nearest = max(0, round((length - 1) / video.multiple)) * video.multiple + 1
        raise UserError(
            f"{length} is not one more than a multiple of {video.multiple}",
            where="frames",
            fix=f"the nearest that is: {nearest}",
        )
    return length
