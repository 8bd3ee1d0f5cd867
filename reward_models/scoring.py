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
Rewards on one tower share its forward pass. Of a video only the frames are decoded that some reward
looks at: an image reward sees those that `frames` selects, and its scores of them are pooled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from reward_models.base import Reward, RewardError, Scores, check_scores
from reward_models.clip_tower import one_pass
from reward_models.clips import Clip, ClipView
from reward_models.inputs import Item, find_images, is_video, read_prompts, with_prompts
from reward_models.media import read_image
from reward_models.read_ahead import read_ahead
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

NO_VIDEO = "scores videos, and this is an image"


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

    Images of one batch that differ in size are scored in groups of equal size; videos one by one.
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
    work = _Work(rewards, view, parts)
    batches = [
        _planned(items[start : start + batch_size], results, work)
        for start in range(0, len(items), batch_size)
    ]
    rows: list[ScoredFile] = []
    if progress is not None:
        progress(0, len(items))
    complete = False
    try:
        units = (unit.reads for batch in batches for unit in batch.units)
        with closing(read_ahead(units)) as media:
            for batch in batches:
                rows += _finished(batch, media, work, results)
                if progress is not None:
                    progress(len(rows), len(items))
        complete = True
    finally:
        # An interrupted run keeps what was repaired as well.
        if results is not None:
            results.close(complete=complete)
    return Scored(rows, work.truncated)


Media = Tensor | Clip | RewardError
"""What reading a file gives; the error of one that cannot be read."""


@dataclass(frozen=True)
class _Unit:
    """What is read and scored at once: the pictures of a batch, or one clip.

    Args:
        reads: one per file.
        places: of every file, the items of the batch that it belongs to.
    """

    reads: list[Callable[[], Media]]
    places: list[list[int]]


@dataclass(frozen=True)
class _Batch:
    """Items that are scored together, their old rows, and what is to be read: () if all stand."""

    items: Sequence[Item]
    old: list[ScoredFile | None]
    units: tuple[_Unit, ...]


@dataclass
class _Judged:
    """What became of one item: its scores, and the reasons of rewards that have none to give."""

    scores: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class _Work:
    """What scores, and the count of what it had to cut."""

    rewards: Mapping[str, Reward]
    view: ClipView
    parts: bool
    truncated: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.truncated = dict.fromkeys(self.rewards, 0)

    def read(self, path: Path) -> Media:
        """The media of a file, or why it has none."""
        try:
            if is_video(path):
                return self.view.read(path, self.rewards.values())
            return read_image(path)
        except RewardError as error:
            return error

    def standing_error(self, path: Path) -> str | None:
        """The error of an image whatever its pixels are: video rewards do not look at it."""
        if is_video(path):
            return None
        names = [name for name, r in self.rewards.items() if r.info.modality == "video"]
        return _error_of({}, dict.fromkeys(names, NO_VIDEO))

    def judge(self, media: Tensor | Clip, texts: Sequence[str]) -> list[_Judged]:
        """Judge pictures [B, 3, H, W] with their B prompts, or one clip with each of B prompts."""
        table = [_Judged() for _ in texts]
        with torch.no_grad(), one_pass():
            for name, reward in self.rewards.items():
                scores = self._scores(media, texts, name, reward)
                if isinstance(scores, RewardError):
                    for row in table:
                        row.scores[name] = None
                        row.reasons[name] = scores.what
                    continue
                scores = check_scores(scores, len(texts), name)
                self.truncated[name] += scores.truncated
                _enter(table, name, scores, self.parts)
        return table

    def _scores(
        self, media: Tensor | Clip, texts: Sequence[str], name: str, reward: Reward
    ) -> Scores | RewardError:
        """The scores of one reward; an error where it cannot look at such media."""
        if isinstance(media, Tensor):
            if reward.info.modality == "video":
                return RewardError(NO_VIDEO)
            return reward.score(media, texts)
        try:
            return self.view.score(reward, media, texts)
        except RewardError as error:
            # A temporal reward refuses clips that others can score, for instance of one frame.
            if reward.info.modality == "video":
                return error
            raise


