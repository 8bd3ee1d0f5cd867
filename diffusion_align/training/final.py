"""The folder `final/`: the tuned weights, and whatever was put beside them later (a report).

Weights are replaced as a whole. What lies beside earlier ones belongs to these: it is neither kept
with other weights nor deleted, but moved aside together with them. What is made from the weights
(the ComfyUI layout, a model card that nobody edited) is made again and takes no part in this.
"""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffusion_align.publish.contents import COMFYUI_FILE
from diffusion_align.publish.signature import CARD_FILE, is_untouched
from diffusion_align.training.checkpoint import write_atomically


def write_final(target: Path, save: Callable[[Path], Any], say: Callable[[str], None]) -> None:
    """Let `save` write the weights; `target` holds them afterwards.

    Where it holds the same already, nothing is touched. Where it holds more than weights, it is
    moved to `final.old-1` (the next free number), which is told to `say`.

    Raises:
        UserError: the disk is full or cannot be written.
    """

    def keep_as(written: Path) -> Path | None:
        names = _files(written)
        if all(_same(target / name, written / name) for name in names):
            return target
        if _files(target) - _derived(target) <= names:
            return None
        aside = _free(target)
        say(f"{target} held a comparison or a card of earlier weights: it is {aside} now")
        return aside

    write_atomically(target, save, keep_as=keep_as)


def _derived(folder: Path) -> set[str]:
    return {COMFYUI_FILE, *([CARD_FILE] if is_untouched(folder / CARD_FILE) else [])}


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _same(old: Path, new: Path) -> bool:
    if not old.is_file():
        return False
    if new.suffix != ".safetensors":
        return filecmp.cmp(old, new, shallow=False)
    # Tensors, not bytes: the order of a file's metadata may differ from one writing to the next.
    try:
        before, after = load_file(old), load_file(new)
    except Exception:  # whatever is wrong with the old one, it is not the same
        return False
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in after
    )


def _free(target: Path) -> Path:
    number = 1
    while (target.parent / f"{target.name}.old-{number}").exists():
        number += 1
    return target.parent / f"{target.name}.old-{number}"
