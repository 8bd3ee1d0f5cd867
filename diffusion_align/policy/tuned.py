"""What a run left behind: a LoRA, or a whole model where every weight was trained. No torch.

The two are told apart by their files: a model has diffusers' `model_index.json`, a LoRA is one
safetensors file. A folder of a run stands for its `final/`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.errors import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"
MODEL_FILE = "model_index.json"
_RUN_FILES = ("metrics.jsonl", "checkpoints", "config.yaml")


@dataclass(frozen=True)
class Tuned:
    """A tuned model on disk.

    Args:
        path: the LoRA's file, or the folder of the model.
        whole: whether it is a model of its own and not a LoRA for another.
    """

    path: Path
    whole: bool

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.path if self.whole else self.path.parent


def find_tuned(path: str | Path) -> Tuned:
    """What lies at `path`: a LoRA's file or folder, a saved pipeline, or a run with either.

    Raises:
        UserError: nothing there, neither of the two, or several LoRAs.
    """
    given = Path(path).expanduser()
    if given.is_file():
        if given.suffix != ".safetensors":
            raise UserError("this file is no LoRA", where=str(given), fix=_WANTED)
        return Tuned(given, whole=False)
    if not given.is_dir():
        raise UserError("no such LoRA or model", where=str(given), fix=_WANTED)
    inner = given / "final"
    folder = inner if inner.is_dir() and not (given / MODEL_FILE).is_file() else given
    if (folder / MODEL_FILE).is_file():
        return Tuned(folder, whole=True)
    if (folder / LORA_FILE).is_file():
        return Tuned(folder / LORA_FILE, whole=False)
    if component := _component(folder):
        raise UserError(
            f"this is a {component} alone, neither a LoRA nor a whole model",
            where=str(folder),
            fix="give the folder of the pipeline it belongs to, or save it in one",
        )
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return Tuned(files[0], whole=False)
    if files:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"which LoRA is meant? {names}", where=str(folder), fix="give the file itself"
        )
    if any((folder / name).exists() for name in _RUN_FILES):
        raise UserError(
            "this run has no final/ yet, so it holds no LoRA weights and no model",
            where=str(folder),
            fix=f"finish it: diffusion-align train {folder / 'config.yaml'} --resume",
        )
    raise UserError(
        "this folder holds no LoRA weights and no model", where=str(folder), fix=_WANTED
    )


def find_lora(path: str | Path) -> Path:
    """The file of the LoRA at `path`, as `find_tuned` finds it.

    Raises:
        UserError: as there, or a whole model.
    """
    tuned = find_tuned(path)
    if tuned.whole:
        raise UserError(
            "this is a whole model, not a LoRA", where=str(tuned.path), fix="name it as the model"
        )
    return tuned.path


_WANTED = f"give a run, its final/ folder, a LoRA ({LORA_FILE}), or a saved diffusers pipeline"


def _component(folder: Path) -> str:
    """The class of a component saved on its own, e.g. UNet2DConditionModel; "" where it is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("_class_name", "")) if isinstance(config, dict) else ""
