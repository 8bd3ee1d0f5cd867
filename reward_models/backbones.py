"""CLIP towers on open_clip: read once per process, frozen, shared between scorers.

A tower is built without memory (torch's meta device) and then takes over the tensors of its
file, so loading costs one read and no random initialisation, and draws no random numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_models.base import RewardError
from reward_models.catalogue import TOWERS
from reward_models.weights import ASSETS, load_strict, locate, read_tensors

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ClipTower:
    """A frozen CLIP: pictures and prompts to un-normalised embeddings.

    Args:
        model: an open_clip CLIP, whose parameters are frozen here.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        size = model.visual.image_size
        self.image_size: int = size[0] if isinstance(size, tuple) else size

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.logit_scale.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.logit_scale.dtype
        return dtype

    @property
    def width(self) -> int:
        """D, the length of an embedding."""
        return int(self.model.text_projection.shape[1])

    def image_features(self, pixels: Tensor) -> Tensor:
        """Embed prepared pixels [B, 3, S, S] (see `preprocess`) as [B, D].

        The gradient reaches the pixels. Half-precision towers answer in float32.
        """
        features = self.model.encode_image(pixels.to(self.device, self.dtype))
        return features if self.dtype == torch.float64 else features.float()

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts as [B, D], without a gradient; long prompts are cut at 77 tokens."""
        tokens = _tokenizer(self.model.context_length)(list(prompts)).to(self.device)
        with torch.no_grad():
            features = self.model.encode_text(tokens)
        return features if self.dtype == torch.float64 else features.float()


def load_tower(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    given: str | os.PathLike[str] | None = None,
) -> ClipTower:
    """The tower of that name; a second call with the same arguments gives the same object.

    Args:
        name: a key of `catalogue.TOWERS`.
        given: the user's own copy of its weights: an open_clip state dict (.safetensors, .pt,
            .bin) or, for OpenAI's CLIP, the published TorchScript archive.

    Raises:
        RewardError: the weights cannot be had, are damaged, or belong to another model.
    """
    if dtype not in _DTYPES:
        raise RewardError(f"unknown dtype {dtype!r}", fix=f"one of {', '.join(_DTYPES)}")
    path = None if given is None else str(Path(given).expanduser().resolve())
    return _load_once(name, str(torch.device(device)), dtype, path)


def build_tower(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> ClipTower:
    """A tower of an open_clip model config that takes over the tensors of a file.

    Args:
        config: `embed_dim`, `vision_cfg`, `text_cfg` and optionally `quick_gelu`.
        tensors: open_clip keys; the token table may be sparse (`expand_token_table`).
        path: named in errors.

    Raises:
        RewardError: when they do not fit together.
    """
    open_clip = _open_clip()
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    full = expand_token_table(tensors, model.vocab_size, path)
    if "logit_scale" in full:  # some files keep it as [1]
        full["logit_scale"] = full["logit_scale"].reshape(model.logit_scale.shape)
    load_strict(model, full, path, assign=True)
    # The causal mask is the one tensor that no file holds.
    length = model.context_length
    model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)
    _refuse_unfilled(model)
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


@cache
def _load_once(name: str, device: str, dtype: str, given: str | None) -> ClipTower:
    row = TOWERS[name]
    path = locate(row.weights, given)
    tensors = read_tensors(path, archive_sha256=row.archive_sha256)
    tower = build_tower(_config(row.config), tensors, path)
    tower.model.to(device, _DTYPES[dtype])
    return tower


def _config(name: str) -> dict[str, Any]:
    if not name.endswith(".json"):
        config: dict[str, Any] = _open_clip().get_model_config(name)
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


@cache
def _tokenizer(context_length: int) -> Any:
    return _open_clip().SimpleTokenizer(context_length=context_length)


def _open_clip() -> Any:
    """open_clip takes seconds to import: only who needs a tower pays."""
    try:
        import open_clip
    except ImportError as error:
        raise RewardError(
            f"open_clip cannot be imported: {error}", fix="pip install open_clip_torch torchvision"
        ) from error
    return open_clip


def _refuse_unfilled(model: nn.Module) -> None:
    """A tensor left on the meta device would only show when it is used."""
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    empty += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        raise RuntimeError(f"this open_clip keeps tensors that no file holds: {empty}")
