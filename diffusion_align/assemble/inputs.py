"""The files a run reads, by content: a resumed run must not meet others under the same names.

`inputs.json` in the run folder holds `config key -> {"path", "sha256"}` of every file or folder of
the user's own that the config names. Weights from a hub or a catalogue are pinned by their
revision or by a published sha256 and are not looked at here; nor are the single pictures that
judgements name.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_align.errors import UserError
from diffusion_align.secrecy.redaction import redact_value

if TYPE_CHECKING:
    from diffusion_align.config import RewardRunConfig, RunConfig
    from diffusion_align.training.run_folder import RunFolder

INPUTS = "inputs.json"
# Other pictures are shown, or a mistake in one's own code was mended: said, not refused.
TOLD = ("evaluation.prompts", "evaluation.rewards", "reward (code)")
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_OF_A_MODEL = (*_WEIGHTS, ".json", ".txt", ".model")
_CAPTIONS = (".txt", ".jsonl", ".ndjson", ".csv", ".parquet")
_MEBIBYTE = 1 << 20
WHOLE = 64 * _MEBIBYTE
"""A larger file is known by its size and by `BLOCKS` of a mebibyte each, spread over it."""
BLOCKS = 32

Inputs = dict[str, dict[str, str]]


def look_at_inputs(
    config: RunConfig | RewardRunConfig, *, resume: bool, say: Callable[[str], None]
) -> Inputs:
    """What the files of a config hold now; on resume held against what they held then.

    Raises:
        UserError: a file that the run learns from has other contents than when the run began.
    """
    now = {key: _entry(name, files) for key, name, files in _files(config)}
    record = Path(str(config.output)).expanduser() / INPUTS
    if not resume or not record.exists():
        return now
    try:
        before: Inputs = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        say(f"{record} cannot be read ({error}): whether files changed is not known")
        return now
    changed = [
        key
        for key, entry in now.items()
        if key in before and before[key].get("sha256") != entry["sha256"]
    ]
    if barred := [key for key in changed if key not in TOLD]:
        raise UserError(
            "this run cannot go on with other files under the same names",
            where=str(record.parent),
            fix="\n".join(
                [
                    *(f"changed since it began: {key}: {now[key]['path']}" for key in barred),
                    "put the old contents back, or begin another run with --new",
                ]
            ),
        )
    for key in changed:
        say(f"changed since this run began: {key}: {now[key]['path']} has other contents")
    return now


def write_inputs(folder: RunFolder, inputs: Inputs) -> None:
    """inputs.json, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    from diffusion_align.training.disk import writing

    target, unfinished = folder.path / INPUTS, folder.path / f".{INPUTS}"
    with writing(target):
        text = json.dumps(redact_value(inputs), indent=2)
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, target)


def _files(config: RunConfig | RewardRunConfig) -> Iterator[tuple[str, str, list[Path]]]:
    """(key, the name as the config has it, its files) of whatever lies on this disk."""
    from diffusion_align.config import RunConfig

    if not isinstance(config, RunConfig):
        named = {"data.source": config.data.source, "data.validation": config.data.validation}
        for key, name in named.items():
            if name is not None and _is_file(name):
                yield key, name, [Path(name)]
        if files := _reward_files(config.reward.start):
            yield "reward.start", config.reward.start, files
        return
    if _is_file(config.prompts.source):
        yield "prompts.source", str(config.prompts.source), [Path(str(config.prompts.source))]
    if _is_file(config.evaluation.prompts):
        prompts = str(config.evaluation.prompts)
        yield "evaluation.prompts", prompts, [Path(prompts)]
    if config.supervised is not None:
        yield from _captions(config.supervised.pictures)
    model = Path(config.model.id).expanduser()
    if model.is_dir():
        inside = [path for path in model.glob("*/**/*") if path.suffix in _OF_A_MODEL]
        yield "model.id", config.model.id, [*model.glob("model_index.json"), *inside]
    if config.lora is not None and config.lora.path is not None:
        path = Path(config.lora.path).expanduser()
        inside = [*path.glob("*"), *path.glob("final/*")] if path.is_dir() else [path]
        files = [file for file in inside if file.suffix in _WEIGHTS]
        yield "lora.path", config.lora.path, files
    yield from _of_rewards("reward", [config.reward])
    yield from _of_rewards("evaluation.rewards", config.evaluation.rewards)


def _captions(pictures: str) -> Iterator[tuple[str, str, list[Path]]]:
    """Tables and texts with captions; the pictures themselves are not looked at."""
    path = Path(pictures).expanduser()
    inside = [f for f in path.rglob("*") if f.suffix in _CAPTIONS] if path.is_dir() else [path]
    if files := [file for file in inside if file.is_file()]:
        yield "supervised.pictures", pictures, files


def _of_rewards(key: str, names: object) -> Iterator[tuple[str, str, list[Path]]]:
    from reward_models.catalogue import components

    assert isinstance(names, list | tuple)
    files: list[Path] = []
    code: list[Path] = []
    for name in names:
        for component in components(name):
            files += _reward_files(component)
            code += _module_file(component)
    if files:
        yield key, ", ".join(names), files
    if code:
        yield (key if key in TOLD else f"{key} (code)"), ", ".join(names), code


def _reward_files(name: str) -> list[Path]:
    """The file of a reward that was trained here; none for a name of the catalogue."""
    from reward_models.base import RewardError
    from reward_models.catalogue import existing_file, is_file

    try:
        return [existing_file(name)] if is_file(name) else []
    except RewardError:
        return []  # loading it says what is wrong


def _module_file(name: str) -> list[Path]:
    """The source of the user's own `package.module:Name`, found without importing it."""
    module, separator, _ = name.partition(":")
    if not separator or not all(part.isidentifier() for part in module.split(".")):
        return []
    inside = Path(*module.split("."))
    for root in [*sys.path, os.getcwd()]:
        for file in (Path(root, inside).with_suffix(".py"), Path(root, inside, "__init__.py")):
            if file.is_file():
                return [file]
    return []


def _is_file(name: object) -> bool:
    return isinstance(name, str) and Path(name).expanduser().is_file()


def _entry(name: str, files: list[Path]) -> dict[str, str]:
    digest = hashlib.sha256()
    for file in sorted(file.expanduser() for file in files):
        if file.is_file():
            digest.update(f"{file.parent.name}/{file.name}\0".encode())
            digest.update(_contents(file))
    return {"path": name, "sha256": digest.hexdigest()}


def _contents(file: Path) -> bytes:
    """sha256 of a file; of a large one, of its size and of blocks spread over it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE:
            return hashlib.sha256(stream.read()).digest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(BLOCKS):
            stream.seek((size - _MEBIBYTE) * block // (BLOCKS - 1))
            digest.update(stream.read(_MEBIBYTE))
        return digest.digest()
