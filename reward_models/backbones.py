"""CLIP towers on open_clip: read once per process, frozen, shared between scorers.

A tower is built without memory (torch's meta device) and then takes over the tensors of its
file, so loading costs one read and no random initialisation, and draws no random numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from threading import RLock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from reward_models.base import RewardError
from reward_models.clip_tower import ClipTower, one_pass, open_clip_package
from reward_models.towers import TOWERS
from reward_models.weights import ASSETS, load_strict, locate, read_tensors
from reward_models.weights.layouts import to_open_clip

__all__ = [
    "CHANGED",
    "ClipTower",
    "build_tower",
    "changed_tower",
    "load_tower",
    "one_pass",
    "place_tower",
    "torch_device",
    "tower_config",
]

# How tensors of a trained reward are called that replace those of its tower.
CHANGED = "tower."

T = TypeVar("T")

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_tower(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    given: str | os.PathLike[str] | None = None,
) -> ClipTower:
    """The tower of that name; the same file, device and dtype give the same object again.

    Args:
        name: a key of `towers.TOWERS`.
        given: the user's own copy of its weights: a state dict in open_clip's or transformers'
            layout (.safetensors, .pt, .bin) or, for OpenAI's CLIP, the published TorchScript
            archive.

    Raises:
        RewardError: an unknown dtype or device, or the weights cannot be had, are damaged, or
            belong to another model.
    """
    torch_dtype(dtype)  # refused before anything is read
    where = str(torch_device(device))
    row = TOWERS[name]

    def read(path: Path) -> ClipTower:
        tensors = read_tensors(path, archive_sha256=row.archive_sha256)
        return place_tower(build_tower(tower_config(name), tensors, path), where, dtype)

    return _TOWERS_READ.get(lambda: locate(row.weights, given), (row.config, where, dtype), read)


class ReadOnce(Generic[T]):
    """What was made of files, each of which is read once: threads wait for each other.

    A file that was overwritten is read again, and what was made of the old one is let go.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._known: dict[Hashable, tuple[tuple[int, int], T]] = {}

    def get(self, find: Callable[[], Path], how: Hashable, read: Callable[[Path], T]) -> T:
        """What `read` makes of the file that `find` finds, or made of it before.

        Args:
            find: it may download; the file counts by where it lies, however it was named.
            how: what else `read` depends on, e.g. device and dtype.
        """
        with self._lock:
            path = find().resolve()
            stat = path.stat()
            stamp = (stat.st_size, stat.st_mtime_ns)
            known = self._known.get((path, how))
            if known is not None and known[0] == stamp:
                return known[1]
            # What is made under `torch.inference_mode` could take no part in a later gradient.
            with torch.inference_mode(False):
                made = read(path)
            self._known[path, how] = (stamp, made)
            return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._known.clear()


_TOWERS_READ: ReadOnce[ClipTower] = ReadOnce()


