"""Weight files to tensors by plain names, without running anything in them.

safetensors are read directly. Pickles are never executed: `torch.load(weights_only=True)` builds
tensors and refuses every other class; a whole pickled module, where it is expected, goes through
`pickled_module`. A TorchScript archive is a program, so it is opened only when its sha256 is that
of a published file. What a pickle held is kept as safetensors (`converted`) and read from there
the next time.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.base import RewardError
from reward_models.weights.verified import sha256_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_MAX_WRAPPERS = 4  # a dict can hold itself
_PREFIXES = ("module.", "_orig_mod.", "mps.")
# Written into OpenAI's archives beside the weights.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
# What is often found under the name of a weight file, by its first bytes.
_STRANGERS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file that it points to"),
    (b"<", "is a web page, not a weight file"),
)
_SLACK = 64 << 20


def read_tensors(
    path: Path, *, archive_sha256: str = "", pickled_module: bool = False
) -> dict[str, Tensor]:
    """Read a weight file on the CPU and bring its keys to plain names.

    Unwraps `state_dict`, `model_state_dict` and `model`, strips `module.`, `_orig_mod.` and `mps.`,
    drops `position_ids`. Tensors keep their dtype, are contiguous and carry no gradient.

    Args:
        archive_sha256: the one TorchScript archive that may be opened.
        pickled_module: also take a whole pickled `nn.Module`; only its tensors are read.

    Raises:
        RewardError: unreadable, holding more than tensors, or a TorchScript program.
    """
    from reward_models.weights.converted import Source, read_copy, write_copy

    if path.suffix == ".safetensors":
        return _plain(_read_safetensors(path), path)
    try:
        # Each way of reading has its own copy: what one refuses, another one's copy must not give.
        source = Source.of(path, f"{archive_sha256} {pickled_module}")
        kept = read_copy(source)
        if kept is not None:
            return kept
        kind = _kind(path)
    except OSError as error:
        raise _damaged(path, error) from error
    if kind == "safetensors":
        return _plain(_read_safetensors(path), path)
    content = (
        _read_archive(path, archive_sha256)
        if kind == "TorchScript"
        else _read_pickle(path, pickled_module)
    )
    tensors = _plain(content, path)
    write_copy(source, tensors)
    return tensors


def load_strict(
    module: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, assign: bool = False
) -> None:
    """`load_state_dict` that says which keys and shapes do not fit, and in which file.

    Raises:
        RewardError: listing missing, unexpected and misshapen keys, and what the file looks like.
    """
    from reward_models.weights.layouts import recognise

    try:
        result = module.load_state_dict(dict(tensors), strict=False, assign=assign)
    except RuntimeError as error:
        problem = f"its tensors do not fit this model: {shorten(str(error))}"
    else:
        problems = []
        if result.missing_keys:
            problems.append(f"missing {_sample(result.missing_keys)}")
        if result.unexpected_keys:
            problems.append(f"unexpected {_sample(result.unexpected_keys)}")
        if not problems:
            return
        problem = "its keys do not fit this model: " + "; ".join(problems)
    guess = recognise(tensors)
    raise RewardError(
        f"{problem}; it looks like {guess}" if guess else problem,
        where=str(path),
        fix="is it the right file for this reward?",
    )


def shorten(text: str, limit: int = 300) -> str:
    """A text on one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _kind(path: Path) -> str:
    """By content: the hub's cache keeps files under names without an ending."""
    head = _head(path)
    if len(head) > 8 and head[8:9] == b"{":
        (length,) = struct.unpack("<Q", head[:8])
        if length <= path.stat().st_size - 8:
            return "safetensors"
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise _damaged(path, error) from error
        if any(name.endswith("/constants.pkl") for name in names):
            return "TorchScript"
    return "pickle"


def _head(path: Path) -> bytes:
    """The first bytes of the file, unless they are those of something that is no weight file."""
    with path.open("rb") as stream:
        head = stream.read(64)
    for start, what in _STRANGERS:
        if head.lstrip().startswith(start):
            raise RewardError(what, where=str(path), fix="fetch it again")
    return head


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        if path.is_file():
            _head(path)  # raises by itself where it knows better
        raise _damaged(path, error) from error


