"""Files and folders to rows of scores, in order, restartable.

    rewards = {name: load(name) for name in ("aesthetic", "compressibility")}
    rows = score_files(find_images(["pictures/"]), rewards, out="scores.jsonl")

A row is `{"path", "prompt", "scores": {name: number|null}, "error": null|text}`. A damaged image
becomes a row with null scores and the reason; the others keep theirs. When `out` exists already
its rows are kept and only the missing files are scored, so an interrupted run goes on where it
was; the result is the same, bit for bit, because batches are cut at the same places. A row with an
error is tried again: where the file was repaired meanwhile, the new row takes the old one's place.
A file that is not such a result is refused and left as it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reward_models.base import Reward, RewardError, check_scores
from reward_models.media import IMAGE_SUFFIXES, read_image
from reward_models.rows import (
    RowKey,
    ScoredFile,
    append_rows,
    json_lines,
    read_bytes,
    read_rows,
    replace_rows,
)

FilePath = str | os.PathLike[str]


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
    for number, entry in json_lines(read_bytes(source), source):
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
        RewardError: a missing prompt, an `out` that belongs to other rewards or is no such result
            (it is left as it is), a failing reward. Rows written so far stay in `out`.
    """
    if batch_size < 1:
        raise RewardError(f"batch size {batch_size} is below 1")
    files = list(map(Path, images))
    texts = {f: prompts if isinstance(prompts, str) else prompts.get(f, "") for f in files}
    _require_prompts(texts, rewards)
    target = None if out is None else Path(out)
    done = {} if target is None else read_rows(target, set(rewards))
    rows: list[ScoredFile] = []
    repaired: dict[RowKey, ScoredFile] = {}
    try:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            old = [done.get((str(file), texts[file])) for file in batch]
            if not all(map(_is_final, old)):
                # Half a batch may be in the file already. The whole is scored again, so that
                # batches, and with them the last bits, are those of an uninterrupted run.
                fresh = _score_batch(batch, [texts[file] for file in batch], rewards)
                if target is not None:
                    append_rows(target, [new for row, new in zip(old, fresh) if row is None])
                repaired |= {
                    (row.path, row.prompt): new
                    for row, new in zip(old, fresh)
                    if row is not None and row.error and row != new
                }
                old = [new if row is None or row.error else row for row, new in zip(old, fresh)]
            rows += [row for row in old if row is not None]
            if progress is not None:
                progress(len(rows), len(files))
    finally:
        # Once, not batch by batch: the file may be long. An interrupted run keeps them as well.
        if target is not None and repaired:
            replace_rows(target, repaired)
    return rows


def _is_final(row: ScoredFile | None) -> bool:
    """Whether a row of an earlier run still stands: its file may have been repaired since."""
    if row is None:
        return False
    if not row.error:
        return True
    try:
        read_image(row.path)
    except RewardError:
        return True
    return False


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
