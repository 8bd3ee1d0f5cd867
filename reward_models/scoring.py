"""Files and folders to rows of scores, in order, restartable.

    rewards = {name: load(name) for name in ("aesthetic", "compressibility")}
    rows = score_files(find_images(["pictures/"]), rewards, out="scores.jsonl")

A row is `{"path", "prompt", "scores": {name: number|null}, "error": null|text}`. A damaged image
becomes a row with null scores and the reason; the others keep theirs. When `out` exists already
its rows are kept and only the missing files are scored, so an interrupted run goes on where it
was; the result is the same, bit for bit, because batches are cut at the same places.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_models.base import Reward, RewardError, check_scores
from reward_models.media import IMAGE_SUFFIXES, read_image

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class ScoredFile:
    """One file's scores by reward name; None where there is no score, and then `error` says why."""

    path: str
    prompt: str
    scores: Mapping[str, float | None]
    error: str | None = None

    def as_json(self) -> str:
        """The row as one line of JSON."""
        row = {
            "path": self.path,
            "prompt": self.prompt,
            "scores": dict(self.scores),
            "error": self.error,
        }
        text = json.dumps(row, ensure_ascii=False)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a file name that is not UTF-8
            text = json.dumps(row)
        return text


def find_images(paths: Iterable[FilePath]) -> list[Path]:
    """Files as given, and the images of folders (below them too) in the order of their names.

    Raises:
        RewardError: a path that does not exist, or no image at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            found += sorted(p for p in inside if p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise RewardError("no such file or folder", where=str(path))
    if not found:
        raise RewardError(
            "there are no images to score", fix=f"known endings: {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return list(dict.fromkeys(found))


def read_prompts(path: FilePath, images: Sequence[Path]) -> dict[Path, str]:
    """Prompts of images from JSON lines `{"path": ..., "prompt": ...}`.

    A path in the file counts from the working folder or from the file's own folder. Lines about
    other files are allowed, images without a line too: whether that matters, the rewards decide.

    Returns:
        image -> prompt, for those images that have one.

    Raises:
        RewardError: naming file and line, when it is unreadable or contradicts itself.
    """
    source = Path(path)
    wanted = {image.resolve(): image for image in images}
    prompts: dict[Path, str] = {}
    for number, entry in _json_lines(_read_bytes(source), source):
        if not isinstance(entry.get("path"), str) or not isinstance(entry.get("prompt"), str):
            raise RewardError(
                'a line needs the texts "path" and "prompt"', where=f"{source}:{number}"
            )
        for base in (Path(), source.parent):
            image = wanted.get((base / entry["path"]).resolve())
            if image is None:
                continue
            if prompts.setdefault(image, entry["prompt"]) != entry["prompt"]:
                raise RewardError(f"a second prompt for {image}", where=f"{source}:{number}")
            break
    return prompts


def score_files(
    images: Sequence[FilePath],
    rewards: Mapping[str, Reward],
    *,
    prompts: Mapping[Path, str] | str = "",
    out: FilePath | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[ScoredFile]:
    """Score every image with every reward.

    Images of one batch that differ in size are scored in groups of equal size.

    Args:
        images: files, e.g. from `find_images`; their order is the order of the rows.
        rewards: name -> reward; the names are the keys of `scores`.
        prompts: one prompt for all, or a prompt per image, e.g. from `read_prompts`.
        out: a JSON-lines file that is written as the work goes on, and continued if it exists.
        progress: called with (files done, files in all) after every batch.

    Raises:
        RewardError: a missing prompt, an `out` that belongs to other rewards, a failing reward.
            Rows written so far stay in `out`.
    """
    if batch_size < 1:
        raise RewardError(f"batch size {batch_size} is below 1")
    files = list(map(Path, images))
    texts = {f: prompts if isinstance(prompts, str) else prompts.get(f, "") for f in files}
    _require_prompts(texts, rewards)
    target = None if out is None else Path(out)
    done = {} if target is None else _read_rows(target, set(rewards))
    rows: list[ScoredFile] = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        kept = [done.get((str(file), texts[file])) for file in batch]
        if not all(kept):
            # Half a batch may be in the file already. The whole is scored again, so that batches,
            # and with them the last bits of the scores, are those of an uninterrupted run.
            fresh = _score_batch(batch, [texts[file] for file in batch], rewards)
            missing = [new for old, new in zip(kept, fresh, strict=True) if old is None]
            if target is not None:
                _append(target, missing)
            kept = [old or new for old, new in zip(kept, fresh, strict=True)]
        rows += [row for row in kept if row is not None]
        if progress is not None:
            progress(len(rows), len(files))
    return rows


def _score_batch(
    files: Sequence[Path], prompts: Sequence[str], rewards: Mapping[str, Reward]
) -> list[ScoredFile]:
    pictures: dict[int, Tensor] = {}
    errors: dict[int, str] = {}
    for index, file in enumerate(files):
        try:
            pictures[index] = read_image(file)
        except RewardError as error:
            errors[index] = str(error)
    scores: list[dict[str, float | None]] = [dict.fromkeys(rewards) for _ in files]
    by_size: dict[torch.Size, list[int]] = {}
    for index, picture in pictures.items():
        by_size.setdefault(picture.shape, []).append(index)
    for group in by_size.values():
        media = torch.stack([pictures[index] for index in group])
        texts = [prompts[index] for index in group]
        for name, reward in rewards.items():
            with torch.no_grad():
                values = check_scores(reward.score(media, texts), len(group), name).values
            for index, value in zip(group, values.tolist(), strict=True):
                scores[index][name] = None if math.isnan(value) else value
    for index in pictures:
        if unscored := [name for name, value in scores[index].items() if value is None]:
            errors[index] = f"could not be scored by {', '.join(unscored)}"
    return [
        ScoredFile(str(file), prompt, scores[index], errors.get(index))
        for index, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]


def _require_prompts(texts: Mapping[Path, str], rewards: Mapping[str, Reward]) -> None:
    needy = [name for name, reward in rewards.items() if reward.info.needs_prompt]
    without = [str(file) for file, text in texts.items() if not text.strip()]
    if needy and without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise RewardError(
            f"{', '.join(needy)} needs a prompt for every image; "
            f"none for {', '.join(without[:3])}{more}",
            fix='give one prompt for all, or JSON lines {"path": ..., "prompt": ...}',
        )


def _read_rows(path: Path, names: set[str]) -> dict[tuple[str, str], ScoredFile]:
    """The rows that an earlier run left; what follows the last newline was cut off and goes."""
    if not path.exists():
        return {}
    content = _read_bytes(path)
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    rows: dict[tuple[str, str], ScoredFile] = {}
    for number, entry in _json_lines(whole, path):
        row = _as_row(entry, f"{path}:{number}")
        found = set(row.scores)
        if found != names:
            raise RewardError(
                f"holds scores of {', '.join(sorted(found)) or 'nothing'}, "
                f"not of {', '.join(sorted(names))}",
                where=f"{path}:{number}",
                fix="name another file for the result, or remove this one",
            )
        rows[(row.path, row.prompt)] = row
    return rows


def _as_row(entry: Mapping[str, Any], where: str) -> ScoredFile:
    path, prompt, scores = entry.get("path"), entry.get("prompt"), entry.get("scores")
    if isinstance(path, str) and isinstance(prompt, str) and isinstance(scores, dict):
        return ScoredFile(path, prompt, scores, entry.get("error"))
    raise RewardError("is not a row of scores", where=where)


def _append(path: Path, rows: Sequence[ScoredFile]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.writelines(row.as_json() + "\n" for row in rows)
    except OSError as error:
        raise RewardError(f"cannot be written: {error.strerror}", where=str(path)) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RewardError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _json_lines(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RewardError(f"is not UTF-8 (byte {error.start})", where=str(path)) from error
    # Not splitlines(): it also cuts at characters that JSON allows inside a prompt.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise RewardError(f"is not JSON: {error}", where=f"{path}:{number}") from error
        if not isinstance(entry, dict):
            raise RewardError("is not a JSON object", where=f"{path}:{number}")
        yield number, entry
