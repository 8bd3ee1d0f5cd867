"""Who works on what: an iteration's items dealt to the ranks, and what each found, gathered again.

An iteration is planned as a whole on every rank. In the order of the first inner epoch the items
are dealt like cards, rank by rank, so that there every minibatch is shared evenly. The numbers that
decide anything (rewards, their parts, picture metrics) are gathered, put into the order of the
plan, and then worked on by all ranks alike; trajectories stay where they were sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby

import torch
from torch import Tensor

from diffusion_align.algorithms.base import Alone, Group
from diffusion_align.algorithms.picture_metrics import PictureMetrics
from diffusion_align.algorithms.plan import Item
from diffusion_align.errors import UserError
from reward_models.base import Scores


@dataclass(frozen=True)
class Share:
    """This rank's part of N items. order: long [N], the first inner epoch's, on the CPU."""

    order: Tensor
    group: Group

    @classmethod
    def of(cls, order: Tensor, group: Group) -> Share:
        """Raises UserError where there are fewer items than processes."""
        if len(order) < group.size:
            raise UserError(
                f"{group.size} processes, but an iteration has only {len(order)} samples to share",
                where="algorithm.prompts_per_iteration",
                fix="start fewer processes, or raise prompts_per_iteration or samples_per_prompt",
            )
        return cls(order, group)

    @classmethod
    def everything(cls, count: int) -> Share:
        """All of `count` items, for a process alone."""
        return cls(torch.arange(count), Alone())

    def places_of(self, rank: int) -> Tensor:
        """The places in the plan of a rank's items: long [n], ascending."""
        return self.order[rank :: self.group.size].sort().values

    @property
    def places(self) -> Tensor:
        """Those of this rank."""
        return self.places_of(self.group.rank)

    @property
    def largest(self) -> int:
        """The most items that any rank has: those of the first, at most one more than of others."""
        return -(-len(self.order) // self.group.size)

    def held(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `places` this rank holds, and their rows among its own: two long [k]."""
        mine = self.places
        rows = torch.searchsorted(mine, places).clamp(max=len(mine) - 1)
        here = mine[rows] == places
        return places[here], rows[here]

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] of this rank's items -> [N, ...] in the order of the plan, on every rank."""
        return self._placed(values, [self.places_of(rank) for rank in range(self.group.size)])

    def gather_prompts(self, values: Tensor, items: Sequence[Item]) -> Tensor:
        """[m, ...] of the items whose prompts `whole_prompts` gave this rank -> [N, ...]."""
        owner = torch.tensor([item.position % self.group.size for item in items])
        return self._placed(values, [(owner == r).nonzero()[:, 0] for r in range(self.group.size)])

    def whole_prompts(
        self, pixels: Tensor, items: Sequence[Item]
    ) -> Iterator[tuple[Tensor, list[Item]]]:
        """Pictures [S, ...] and items of whole prompts; prompt p comes to rank p modulo the size.

        One prompt at a time is exchanged, so that a rank holds its own pictures and one prompt's.

        Args:
            pixels: [n, ...], of this rank's items, on the CPU.
            items: all N of the plan; those of one prompt stand together.
        """
        everyone = [self.places_of(rank) for rank in range(self.group.size)]
        start = 0
        for position, same in groupby(items, key=lambda item: item.position):
            members = list(same)
            stop = start + len(members)
            rows = [((p >= start) & (p < stop)) for p in everyone]
            whole = self.group.gather(pixels[rows[self.group.rank]])
            if position % self.group.size == self.group.rank:
                held = torch.cat([p[r] for p, r in zip(everyone, rows, strict=True)])
                yield whole[held.argsort()], members
            start = stop

    def _placed(self, values: Tensor, places: Sequence[Tensor]) -> Tensor:
        gathered = self.group.gather(values)
        if self.group.size == 1:
            return gathered
        result = torch.empty_like(gathered)
        result[torch.cat(list(places)).to(result.device)] = gathered
        return result

    def gather_scores(self, scores: Scores, items: Sequence[Item], *, by_prompt: bool) -> Scores:
        """Scores of this rank's items (or of its whole prompts) -> those of all N.

        A part is known by its name; a rank that scored nothing knows none, so names are told too.
        """
        if self.group.size == 1:
            return scores
        names = self._names(list(scores.parts))
        columns = [scores.values] + [
            scores.parts.get(name, torch.full_like(scores.values, torch.nan)) for name in names
        ]
        table = torch.stack(columns, dim=1)
        whole = self.gather_prompts(table, items) if by_prompt else self.gather(table)
        parts = {name: whole[:, place] for place, name in enumerate(names, start=1)}
        return Scores(whole[:, 0].contiguous(), {n: part.contiguous() for n, part in parts.items()})

    def gather_pictures(self, metrics: PictureMetrics, items: Sequence[Item]) -> PictureMetrics:
        """Picture metrics of this rank's whole prompts -> those of all N items."""
        names = [column.name for column in fields(metrics)]
        table = torch.stack([getattr(metrics, name) for name in names], dim=1)
        whole = self.gather_prompts(table, items)
        return replace(metrics, **{name: whole[:, place] for place, name in enumerate(names)})

    def _names(self, mine: Sequence[str]) -> list[str]:
        text = torch.tensor(list("\n".join([*mine, ""]).encode()), dtype=torch.uint8)
        told = bytes(self.group.gather(text).tolist()).decode()
        return list(dict.fromkeys(told.splitlines()))


def weighted(metrics: Mapping[str, Tensor], part: float) -> dict[str, Tensor]:
    """Metrics of a rank's rows as its part of the minibatch's: the mean over ranks is the metric.

    Args:
        part: rows of this rank / rows of all x the group's size; 1 for a process alone. Maxima
            stay, except that those of no rows are 0.
    """
    if part == 1:
        return dict(metrics)
    return {
        name: value if name.endswith("_max") and part > 0 else value * part
        for name, value in metrics.items()
    }
