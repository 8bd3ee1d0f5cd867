"""From a name to a pipeline in memory: checksums, class, dtype, scheduler.

Only safetensors are read (`use_safetensors=True`): no pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline
from packaging.version import Version
from safetensors import SafetensorError

from diffusion_align.errors import UserError, did_you_mean
from diffusion_align.policy.catalogue import ModelInfo
from diffusion_align.policy.families import DDIM_DEFAULTS, Family, family_of
from diffusion_align.policy.lora_methods import complete_lora_methods

SUMS = "SHA256SUMS.json"
"""Beside embedded weights: {"path relative to the folder": "sha256 in hex"}."""

# diffusers renamed the argument: new versions warn of the old name, old ones ignore the new name.
_DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of an option's word.

    Raises:
        UserError: an unknown word, with the nearest one.
    """
    if name not in _DTYPES:
        guess = did_you_mean(name, _DTYPES)
        hint = f"did you mean {guess}? " if guess else ""
        raise UserError(
            f"unknown dtype {name!r}", where="model.dtype", fix=f"{hint}known: {', '.join(_DTYPES)}"
        )
    return _DTYPES[name]


def verify_checksums(folder: Path) -> None:
    """Compare every file that `SHA256SUMS.json` lists with its checksum.

    A folder without that list is somebody's own model and is not checked.

    Raises:
        UserError: a missing or altered file, named.
    """
    listing = folder / SUMS
    if not listing.is_file():
        return
    try:
        sums: dict[str, str] = json.loads(listing.read_text(encoding="utf-8"))
        wanted = sorted(sums.items())
    except (ValueError, AttributeError) as error:
        raise UserError(f"damaged: {error}", where=str(listing), fix=_REINSTALL) from error
    for name, expected in wanted:
        path = folder / name
        if not path.is_file():
            raise UserError("a file of the model is missing", where=str(path), fix=_REINSTALL)
        with path.open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
        if found.hexdigest() != expected:
            raise UserError(
                f"the file is damaged: its sha256 is {found.hexdigest()[:12]}..., "
                f"not {expected[:12]}...",
                where=str(path),
                fix=_REINSTALL,
            )


_REINSTALL = "reinstall the package, or copy the model again"


def load_pipeline(
    info: ModelInfo, *, revision: str | None, dtype: torch.dtype, denoiser_dtype: torch.dtype
) -> tuple[Any, Family]:
    """Load a pipeline, whatever dtype it is stored in, on the CPU, frozen and in eval mode.

    Args:
        info: where it lies.
        revision: of a hub id.
        dtype: of every component but the denoiser. float16 gives a float32 VAE, because the
            published VAEs overflow in it.
        denoiser_dtype: of the denoiser, which must not pass through a narrower type when all of
            it is trained.

    Returns:
        The diffusers pipeline and its family.

    Raises:
        UserError: missing, damaged or unsupported; names the model.
    """
    folder = Path(info.source).expanduser()
    local = folder.is_dir()
    if local:
        verify_checksums(folder)
    elif folder.is_absolute():
        raise UserError("the model's folder is missing", where=str(folder), fix=_REINSTALL)
    source = str(folder) if local else info.source
    try:
        config = DiffusionPipeline.load_config(source, revision=revision, local_files_only=local)
        family = family_of(str(config["_class_name"]), where=info.name)
        refuse_variants(family, config, info.name)
        dtypes = {
            family.denoiser: denoiser_dtype,
            "vae": torch.float32 if dtype == torch.float16 else dtype,
            "default": dtype,
        }
        with library_bars(shown=not local):
            pipeline = DiffusionPipeline.from_pretrained(
                source,
                revision=revision,
                local_files_only=local,
                use_safetensors=True,
                **{_DTYPE_ARGUMENT: dtypes},
                **_dropped(family, config),
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"the model could not be loaded: {line}",
            where=info.name,
            fix="check the name, the files and, for a hub id, the network",
        ) from error
    refuse_variants(family, getattr(pipeline, family.denoiser).config, info.name)
    complete_lora_methods(pipeline, family)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline, family


