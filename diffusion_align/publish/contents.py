"""Which files of a run are uploaded: what `final/` is meant to hold, and nothing that lies beside.

A list of names, not of what to leave out: a forgotten notebook, a cache or a file with somebody's
key in it never goes along. Checkpoints and the run's record go only where they are asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.errors import UserError
from diffusion_align.policy.tuned import LORA_FILE, MODEL_FILE
from diffusion_align.publish.signature import CARD_FILE

COMFYUI_FILE = "comfyui_lora.safetensors"
REWARD_FILE = "reward.safetensors"
MANIFEST_FILE = ".diffusion-align.json"
"""Lists what an upload put into a repository, so that a later one knows it again."""
_EVIDENCE = ("report.html", "summary.json", "scores.csv", "grid.png")
_RECORD = ("config.yaml", "env.json", "run.json", "metrics.jsonl")
# What a component of a pipeline is saved as: settings, weights, vocabularies.
_MODEL_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".jinja"}
_PICTURE = re.compile(r"pictures/(?:base|tuned)/p\d+_s\d+\.png")


@dataclass(frozen=True)
class Upload:
    """One file: its name in the repository, and its path on disk or its content."""

    name: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        if isinstance(self.source, bytes):
            return len(self.source)
        return self.source.stat().st_size


def final_of(run: Path) -> Path:
    """`final/` of a run, or the folder itself where it is one.

    Raises:
        UserError: there is none, or it holds no weights.
    """
    if not run.is_dir():
        raise UserError("no such run", where=str(run), fix="give the folder of a run")
    inner = run / "final"
    folder = inner if inner.is_dir() else run
    if any((folder / name).is_file() for name in (LORA_FILE, MODEL_FILE, REWARD_FILE)):
        return folder
    config = run / "config.yaml"
    fix = "give the folder of a finished run"
    if config.is_file():
        fix = f"finish it first: diffusion-align train {config} --resume"
    raise UserError("there is no final/ with weights to publish here", where=str(run), fix=fix)


def contents(
    final: Path,
    card: str | None,
    *,
    run: Path | None = None,
    checkpoints: bool = False,
    record: bool = False,
) -> list[Upload]:
    """The files to upload, sorted by name, and a list of them for the next upload.

    Args:
        final: with a LoRA, a whole pipeline or a reward.
        card: text of README.md; None takes the file that is there.
        run: the run it belongs to; None is the folder above.
        checkpoints: also `checkpoints/` of the run.
        record: also config.yaml, env.json, run.json and metrics.jsonl of the run.

    Raises:
        UserError: a damaged `model_index.json`, or something asked for that is not there.
    """
    found = {name: final / name for name in (LORA_FILE, COMFYUI_FILE, REWARD_FILE, *_EVIDENCE)}
    found = {name: path for name, path in found.items() if path.is_file()}
    found.update(_pictures(final))
    if (final / MODEL_FILE).is_file():
        found.update((path.relative_to(final).as_posix(), path) for path in _pipeline(final))
    run = final.parent if run is None else run
    if record:
        found.update({name: run / name for name in _RECORD if (run / name).is_file()})
    if checkpoints:
        saved = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
        if not saved:
            raise UserError("there are no checkpoints to upload", where=str(run / "checkpoints"))
        found.update((path.relative_to(run).as_posix(), path) for path in saved)
    uploads = [Upload(name, path) for name, path in found.items()]
    if card is not None:
        uploads.append(Upload(CARD_FILE, card.encode()))
    elif (final / CARD_FILE).is_file():
        uploads.append(Upload(CARD_FILE, final / CARD_FILE))
    names = sorted([*(upload.name for upload in uploads), MANIFEST_FILE])
    manifest = json.dumps({"files": names}, indent=1) + "\n"
    uploads.append(Upload(MANIFEST_FILE, manifest.encode()))
    return sorted(uploads, key=lambda upload: upload.name)


def names_in(manifest: bytes) -> set[str]:
    """The names that a manifest lists; none where it is damaged."""
    try:
        files = json.loads(manifest)["files"]
    except (ValueError, KeyError, TypeError):
        return set()
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()


def refuse_secret(uploads: list[Upload], secret: str, source: str) -> None:
    """Refuse to upload a text that holds `secret`.

    Args:
        uploads: tensors are not looked at: nobody writes a token into them by accident.
        secret: its value.
        source: where it is from, for the message; the value itself is never shown.
    """
    wanted = secret.encode()
    for upload in uploads:
        if upload.name.endswith(".safetensors"):
            continue
        named = isinstance(upload.source, Path)
        content = upload.source.read_bytes() if isinstance(upload.source, Path) else upload.source
        if wanted in content:
            raise UserError(
                f"this file holds the value of {source}; nothing was uploaded",
                where=str(upload.source) if named else upload.name,
                fix="remove the value from it, and renew the token if the file was ever shared",
            )


def _pictures(final: Path) -> Iterator[tuple[str, Path]]:
    """Pictures that the report shows from beside it (it inlines what it can)."""
    report = final / "report.html"
    if report.is_file():
        for name in sorted(set(_PICTURE.findall(report.read_text(encoding="utf-8")))):
            if (final / name).is_file():
                yield name, final / name


def _pipeline(final: Path) -> Iterator[Path]:
    """model_index.json and the files of the components that it names."""
    index = final / MODEL_FILE
    try:
        parts = json.loads(index.read_text(encoding="utf-8")).items()
        folders = [name for name, kind in parts if isinstance(kind, list) and kind[0] is not None]
    except (ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"damaged: {error}", where=str(index), fix="save the model again"
        ) from error
    yield index
    for name in folders:
        for path in sorted((final / name).rglob("*")):
            if path.is_file() and path.suffix in _MODEL_SUFFIXES:
                yield path
