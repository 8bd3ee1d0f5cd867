"""How well a reward in training agrees with judgements held out, and the best of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.algorithms.agreement import (
    TIE,
    calibrate_ties,
    pair_agreement,
    rating_agreement,
)
from diffusion_align.algorithms.reward_inputs import RewardInputs
from diffusion_align.errors import UserError
from reward_models.attributes import OVERALL
from reward_models.training import TrainableReward

BATCH = 32
# Training rows on which the tie threshold of accuracy with ties is chosen.
CALIBRATED_ON = 1024


@dataclass(frozen=True)
class Best:
    """The weights that agreed best so far; the tensors are never written to.

    score_range: where their scores lie, in words.
    """

    iteration: int
    goodness: float
    figures: Mapping[str, float]
    score_range: str
    tensors: Mapping[str, Tensor] = field(repr=False)


class Validations:
    """The validations of one run, and the weights that were best in them.

    Args:
        reward: whose weights are looked at.
        held_out: what they are validated on.
        learnt: what they are trained on: the tie threshold is chosen there, because choosing it
            on the held-out pairs would flatter. A loss that drops ties does not drop them there.
        seed: of the rows it is chosen on, where there are more than `CALIBRATED_ON`.

    Attributes:
        deciding: the figures whose mean says which weights are best, see `deciding_figures`.
        history: `iteration` and figures of each.
        best: None before the first.

    Raises:
        UserError: held-out labels on which nothing can be measured.
    """

    def __init__(
        self, reward: TrainableReward, held_out: RewardInputs, learnt: RewardInputs, seed: int
    ) -> None:
        self.deciding = deciding_figures(held_out, reward.attributes)
        self.held_out = held_out
        self.history: list[dict[str, float]] = []
        self.best: Best | None = None
        self._reward = reward
        self._learnt, self._rows = learnt, _calibration_rows(learnt, seed)

    def done(self, iteration: int) -> bool:
        """Whether the weights after so many iterations were validated."""
        return bool(self.history) and self.history[-1]["iteration"] == iteration

    def run(self, network: nn.Module, iteration: int) -> dict[str, float]:
        """Validate the weights as they are after so many iterations, and keep them if best."""
        reward, thresholds = self._reward, None
        if self._has_ties():
            some = self._learnt.part(self._rows)
            scores = score_rows(reward, network, some)
            thresholds = calibrate_ties(
                scores[0], scores[1], some.labels, some.mask, reward.attributes
            )
        scores = score_rows(reward, network, self.held_out)
        found = figures(scores, self.held_out, reward.attributes, thresholds)
        self.history.append({"iteration": iteration, **found})
        good = goodness(found, self.deciding)
        if self.best is None or good > self.best.goodness:
            tensors = {k: p.detach().cpu().clone() for k, p in reward.trained().items()}
            self.best = Best(iteration, good, found, score_range(scores), tensors)
        return found

    def sentence(self) -> str:
        """The last validation in words."""
        last = self.history[-1]
        shown = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in last.items()
            if name != "iteration"
        )
        is_best = self.best is not None and self.best.iteration == last["iteration"]
        note = " (best so far)" if is_best and len(self.history) > 1 else ""
        return f"validation after {last['iteration']} iterations: {shown}{note}"

    def state_dict(self) -> dict[str, Any]:
        """As plain values; the best tensors are shared, because nobody writes to them."""
        return {
            "history": [dict(entry) for entry in self.history],
            "best": None if self.best is None else {**vars(self.best)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.history = [dict(entry) for entry in state["history"]]
        self.best = Best(**state["best"]) if state["best"] else None

    def _has_ties(self) -> bool:
        held = self.held_out
        return held.sides == 2 and bool((held.mask & (held.labels == TIE)).any())


@torch.no_grad()
def score_rows(reward: TrainableReward, network: nn.Module, inputs: RewardInputs) -> Tensor:
    """Scores [sides, N, A] of all pictures, on the CPU; the network is left in eval mode."""
    network.eval()
    found = []
    for rows in torch.arange(len(inputs)).split(BATCH):
        batch = inputs.take(rows)
        outputs = reward.scores(network(batch.images, batch.texts)).float().cpu()
        found.append(outputs.unflatten(0, (inputs.sides, len(rows))))
    return torch.cat(found, dim=1)


def figures(
    scores: Tensor,
    inputs: RewardInputs,
    attributes: Sequence[str],
    tie_thresholds: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Agreement by name: that of the deciding attribute plain, of several also `name/figure`.

    Pairs: accuracy, where there are ties also accuracy_with_ties. Ratings: correlation (Pearson's),
    rank_correlation (Spearman's), rmse. Of several attributes "overall" decides, else their mean.
    Where labelled rows were not scored, `unscored` counts them.
    """
    table: dict[str, dict[str, float]] = {}
    labels, mask = inputs.labels, inputs.mask
    if inputs.sides == 2:
        pairs = pair_agreement(
            scores[0], scores[1], labels, mask, attributes, tie_thresholds=tie_thresholds
        )
        for name, pair in pairs.items():
            table[name] = {"accuracy": pair.accuracy}
            if pair.ties:
                table[name]["accuracy_with_ties"] = pair.accuracy_with_ties
    else:
        for name, rated in rating_agreement(scores[0], labels, mask, attributes).items():
            table[name] = {
                "correlation": rated.pearson,
                "rank_correlation": rated.spearman,
                "rmse": rated.rmse,
            }
    flat = {f"{name}/{figure}": value for name in table for figure, value in table[name].items()}
    unscored = int((~scores.isfinite().all(dim=0) & mask).any(dim=1).sum())
    return (
        _deciding(table)
        | (flat if len(table) > 1 else {})
        | ({"unscored": float(unscored)} if unscored else {})
    )