def _dropped(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that keep from_pretrained from loading what the family does not use."""
    dropped: dict[str, Any] = {name: None for name in family.unused_components if name in config}
    if "safety_checker" in dropped:
        dropped["requires_safety_checker"] = False  # else the pipeline warns that it is missing
    return dropped


@contextmanager
def library_bars(*, shown: bool) -> Iterator[None]:
    """diffusers' and transformers' bars: of use for a download, not for a folder's moment."""
    loggers = [
        library
        for library in (diffusers.utils.logging, transformers.utils.logging)
        if not shown and library.is_progress_bar_enabled()
    ]
    for library in loggers:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in loggers:
            library.enable_progress_bar()


def with_size(info: ModelInfo, pipeline: Any, family: Family) -> ModelInfo:
    """`info` with the family's name and the model's own size filled in where it was unknown."""
    if info.height is not None and info.width is not None:
        return info
    height, width = _own_size(pipeline, family)
    filled = replace(info, height=height, width=width)
    if family.frames is not None and info.frames is None:
        config = getattr(pipeline, family.denoiser).config
        frames = config.get(family.frames.config_name) or family.frames.default
        filled = replace(filled, frames=int(frames))
    if info.family:
        return filled
    return replace(
        filled, family=family.name, steps=family.steps, guidance_scale=family.guidance_scale
    )


def _own_size(pipeline: Any, family: Family) -> tuple[int, int]:
    """Height and width that the denoiser's config states in latent pixels, or the family's."""
    if family.size is not None:
        return family.size
    config = getattr(pipeline, family.denoiser).config
    height, width = (config[name] for name in family.size_names)
    if not isinstance(height, int):
        height, width = height[0], width[1]
    # Pipelines of images and of clips call the same number by two names.
    factor = getattr(pipeline, "vae_scale_factor", None) or pipeline.vae_scale_factor_spatial
    return height * factor, width * factor


def refuse_variants(family: Family, settings: Mapping[str, Any], name: str) -> None:
    """Refuse a model of the family's classes whose settings make it another model.

    Raises:
        UserError: names the setting.
    """
    for setting in family.refused:
        if settings.get(setting):
            raise UserError(
                f"models with {setting}={settings[setting]} are not supported",
                where=name,
                fix=f"use a model of the family {family.name}",
            )


def use_ddim(pipeline: Any, name: str) -> str | None:
    """Give `pipeline` a DDIM scheduler with its own noise levels and prediction type.

    DDIM is the one reverse step here whose likelihood per step is a plain Gaussian; PNDM, UniPC,
    DPM-Solver, LMS and Euler have none. Everything that defines the noise levels is carried over.

    Args:
        pipeline: changed in place.
        name: the model, for the messages.

    Returns:
        What the user is told, or None when the scheduler was DDIM already.

    Raises:
        UserError: a scheduler of another kind of process.
    """
    before = pipeline.scheduler
    kind = type(before).__name__
    if kind == "DDIMScheduler":
        return None
    config = dict(before.config)
    if "num_train_timesteps" not in config or config.get("prediction_type") not in (
        "epsilon",
        "v_prediction",
        "sample",
    ):
        raise UserError(
            f"its scheduler {kind} (prediction {config.get('prediction_type')}) cannot be replaced "
            "by DDIM",
            where=name,
            fix="use a model with a Stable Diffusion noise schedule",
        )
    # Said outright: diffusers drops what the old scheduler had by default, also what the pipeline
    # has put right since.
    kept = {setting: config.get(setting, value) for setting, value in DDIM_DEFAULTS.items()}
    pipeline.scheduler = DDIMScheduler.from_config(config, **kept)
    return (
        f"{name}: scheduler {kind} has no likelihood per step and was replaced by DDIM (same noise "
        "levels and prediction type); pictures differ slightly from the model card's"
    )