def _planned(items: Sequence[Item], results: Results | None, work: _Work) -> _Batch:
    old = [
        None if results is None else results.get(str(item.path), item.prompt or "")
        for item in items
    ]
    if all(_is_final(row, item, work) for row, item in zip(old, items)):
        return _Batch(items, old, ())
    # Half a batch may be there already. The whole is scored again, so that batches, and with them
    # the last bits, are those of an uninterrupted run.
    places: dict[Path, list[int]] = {}
    for index, item in enumerate(items):
        places.setdefault(item.path, []).append(index)
    videos = [path for path in places if is_video(path)]
    pictures = [path for path in places if path not in videos]
    units = [_Unit([partial(work.read, p) for p in pictures], [places[p] for p in pictures])]
    units += [_Unit([partial(work.read, path)], [places[path]]) for path in videos]
    return _Batch(items, old, tuple(unit for unit in units if unit.reads))


def _is_final(row: ScoredFile | None, item: Item, work: _Work) -> bool:
    """Whether a row of an earlier run still stands: its file may have been repaired since."""
    if row is None:
        return False
    if not row.error or row.error == work.standing_error(item.path):
        return True
    return isinstance(work.read(item.path), RewardError)


def _finished(
    batch: _Batch, media: Iterator[list[Media]], work: _Work, results: Results | None
) -> list[ScoredFile]:
    """The rows of a batch, old ones and new, the new ones written."""
    if not batch.units:
        return [row for row in batch.old if row is not None]
    fresh = _score_batch(batch, media, work)
    pairs = list(zip(batch.old, fresh, strict=True))
    if results is not None:
        results.add([new for row, new in pairs if row is None])
        results.mend([new for row, new in pairs if row and row.error and row != new])
    return [new if row is None or row.error else row for row, new in pairs]


def _score_batch(batch: _Batch, media: Iterator[list[Media]], work: _Work) -> list[ScoredFile]:
    judged: dict[int, _Judged] = {}
    errors: dict[int, str] = {}
    for unit in batch.units:
        groups: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for found, places in zip(next(media), unit.places, strict=True):
            if isinstance(found, RewardError):
                errors |= {index: _unreadable(found, batch.items[index]) for index in places}
            elif isinstance(found, Clip):
                texts = [batch.items[index].prompt or "" for index in places]
                judged |= zip(places, work.judge(found, texts), strict=True)
            else:
                groups.setdefault(found.shape, []).extend((index, found) for index in places)
        for group in groups.values():
            group.sort(key=lambda member: member[0])
            texts = [batch.items[index].prompt or "" for index, _ in group]
            pictures = torch.stack([picture for _, picture in group])
            judged |= zip([i for i, _ in group], work.judge(pictures, texts), strict=True)
    rows = []
    for index, item in enumerate(batch.items):
        result = judged.get(index) or _Judged(dict.fromkeys(work.rewards))
        named = {name: result.scores[name] for name in work.rewards}
        error = errors.get(index) or _error_of(named, result.reasons)
        rows.append(ScoredFile(str(item.path), item.prompt or "", result.scores, error))
    return rows


def _unreadable(error: RewardError, item: Item) -> str:
    if item.where and not item.path.is_file():
        return f"{error} (named in {item.where})"
    return str(error)


def _error_of(scores: Mapping[str, float | None], reasons: Mapping[str, str]) -> str | None:
    """What the row of a file that could be read says about scores that are missing."""
    blind = [name for name, value in scores.items() if value is None and name not in reasons]
    problems = [f"could not be scored by {', '.join(blind)}"] if blind else []
    problems += [f"{name}: {reason}" for name, reason in reasons.items()]
    return "; ".join(problems) or None


def _enter(table: Sequence[_Judged], name: str, scores: Scores, parts: bool) -> None:
    """Write a reward's scores, and its parts behind them if wanted, into the rows' tables."""
    columns = {name: scores.values}
    if parts:
        columns |= {f"{name}/{part}": values for part, values in scores.parts.items()}
    for key, values in columns.items():
        for row, value in zip(table, values.tolist(), strict=True):
            row.scores[key] = None if math.isnan(value) else value


def _refuse_group_judges(rewards: Mapping[str, Reward]) -> None:
    for name, reward in rewards.items():
        if reward.info.scope != "item":
            raise RewardError(
                "judges all samples of one prompt together, and files are scored one by one",
                where=f"reward {name}",
            )