def deciding_figures(held_out: RewardInputs, attributes: Sequence[str]) -> tuple[str, ...]:
    """Names of the `figures` whose mean decides which weights are best.

    It depends on the held-out labels alone, so that all validations of a run are compared in the
    same figure: accuracy or correlation where the labels have one, else accuracy with ties, else
    the same of those attributes that have one (where "overall" is not labelled).

    Raises:
        UserError: the labels tell no weights from others.
    """
    plain = "accuracy" if held_out.sides == 2 else "correlation"
    told: dict[str, list[str]] = {plain: [], "accuracy_with_ties": []}
    for column, name in enumerate(attributes):
        labels = held_out.labels[:, column][held_out.mask[:, column]]
        if held_out.sides == 2:
            if (labels != TIE).any():
                told[plain].append(name)
            if (labels == TIE).any():
                told["accuracy_with_ties"].append(name)
        elif len(labels.unique()) > 1:
            told[plain].append(name)
    for figure, names in told.items():
        if OVERALL in names or (names and OVERALL not in attributes):
            return (figure,)
    for figure, names in told.items():
        if names:
            return tuple(f"{name}/{figure}" for name in names)
    raise UserError(
        "nothing can be measured on the held-out judgements: "
        + ("no pair is labelled" if held_out.sides == 2 else "fewer than two different ratings"),
        where="data.validation",
        fix="hold out other or more rows, or none (data.validation_share=0)",
    )


def goodness(found: Mapping[str, float], deciding: Sequence[str]) -> float:
    """What the best checkpoint is best in; minus infinity where it cannot be told."""
    values = [found[name] for name in deciding if math.isfinite(found.get(name, math.nan))]
    return math.fsum(values) / len(values) if values else -math.inf


def score_range(scores: Tensor) -> str:
    """Where most of some scores lie, in words; "" where nothing was scored."""
    known = scores[~scores.isnan()]
    if not len(known):
        return ""
    # torch's quantile takes no more.
    low, high = torch.quantile(known[: 2**20], torch.tensor([0.05, 0.95])).tolist()
    return f"about {low:.3g} to {high:.3g}"


def _calibration_rows(learnt: RewardInputs, seed: int) -> Tensor:
    """Labelled rows [n], at most `CALIBRATED_ON` of them, drawn at random."""
    rows = learnt.mask.any(dim=1).nonzero().flatten()
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[drawn[:CALIBRATED_ON].sort().values]


def _deciding(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    if OVERALL in table:
        return dict(table[OVERALL])
    names = dict.fromkeys(figure for found in table.values() for figure in found)
    means = {}
    for figure in names:
        known = [found[figure] for found in table.values() if figure in found]
        told = [value for value in known if math.isfinite(value)]
        means[figure] = math.fsum(told) / len(told) if told else math.nan
    return means