def _read_archive(path: Path, archive_sha256: str) -> dict[str, Tensor]:
    """Open a TorchScript archive only if it is byte for byte the published one."""
    import torch

    if not archive_sha256 or sha256_of(path) != archive_sha256:
        raise RewardError(
            "is a TorchScript archive, that is a program, and not a known published one; "
            "it was not opened",
            where=str(path),
            fix="give the plain weights (.safetensors, or a .pt/.bin state dict) instead",
        )
    state = torch.jit.load(str(path), map_location="cpu").state_dict()
    return {key: value for key, value in state.items() if key not in _NOT_WEIGHTS}


def _read_pickle(path: Path, pickled_module: bool) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not pickled_module:
            raise _refused(path, error) from error
    except Exception as error:
        # Over a damaged file torch raises whatever its reader stumbles on, from TypeError to
        # AssertionError. All mean the same, and the user reads which.
        raise _damaged(path, error) from error
    from reward_models.weights.pickled_module import read_module

    try:
        return read_module(path)
    except (ValueError, OSError) as error:
        raise _refused(path, error) from error


def _plain(content: Any, path: Path) -> dict[str, Tensor]:
    """A flat dict of contiguous tensors, however the file wrapped it."""
    import torch

    for _ in range(_MAX_WRAPPERS):
        inner = [key for key in _WRAPPERS if isinstance(content, Mapping) and key in content]
        found = next((key for key in inner if isinstance(content[key], Mapping)), None)
        if found is None:
            break
        content = content[found]
    if not isinstance(content, Mapping) or not content:
        raise RewardError("holds no weights by name", where=str(path))
    odd = [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor)]
    if odd:
        raise RewardError(f"holds more than tensors: {_sample(odd)}", where=str(path))
    _refuse_unusual(content, path)
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        name = str(key)
        while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
            name = name.removeprefix(prefix)
        if name in tensors:
            raise RewardError(f"holds {name} twice, under two prefixes", where=str(path))
        if name.rpartition(".")[2] != "position_ids":
            tensors[name] = value.detach().contiguous()
    return tensors


def _refuse_unusual(content: Mapping[Any, Tensor], path: Path) -> None:
    """Tensors that are not numbers in a row, or more of them than the file can hold."""
    import torch

    odd = [
        str(key)
        for key, value in content.items()
        if value.layout != torch.strided or value.is_quantized or value.is_meta
    ]
    if odd:
        raise RewardError(f"holds tensors that are not plain: {_sample(odd)}", where=str(path))
    # Strides of 0 let a few bytes stand for any number of elements.
    claimed = sum(value.numel() * value.element_size() for value in content.values())
    if claimed > 8 * path.stat().st_size + _SLACK:
        raise RewardError(
            f"claims {claimed:,} bytes of tensors, many times its own size", where=str(path)
        )


def _refused(path: Path, error: Exception) -> RewardError:
    """A pickle of something else than tensors, or none at all."""
    if path.stat().st_size < 16:
        reason = "it is no weight file"
    elif named := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        reason = f"it holds {named[1]}"
    else:
        # torch wraps what it found into the advice to read the file unsafely.
        reason = shorten(str(error.__context__ or error))
    return RewardError(
        f"is damaged or holds more than tensors, and nothing in it was executed: {reason}",
        where=str(path),
        fix="use a file that holds a plain state dict, best .safetensors",
    )


def _damaged(path: Path, error: Exception) -> RewardError:
    return RewardError(
        f"cannot be read as weights: {shorten(str(error)) or type(error).__name__}",
        where=str(path),
        fix="it may be cut off or damaged: fetch it again",
    )


def _sample(keys: list[str], limit: int = 5) -> str:
    shown = ", ".join(keys[:limit])
    return shown if len(keys) <= limit else f"{shown} and {len(keys) - limit} more"
