"""Weight files: find them, verify them, read them without running anything in them.

Where a file is looked for, in this order: the path the user gave; beside the package (the tiny
models travel in it); the folder `REWARD_MODELS_HOME` (default ~/.cache/reward_models); the
Hugging Face hub and its cache (`HF_HOME`, `HF_HUB_OFFLINE` and mirrors are honoured by
huggingface_hub itself); a plain URL. Files with a published sha256 are verified on the way.

Pickles are never executed: `torch.load(weights_only=True)` builds tensors and refuses every
other class. A TorchScript archive is a program, so it is opened only when its sha256 is that of
a published file.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.base import RewardError

if TYPE_CHECKING:
    from torch import Tensor, nn

ASSETS = Path(__file__).parent / "assets"
ASSET_SUMS = "SHA256SUMS"  # JSON: {file name: sha256}

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
# Written into OpenAI's archives beside the weights.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class WeightFile:
    """Where one weight file comes from. No torch: the catalogue is made of these.

    Args:
        name: the file's own name, under which users keep it.
        sha256: of the published file, where known; "" means that none is published.
        repo, files, revision: a hub repository, its names there (the first one that can be had is
            taken; () means `name`), a pinned commit or tag.
        url: where it is served outside the hub.
        asset: the file travels inside the package (its sha256 is in assets/SHA256SUMS).
        megabytes: download size, for people.
    """

    name: str
    sha256: str = ""
    repo: str = ""
    files: tuple[str, ...] = ()
    revision: str = "main"
    url: str = ""
    asset: bool = False
    megabytes: float = 0.0

    @property
    def hub_files(self) -> tuple[str, ...]:
        return self.files or (self.name,)

    def fetch_command(self) -> str:
        """The exact command that puts the file where `locate` finds it; "" for an asset."""
        if self.repo:
            pin = "" if self.revision == "main" else f" --revision {self.revision}"
            return f"hf download {self.repo} {self.hub_files[0]}{pin}"
        if self.url:
            target = shlex.quote(str(home() / self.name))
            return f"curl -L --create-dirs -o {target} {shlex.quote(self.url)}"
        return ""


def home() -> Path:
    """The folder for files that do not come from the hub."""
    return Path(os.environ.get("REWARD_MODELS_HOME") or "~/.cache/reward_models").expanduser()


def on_disk(file: WeightFile) -> Path | None:
    """The file's path when this machine has it already; no network, nothing verified."""
    if file.asset:
        return ASSETS / file.name if (ASSETS / file.name).is_file() else None
    if (home() / file.name).is_file():
        return home() / file.name
    if file.repo:
        from huggingface_hub import try_to_load_from_cache

        for name in file.hub_files:
            cached = try_to_load_from_cache(file.repo, name, revision=file.revision)
            if isinstance(cached, str):
                return Path(cached)
    return None


