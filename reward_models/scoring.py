"""Images and videos on disk to rows of scores, in order, restartable.

    rewards = {name: load(name) for name in ("aesthetic", "compressibility")}
    rows = score_files(find_items(["pictures/"]), rewards, out="scores.jsonl")

A row is `{"path", "prompt", "scores": {name: number|null}, "error": null|text}`. A damaged file
becomes a row with null scores and the reason; the others keep theirs. When `out` exists already
its rows are kept and only the missing files are scored, so an interrupted run goes on where it
was; the result is the same, bit for bit, because batches are cut at the same places. A row with an
error is tried again: where the file was repaired meanwhile, the new row takes the old one's place.
A file that is not such a result, or was made in another way, is refused and left as it is.

Every file is read once for all rewards, and the next ones are read while the current are scored.
Pictures wait as levels (`pixels`) and are scored in groups of bounded bytes, which are cut by the
sizes of a batch's pictures alone: memory grows neither with a batch's photographs nor with timing.
Rewards on one tower share its forward pass. Of a video only the frames are decoded that some reward
looks at: an image reward sees those that `frames` selects, and its scores of them are pooled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from reward_models.base import Reward, RewardError
from reward_models.clips import Clip, ClipView
from reward_models.inputs import Item, find_images, is_video, read_prompts, with_prompts
from reward_models.judging import Judged, Judges, error_of
from reward_models.media import read_picture
from reward_models.pixels import Picture, stack
from reward_models.read_ahead import READ_AHEAD, Reserve, read_ahead
from reward_models.rows import Results, ScoredFile

__all__ = [
    "Item",
    "Scored",
    "ScoredFile",
    "find_images",
    "read_prompts",
    "refuse_missing_prompts",
    "score_files",
    "score_items",
]

FilePath = str | os.PathLike[str]
Progress = Callable[[int, int], None]

LARGEST_GROUP = 2**28
"""Bytes of pictures, as float32, that are scored at once; one that is larger is scored alone."""


@dataclass(frozen=True)
class Scored:
    """What came of a run.

    Args:
        rows: in the order of the items.
        truncated: by reward, how many of the prompts scored now were longer than it reads.
    """

    rows: list[ScoredFile]
    truncated: Mapping[str, int]


def score_files(
    files: Sequence[FilePath | Item],
    rewards: Mapping[str, Reward],
    *,
    prompts: Mapping[Path, str] | str = "",
    out: FilePath | None = None,
    batch_size: int = 16,
    frames: str = "uniform:8",
    pool: str = "mean",
    parts: bool = False,
    progress: Progress | None = None,
) -> list[ScoredFile]:
    """Score every image and video with every reward.

    Images of one batch that differ in size are scored in groups of equal size, large ones in groups
    of at most `LARGEST_GROUP` bytes; videos one by one.
    Where an image reward meets a video, `frames` and `pool` say how (`reward_models.video`); where
    a video reward meets an image, the score is None and the row's error says so.

    Args:
        files: e.g. from `find_items` or `find_images`; their order is the order of the rows.
        rewards: name -> reward; the names are the keys of `scores`.
        prompts: one prompt for all, or a prompt per file, e.g. from `read_prompts`; an item that
            brings its own keeps it.
        out: a file that is continued if it exists: JSON lines, written as the work goes on, or
            .csv or .parquet, written at the end.
        frames: which frames of a video an image reward looks at.
        pool: how its scores of them become one.
        parts: keep the sub-scores of a reward, as `name/part` behind `name`.
        progress: called with (files done, files in all) at the start and after every batch.

    Raises:
        RewardError: a missing prompt, an `out` that belongs to other rewards, was made with other
            `frames`, `pool` or `parts`, or is no such result (it is left as it is), a failing
            reward. Rows written so far stay.
    """
    items = [file if isinstance(file, Item) else Item(Path(file)) for file in files]
    items = with_prompts(items, prompts)
    refuse_missing_prompts(items, [n for n, r in rewards.items() if r.info.needs_prompt])
    results = None if out is None else Results(Path(out), list(rewards), parts=parts)
    return score_items(
        items,
        rewards,
        results,
        batch_size=batch_size,
        view=ClipView(frames, pool, batch_size=batch_size),
        parts=parts,
        progress=progress,
    ).rows


def refuse_missing_prompts(items: Sequence[Item], names: Sequence[str]) -> None:
    """Refuse items without a prompt where the rewards of these names need one.

    Raises:
        RewardError: naming the first of the files.
    """
    without = [str(item.path) for item in items if not (item.prompt or "").strip()]
    if names and without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise RewardError(
            f"{', '.join(names)} needs a prompt for every image; "
            f"none for {', '.join(without[:3])}{more}",
            fix='give one prompt for all, or JSON lines {"path": ..., "prompt": ...}',
        )


def score_items(
    items: Sequence[Item],
    rewards: Mapping[str, Reward],
    results: Results | None = None,
    *,
    batch_size: int = 16,
    view: ClipView | None = None,
    parts: bool = False,
    progress: Progress | None = None,
) -> Scored:
    """As `score_files`, of items that have their prompts, into results that were opened already."""
    if batch_size < 1:
        raise RewardError(f"batch size {batch_size} is below 1")
    refuse_missing_prompts(items, [n for n, r in rewards.items() if r.info.needs_prompt])
    _refuse_group_judges(rewards)
    view = view or ClipView()
    if results is not None:
        results.made_with(frames=view.frames, pool=view.pool)
    judges = Judges(rewards, view, parts)
    batches = [
        _planned(items[start : start + batch_size], results, judges)
        for start in range(0, len(items), batch_size)
    ]
    rows: list[ScoredFile] = []
    if progress is not None:
        progress(0, len(items))
    complete = False
    try:
        jobs = (job for batch in batches for job in _jobs(batch, judges))
        with closing(read_ahead(jobs, ahead=batch_size)) as media:
            for batch in batches:
                rows += _finished(batch, media, judges, results)
                if progress is not None:
                    progress(len(rows), len(items))
        complete = True
    finally:
        # An interrupted run keeps what was repaired as well.
        if results is not None:
            results.close(complete=complete)
    return Scored(rows, judges.truncated)


Media = Picture | Clip | RewardError
"""What reading a file gives; the error of one that cannot be read."""


@dataclass(frozen=True)
class _Batch:
    """Items that are scored together, and their old rows.

    Args:
        files: what is to be read, pictures first, with the items that each belongs to; none if all
            rows stand.
        doubtful: files whose rows are errors of an earlier run, where no row is missing: only if
            one of them can be read by now, the batch is scored.
    """

    items: Sequence[Item]
    old: list[ScoredFile | None]
    files: Mapping[Path, list[int]]
    doubtful: Sequence[Path] = ()


def _planned(items: Sequence[Item], results: Results | None, judges: Judges) -> _Batch:
    """What is to be done about a batch, by the rows of an earlier run; no file is opened."""
    old = [
        None if results is None else results.get(str(item.path), item.prompt or "")
        for item in items
    ]
    doubtful = [
        item.path
        for row, item in zip(old, items)
        if row is not None and row.error and row.error != judges.standing_error(item.path)
    ]
    if None not in old and not doubtful:
        return _Batch(items, old, {})
    # Half a batch may be there already. The whole is scored again, so that batches, and with them
    # the last bits, are those of an uninterrupted run.
    places: dict[Path, list[int]] = {}
    for index in sorted(range(len(items)), key=lambda index: is_video(items[index].path)):
        places.setdefault(items[index].path, []).append(index)
    return _Batch(items, old, places, () if None in old else list(dict.fromkeys(doubtful)))


def _jobs(batch: _Batch, judges: Judges) -> Iterator[Callable[[Reserve], Media | None]]:
    if batch.doubtful:
        return (partial(_probe, path, judges) for path in batch.doubtful)
    return (partial(_read, path, judges) for path in batch.files)


def _read(path: Path, judges: Judges, reserve: Reserve) -> Media:
    """The media of a file, or why it has none."""
    try:
        if is_video(path):
            reserve(READ_AHEAD)  # one clip at a time, whatever it holds
            return judges.view.read(path, judges.rewards.values())
        return read_picture(path, reserve)
    except RewardError as error:
        return error


def _probe(path: Path, judges: Judges, reserve: Reserve) -> Media | None:
    """Why a file cannot be read; None if it can."""
    media = _read(path, judges, reserve)
    return media if isinstance(media, RewardError) else None


def _finished(
    batch: _Batch, media: Iterator[Media | None], judges: Judges, results: Results | None
) -> list[ScoredFile]:
    """The rows of a batch, old ones and new, the new ones written."""
    errors = [next(media) for _ in batch.doubtful]
    if not batch.files or (errors and None not in errors):
        return [row for row in batch.old if row is not None]
    if errors:
        jobs = (partial(_read, path, judges) for path in batch.files)
        with closing(read_ahead(jobs, ahead=len(batch.items))) as again:
            fresh = _score_batch(batch, again, judges)
    else:
        fresh = _score_batch(batch, media, judges)
    pairs = list(zip(batch.old, fresh, strict=True))
    if results is not None:
        results.add([new for row, new in pairs if row is None])
        results.mend([new for row, new in pairs if row and row.error and row != new])
    return [new if row is None or row.error else row for row, new in pairs]


def _score_batch(batch: _Batch, media: Iterator[Media | None], judges: Judges) -> list[ScoredFile]:
    judged: dict[int, Judged] = {}
    errors: dict[int, str] = {}
    waiting: list[tuple[int, Picture]] = []
    size = 0  # of those that wait, as float32
    for places in batch.files.values():
        found = next(media)
        if isinstance(found, RewardError):
            errors |= {index: _unreadable(found, batch.items[index]) for index in places}
        elif isinstance(found, Clip):
            judged |= _judge_pictures(waiting, batch.items, judges)
            waiting, size = [], 0
            texts = [batch.items[index].prompt or "" for index in places]
            judged |= zip(places, judges.judge(found, texts), strict=True)
        elif found is not None:
            size += found.float_bytes * len(places)
            if size > LARGEST_GROUP:
                judged |= _judge_pictures(waiting, batch.items, judges)
                waiting, size = [], found.float_bytes * len(places)
            waiting += [(index, found) for index in places]
    judged |= _judge_pictures(waiting, batch.items, judges)
    rows = []
    for index, item in enumerate(batch.items):
        result = judged.get(index) or Judged(dict.fromkeys(judges.rewards))
        named = {name: result.scores[name] for name in judges.rewards}
        error = errors.get(index) or error_of(named, result.reasons)
        rows.append(ScoredFile(str(item.path), item.prompt or "", result.scores, error))
    return rows


def _judge_pictures(
    pictures: Sequence[tuple[int, Picture]], items: Sequence[Item], judges: Judges
) -> dict[int, Judged]:
    """By item what rewards say of its picture; those of one size are looked at together."""
    judged: dict[int, Judged] = {}
    groups: dict[tuple[int, int], list[tuple[int, Picture]]] = {}
    for index, picture in pictures:
        groups.setdefault(picture.size, []).append((index, picture))
    for group in groups.values():
        group.sort(key=lambda member: member[0])
        # One picture may have more prompts than there is room for copies of it.
        count = max(1, LARGEST_GROUP // group[0][1].float_bytes)
        for start in range(0, len(group), count):
            indices, members = zip(*group[start : start + count], strict=True)
            texts = [items[index].prompt or "" for index in indices]
            judged |= zip(indices, judges.judge(stack(members), texts), strict=True)
    return judged


def _unreadable(error: RewardError, item: Item) -> str:
    if item.where and not item.path.is_file():
        return f"{error} (named in {item.where})"
    return str(error)


def _refuse_group_judges(rewards: Mapping[str, Reward]) -> None:
    for name, reward in rewards.items():
        if reward.info.scope != "item":
            raise RewardError(
                "judges all samples of one prompt together, and files are scored one by one",
                where=f"reward {name}",
            )
