"""Judgements as a trainable reward takes them: pictures and prompts made ready, once if they fit.

Every picture and every prompt is made ready once, in chunks of a fixed size and order, and kept
where all of them fit the memory that is allowed: features where the tower is frozen, else pixels.
So numbers do not depend on when a run was resumed. What does not fit is made for each batch.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.algorithms.base import Listener
from diffusion_align.data.judgements import Judgements, Picture, load_picture
from diffusion_align.errors import UserError, did_you_mean
from reward_models.mps import Reading
from reward_models.networks import picked
from reward_models.training import TrainableReward

CHUNK = 32


@dataclass(frozen=True)
class RewardMinibatch:
    """n rows as a network takes them.

    Attributes:
        images: what the network takes of n pictures, or of 2n: all first ones, then all second.
        texts: what it takes of n prompts.
        labels, mask: [n, A]; weights: [n].
    """

    images: Tensor
    texts: Any
    labels: Tensor
    mask: Tensor
    weights: Tensor


class RewardInputs:
    """The rows of `judgements`, made ready for `reward`.

    Args:
        workers: threads that read picture files.
        keep_images: false where each batch changes its pictures (random flips of features).

    Raises:
        UserError: an attribute of the reward that the data does not judge.
    """

    def __init__(
        self,
        judgements: Judgements,
        reward: TrainableReward,
        *,
        workers: int,
        keep_images: bool = True,
    ) -> None:
        columns = [_column(name, judgements) for name in reward.attributes]
        self.labels = judgements.labels()[:, columns]
        self.mask = judgements.mask()[:, columns]
        self.weights = judgements.weights()
        self.sides = 2 if judgements.kind == "pairs" else 1
        self._reward, self._workers = reward, workers
        self._keep_images = keep_images
        self._pictures, self._picture_of = _distinct(
            [row.pictures[side] for side in range(self.sides) for row in judgements.rows]
        )
        self._prompts = list(dict.fromkeys(judgements.prompts))
        place = {prompt: number for number, prompt in enumerate(self._prompts)}
        self._prompt_of = torch.tensor([place[prompt] for prompt in judgements.prompts])
        self._images: Tensor | None = None
        self._texts: Any = None
        self._is_ready = False

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: Tensor) -> RewardInputs:
        """Some of the rows as inputs of their own, with everything that was made ready."""
        some = copy.copy(self)
        some.labels, some.mask = self.labels[rows], self.mask[rows]
        some.weights = self.weights[rows]
        sides = [rows + side * len(self) for side in range(self.sides)]
        some._picture_of = self._picture_of[torch.cat(sides)]
        some._prompt_of = self._prompt_of[rows]
        return some

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept."""
        texts = vars(self._texts).values() if isinstance(self._texts, Reading) else [self._texts]
        return sum(kept.nbytes for kept in (self._images, *texts) if kept is not None)

    @property
    def reads_files(self) -> bool:
        """Whether a batch still has to read picture files, once `make_ready` was called."""
        return self._images is None and any(isinstance(p, Path) for p in self._pictures)

    @torch.no_grad()
    def make_ready(self, listener: Listener, left: float) -> None:
        """Make pictures and prompts ready and keep them, as far as they fit. Once.

        Args:
            left: bytes that may be kept.

        Raises:
            RewardError: a picture that cannot be read.
        """
        if self._is_ready:
            return
        if self._reward.texts_are_frozen and self._reward.head != "regression":
            self._texts, left = self._all_texts(left)
        if self._keep_images:
            self._images = self._all_images(left, listener)
        self._is_ready = True

    @torch.no_grad()
    def take(self, rows: Tensor, flips: Tensor | None = None) -> RewardMinibatch:
        """The rows [n] as a minibatch on the reward's device; `flips` bool [n] mirrors pictures."""
        device = self._reward.device
        count = len(self.labels)
        pictures = torch.cat([self._picture_of[rows + side * count] for side in range(self.sides)])
        mirrored = None if flips is None else flips.repeat(self.sides)
        return RewardMinibatch(
            images=self._images_of(pictures, mirrored),
            texts=self._texts_of(self._prompt_of[rows]),
            labels=self.labels[rows].to(device),
            mask=self.mask[rows].to(device),
            weights=self.weights[rows].to(device),
        )

    def _images_of(self, pictures: Tensor, mirrored: Tensor | None) -> Tensor:
        if self._images is not None and (mirrored is None or not self._reward.images_are_frozen):
            found = self._images[pictures].to(self._reward.device)
        else:
            pixels = self._load([self._pictures[index] for index in pictures.tolist()])
            if self._reward.images_are_frozen and mirrored is not None:
                pixels, mirrored = _mirror(pixels, mirrored), None
            found = self._reward.image_inputs(pixels)
        return found if mirrored is None else _mirror(found, mirrored)

    def _texts_of(self, prompts: Tensor) -> Any:
        if self._texts is None:
            return self._reward.text_inputs([self._prompts[index] for index in prompts.tolist()])
        device = self._reward.device
        if isinstance(self._texts, Reading):
            found = picked(self._texts, prompts)
            return Reading(*(value.to(device) for value in vars(found).values()))
        return self._texts[prompts].to(device)

    def _all_texts(self, left: float) -> tuple[Any, float]:
        """What the network takes of all prompts, on the CPU; None where it does not fit."""
        chunks: list[Any] = []
        for start in range(0, len(self._prompts), CHUNK):
            made: Any = self._reward.text_inputs(self._prompts[start : start + CHUNK])
            fields = list(vars(made).values()) if isinstance(made, Reading) else [made]
            chunks.append([value.cpu() for value in fields])
            each = sum(value[0].nbytes for value in fields)
            if each * len(self._prompts) > left:
                return None, left
        joined = [torch.cat(column) for column in zip(*chunks, strict=True)]
        used = sum(value.nbytes for value in joined)
        return (Reading(*joined) if len(joined) > 1 else joined[0]), left - used

    def _all_images(self, left: float, listener: Listener) -> Tensor | None:
        """What the network takes of all pictures, on the CPU; None where it does not fit."""
        count = len(self._pictures)
        table: Tensor | None = None
        for start in range(0, count, CHUNK):
            listener.progress("preparing", start, count)
            pixels = self._load(self._pictures[start : start + CHUNK])
            made = self._reward.image_inputs(pixels).cpu()
            if table is None:
                if made[0].nbytes * count > left:
                    return None
                table = torch.empty(count, *made.shape[1:], dtype=made.dtype)
            table[start : start + len(made)] = made
        return table

    def _load(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures as the tower's pixels [n, 3, S, S]."""
        if not any(isinstance(picture, Path) for picture in pictures):
            loaded = [load_picture(picture) for picture in pictures]
        else:
            with ThreadPoolExecutor(self._workers) as pool:
                loaded = list(pool.map(load_picture, pictures))
        if len({picture.shape for picture in loaded}) == 1:
            return self._reward.prepare(torch.stack(loaded))
        return torch.cat([self._reward.prepare(picture[None]) for picture in loaded])


def _mirror(pixels: Tensor, mirrored: Tensor) -> Tensor:
    chosen = mirrored.to(pixels.device)[:, None, None, None]
    return torch.where(chosen, pixels.flip(-1), pixels)


def _distinct(pictures: Sequence[Picture]) -> tuple[list[Picture], Tensor]:
    """Every picture once, and which of them each one was."""
    known: dict[Hashable, int] = {}
    found: list[Picture] = []
    places = []
    for picture in pictures:
        key: Hashable = picture if isinstance(picture, Path) else id(picture)
        if key not in known:
            known[key] = len(found)
            found.append(picture)
        places.append(known[key])
    return found, torch.tensor(places)


def _column(name: str, judgements: Judgements) -> int:
    if name in judgements.attributes:
        return judgements.attributes.index(name)
    near = did_you_mean(name, judgements.attributes)
    known = ", ".join(judgements.attributes)
    raise UserError(
        f"the reward learns {name!r}, which these judgements do not judge",
        where="attributes",
        fix=f"did you mean {near} ?" if near else f"they judge: {known}",
    )
