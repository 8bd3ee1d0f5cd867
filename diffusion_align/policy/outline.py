"""A pipeline without its weights: every component from its config, on torch's `meta` device.

Shapes, dtypes and the whole forward are those of the real model, but nothing is read beyond a few
JSON files and the tokenizers, and nothing takes memory. What a run needs can be counted on it
before anything large is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from diffusion_align.errors import UserError
from diffusion_align.policy.catalogue import ModelInfo
from diffusion_align.policy.families import Family, family_of
from diffusion_align.policy.loading import refuse_variants
from diffusion_align.policy.lora_methods import complete_lora_methods

_CONFIGS = ("*.json", "*.txt", "*.model")
"""What a pipeline consists of besides its weights: configs and tokenizers, a few megabytes."""


def outline_pipeline(
    info: ModelInfo, *, revision: str | None, dtype: torch.dtype, denoiser_dtype: torch.dtype
) -> tuple[Any, Family]:
    """As `load_pipeline`, with every module on the `meta` device, frozen and in eval mode.

    Of a hub model only what lies in the local cache is read.

    Raises:
        UserError: its configs are not here (with the command that fetches them), or damaged.
    """
    folder = config_folder(info, revision)
    try:
        index: Mapping[str, Any] = json.loads((folder / "model_index.json").read_text("utf-8"))
        family = family_of(str(index["_class_name"]), where=info.name)
        refuse_variants(family, index, info.name)
        components = {
            name: None
            if name in family.unused_components or entry[1] is None
            else _component(folder / name, *entry)
            for name, entry in index.items()
            if isinstance(entry, list)
        }
        settings = {
            name: value
            for name, value in index.items()
            if not name.startswith("_") and not isinstance(value, list)
        }
        if "safety_checker" in components:
            settings["requires_safety_checker"] = False
        pipeline = _class("diffusers", str(index["_class_name"]))(**components, **settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"its configs cannot be read: {error!r}"[:300],
            where=str(folder),
            fix="copy or download the model again",
        ) from error
    refuse_variants(family, getattr(pipeline, family.denoiser).config, info.name)
    complete_lora_methods(pipeline, family)
    pipeline.set_progress_bar_config(disable=True)
    narrow = torch.float32 if dtype == torch.float16 else dtype  # as load_pipeline: VAEs overflow
    dtypes = {family.denoiser: denoiser_dtype, "vae": narrow}
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            _cast(component.eval().requires_grad_(False), dtypes.get(name, dtype))
    return pipeline, family


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """`module.to(dtype)` without diffusers' remarks on it."""
    for inner in module.modules():
        for store in (inner._parameters, inner._buffers):
            tensors: Any = store
            for name, value in tensors.items():
                if value is not None and value.is_floating_point():
                    cast = value.detach().to(dtype)
                    tensors[name] = (
                        nn.Parameter(cast, requires_grad=False)
                        if isinstance(value, nn.Parameter)
                        else cast
                    )


def config_folder(info: ModelInfo, revision: str | None) -> Path:
    """Where the configs of a model lie: its own folder, or its place in the local cache.

    Raises:
        UserError: it was never downloaded; names the command that fetches its configs.
    """
    folder = Path(info.source).expanduser()
    if folder.is_dir():
        return folder
    try:
        found = snapshot_download(
            info.source, revision=revision, local_files_only=True, allow_patterns=list(_CONFIGS)
        )
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            "its configs are not on this machine",
            where=info.name,
            fix=f"fetch them (a few megabytes):  {fetching(info.source, revision)}",
        ) from error
    if not (Path(found) / "model_index.json").is_file():
        raise UserError(
            "its configs are not all on this machine",
            where=info.name,
            fix=f"fetch them (a few megabytes):  {fetching(info.source, revision)}",
        )
    return Path(found)


def fetching(repository: str, revision: str | None) -> str:
    """The command that downloads a model's configs and tokenizers, and no weights."""
    patterns = " ".join(f"--include '{pattern}'" for pattern in _CONFIGS)
    chosen = f" --revision {revision}" if revision else ""
    return f"hf download {repository}{chosen} {patterns}"


def _component(folder: Path, library: str, name: str) -> Any:
    kind = _class(library, name)
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(str(folder))
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(kind.load_config(str(folder)))
        return kind(kind.config_class.from_pretrained(str(folder)))


def _class(library: str, name: str) -> Any:
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"a component of {library}, which is neither diffusers nor transformers")
    return getattr(import_module(library), name)