def build_tower(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> ClipTower:
    """A tower of an open_clip model config that takes over the tensors of a file.

    Args:
        config: `embed_dim`, `vision_cfg`, `text_cfg` and optionally `quick_gelu`.
        tensors: keys of open_clip's CLIP or transformers' CLIPModel; the token table may be sparse
            (`expand_token_table`).
        path: named in errors.

    Raises:
        RewardError: when they do not fit together.
    """
    open_clip = open_clip_package()
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    full = expand_token_table(to_open_clip(tensors), model.vocab_size, path)
    if "logit_scale" in full:  # some files keep it as [1]
        full["logit_scale"] = full["logit_scale"].reshape(model.logit_scale.shape)
    _fill(model, full, path)
    return ClipTower(model)


def expand_token_table(
    tensors: Mapping[str, Tensor], vocabulary: int, path: Path
) -> dict[str, Tensor]:
    """Undo the sparse storage of a token table; other files pass unchanged.

    Sparse: `token_embedding.rows` int32 [n] and `token_embedding.values` [n, width]; every other
    row of the [vocabulary, width] table is zero. Small models meet only few of 49,408 tokens.

    Raises:
        RewardError: when rows and values do not belong together.
    """
    full = dict(tensors)
    if "token_embedding.rows" not in full:
        return full
    rows = full.pop("token_embedding.rows").long()
    values = full.pop("token_embedding.values", None)
    if values is None or rows.ndim != 1 or values.ndim != 2 or len(rows) != len(values):
        raise RewardError("token_embedding.rows and .values do not match", where=str(path))
    if len(rows) and (rows.min() < 0 or rows.max() >= vocabulary):
        raise RewardError(
            f"token_embedding.rows reach outside 0..{vocabulary - 1}", where=str(path)
        )
    table = values.new_zeros(vocabulary, values.shape[1])
    table[rows] = values
    full["token_embedding.weight"] = table
    return full


def place_tower(tower: ClipTower, device: str, dtype: str) -> ClipTower:
    """Move a tower; the logit scale stays in float32, for in half it would be off by 0.1 %."""
    scale = tower.model.logit_scale.detach().float()
    tower.model.to(device, torch_dtype(dtype))
    if torch_dtype(dtype) in (torch.bfloat16, torch.float16):
        tower.model.logit_scale.data = scale.to(device)
    return tower


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        RewardError: with those that there are.
    """
    if name not in _DTYPES:
        raise RewardError(f"unknown dtype {name!r}", fix=f"one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def torch_device(name: str) -> torch.device:
    """The device of that name; "cuda" without a number is the current one, with its number.

    Raises:
        RewardError: an unknown device, or one that torch does not find here.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RewardError(f"unknown device {name!r}", fix="cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not found:
            raise RewardError(f"{name} asked for, but torch finds none", fix="device cpu")
        device = torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
        if device.index >= found:
            raise RewardError(
                f"{name} asked for, but torch finds only {found}", fix=f"cuda:0 to cuda:{found - 1}"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise RewardError("mps asked for, but torch finds none", fix="device cpu")
    elif device.type not in ("cpu", "mps", "meta"):
        raise RewardError(f"unknown device {name!r}", fix="cpu, cuda, cuda:1 or mps")
    return torch.device("cpu") if device.type == "cpu" else device  # not cpu:0, a key of its own


def changed_tower(
    base: ClipTower, config: Mapping[str, Any], changed: Mapping[str, Tensor], path: Path
) -> ClipTower:
    """A tower with some tensors of its own; all others are those of `base`, without a copy.

    Raises:
        RewardError: a tensor that the tower has not, or of another shape.
    """
    with torch.device("meta"):
        model = open_clip_package().CLIP(**config)
    whole: dict[str, Tensor] = dict(base.model.state_dict())
    for key, tensor in expand_token_table(changed, model.vocab_size, path).items():
        kept = torch.float32 if key == "logit_scale" else base.dtype
        whole[key] = tensor.to(base.device, torch.promote_types(kept, base.dtype))
    _fill(model, whole, path)
    model.attn_mask = model.attn_mask.to(base.device, base.model.attn_mask.dtype)
    return ClipTower(model)


def tower_config(name: str) -> dict[str, Any]:
    """The open_clip model config of a tower of the catalogue."""
    return _config(TOWERS[name].config)


def _fill(model: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Hand a model on the meta device its tensors."""
    load_strict(model, tensors, path, assign=True)
    # The causal mask is the one tensor that no file holds.
    length = model.context_length
    model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)
    _refuse_unfilled(model)


def _config(name: str) -> dict[str, Any]:
    if not name.endswith(".json"):
        config: dict[str, Any] = open_clip_package().get_model_config(name)
        return config
    path = ASSETS / name
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RewardError(
            f"the model's configuration cannot be read ({error})",
            where=str(path),
            fix="the installation is incomplete: reinstall the package",
        ) from error
    return loaded


def _refuse_unfilled(model: nn.Module) -> None:
    """A tensor left on the meta device would only show when it is used."""
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    empty += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        raise RuntimeError(f"this open_clip keeps tensors that no file holds: {empty}")