def locate(file: WeightFile, given: str | os.PathLike[str] | None = None) -> Path:
    """The verified path of a weight file, downloaded when it has to be.

    Args:
        given: the user's own path. It is their choice of weights, so it is verified only when it
            carries the published file's name (then other content means a damaged file).

    Raises:
        RewardError: the file cannot be had (with the command that fetches it) or is damaged.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise RewardError("no such weight file", where=str(path), fix=_fetch_advice(file))
        if path.name in (file.name, *file.files):
            verify(path, _expected_sum(file))
        return path
    found = on_disk(file) or _download(file)
    verify(found, _expected_sum(file))
    return found


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    """Compare a file with its published sha256; an empty `expected` verifies nothing.

    Raises:
        RewardError: naming the file, when it is not the published one.
    """
    if expected and (actual := sha256_of(path)) != expected:
        raise RewardError(
            f"sha256 is {actual[:12]}..., the published file has {expected[:12]}...: "
            "it is damaged or another file under the same name",
            where=str(path),
            fix="delete it and fetch it again (your own weights need another file name)",
        )


def read_tensors(path: Path, *, archive_sha256: str = "") -> dict[str, Tensor]:
    """Read a weight file on the CPU and bring its keys to plain names.

    Unwraps `state_dict` and the like, strips `module.` and `_orig_mod.`, drops `position_ids`.

    Args:
        archive_sha256: the one TorchScript archive that may be opened.

    Raises:
        RewardError: unreadable, holding more than tensors, or a TorchScript program.
    """
    import torch

    if path.suffix == ".safetensors":
        content: Any = _read_safetensors(path)
    elif _is_torchscript(path):
        content = _read_archive(path, archive_sha256)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _refused(path, error) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise _damaged(path, error) from error
    return _plain(content, path)


def load_strict(
    module: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, assign: bool = False
) -> None:
    """`load_state_dict` that says which keys and shapes do not fit, and in which file.

    Raises:
        RewardError: listing missing, unexpected and misshapen keys.
    """
    try:
        result = module.load_state_dict(dict(tensors), strict=False, assign=assign)
    except RuntimeError as error:
        raise RewardError(
            f"its tensors do not fit this model: {_shorten(str(error))}", where=str(path)
        ) from error
    problems = []
    if result.missing_keys:
        problems.append(f"missing {_sample(result.missing_keys)}")
    if result.unexpected_keys:
        problems.append(f"unexpected {_sample(result.unexpected_keys)}")
    if problems:
        raise RewardError(
            "its keys do not fit this model: " + "; ".join(problems),
            where=str(path),
            fix="is it the right file for this reward?",
        )


def _expected_sum(file: WeightFile) -> str:
    """The published sha256; for an asset the one recorded beside it."""
    if not file.asset:
        return file.sha256
    try:
        sums = json.loads((ASSETS / ASSET_SUMS).read_text(encoding="utf-8"))
        return str(sums[file.name])
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(
            f"no sha256 of {file.name} is recorded",
            where=str(ASSETS / ASSET_SUMS),
            fix="the installation is incomplete: reinstall the package",
        ) from error


def _fetch_advice(file: WeightFile) -> str:
    if file.asset:
        return "the installation is incomplete: reinstall the package"
    command = file.fetch_command()
    fetch = f"fetch it with:  {command}\nor give" if command else "give"
    return f"{fetch} the path of the file ({file.name}) yourself"


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _download(file: WeightFile) -> Path:
    """From the hub, else from the URL."""
    reasons = ["offline mode is on"] if _offline() and (file.repo or file.url) else []
    if not reasons:
        for fetch in (_from_hub, _from_url):
            found = fetch(file)
            if isinstance(found, Path):
                return found
            reasons += [found] if found else []
    raise RewardError(
        f"the weights {file.name} are not on this machine"
        + (f" and could not be fetched ({'; '.join(reasons)})" if reasons else ""),
        fix=_fetch_advice(file),
    )


def _from_hub(file: WeightFile) -> Path | str:
    """The path, or why it cannot be had; "" when the file is on no hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason = ""
    for name in file.hub_files if file.repo else ():
        try:
            return Path(hf_hub_download(file.repo, name, revision=file.revision))
        except Exception as error:
            # The hub client raises its own, its HTTP library's and the system's errors, other
            # ones in every version. All mean "cannot be had", and the user reads why.
            reason = f"{file.repo}: {_shorten(str(error), 120)}"
            absent = isinstance(error, EntryNotFoundError)
            if not absent or isinstance(error, LocalEntryNotFoundError):
                break  # no connection: asking for the next name would only wait again
    return reason


def _from_url(file: WeightFile) -> Path | str:
    """The path, or why it cannot be had; "" when the file is at no URL."""
    from torch.hub import download_url_to_file

    if not file.url:
        return ""
    target = home() / file.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Writes beside the target and renames, so a broken transfer leaves nothing behind.
        download_url_to_file(file.url, str(target), file.sha256 or None, progress=False)
    except (OSError, RuntimeError) as error:
        return f"{file.url}: {_shorten(str(error), 120)}"
    return target


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


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


def _plain(content: Any, path: Path) -> dict[str, Tensor]:
    """A flat dict of tensors, however the file wrapped it."""
    import torch

    while isinstance(content, Mapping):
        inner = next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise RewardError("holds no weights by name", where=str(path))
    odd = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise RewardError(f"holds more than tensors: {_sample(odd)}", where=str(path))
    tensors = {}
    for key, value in content.items():
        name = str(key)
        while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
            name = name.removeprefix(prefix)
        if not name.endswith("position_ids"):
            tensors[name] = value
    return tensors


def _refused(path: Path, error: Exception) -> RewardError:
    reason = "it is no weight file" if path.stat().st_size < 16 else _shorten(str(error))
    return RewardError(
        f"is damaged or holds more than tensors, and nothing in it was executed: {reason}",
        where=str(path),
        fix="use a file that holds a plain state dict, best .safetensors",
    )


def _damaged(path: Path, error: Exception) -> RewardError:
    return RewardError(
        f"cannot be read as weights: {_shorten(str(error)) or type(error).__name__}",
        where=str(path),
        fix="it may be cut off or damaged: fetch it again",
    )


def _sample(keys: list[str], limit: int = 5) -> str:
    shown = ", ".join(keys[:limit])
    return shown if len(keys) <= limit else f"{shown} and {len(keys) - limit} more"


def _shorten(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
