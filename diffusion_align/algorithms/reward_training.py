"""Reward training: fit a reward model to what people said of pictures.

Rows of judgements are dealt from a deck that is shuffled anew for every pass; a batch is a function
of the seed and the iteration. The losses are those of `reward_losses`, the network that trains is
`TrainableReward.network`, and the weights that agreed best with held-out judgements are the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.algorithms.base import Alone, Group, Listener, Needs, Silence
from diffusion_align.algorithms.reward_checks import check_loss, completed, usable_rows
from diffusion_align.algorithms.reward_deck import Deck
from diffusion_align.algorithms.reward_inputs import RewardInputs, RewardMinibatch
from diffusion_align.algorithms.reward_losses import REWARD_LOSSES
from diffusion_align.algorithms.reward_options import RewardOptions
from diffusion_align.algorithms.reward_validation import (
    Best,
    Validations,
    score_range,
    score_rows,
)
from diffusion_align.data.judgements import Judgements
from diffusion_align.errors import UserError
from reward_models.plan import RewardPlan
from reward_models.training import TrainableReward

_GIGABYTE = 2**30
# Training rows that say where scores lie when nothing is held out.
RANGE_OF = 1024
# Figures that decide which weights are best where nothing need be said of it.
_USUAL = (("accuracy",), ("correlation",))


@dataclass(frozen=True)
class RewardBatch:
    """The minibatches of one iteration; `metrics` holds the validation's figures where one was."""

    minibatches: Sequence[RewardMinibatch]
    metrics: Mapping[str, float]
    samples: None = None


class Learner:
    """What the loop needs of a policy: the network in its slot, and how the result is saved."""

    def __init__(self, training: RewardTraining, reward: TrainableReward) -> None:
        self.denoiser: nn.Module = reward.network
        self._training, self._reward = training, reward

    @property
    def device(self) -> torch.device:
        return self._reward.device

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self._reward.trained().values())

    def reference(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def save(self, folder: Path) -> Path:
        return self._training.save(folder)


class RewardTraining:
    """Fit a reward to judgements; driven by `train` as any other algorithm.

    Args:
        reward: a `TrainableReward`, a plan of one, or the name of a start (`tiny-clip`, `clip-l`,
            `hpsv2.1`, a file that was trained before). A plan of a regression head without
            attributes learns all that the judgements have; on a bare tower ratings get such a head.
        judgements: what is learnt from.
        options: see `RewardOptions`.
        validation: judgements held out; without any, the last weights are the result.
        seed: of a new head, the order of the rows and the flips.
        device: of a reward given as a plan or a name.
        name: of the result, in reports.
        trained_on: names of the data, for those who will be shown the reward.
        validate_at_end: `save` validates the last weights first; false for a caller that calls
            `finish` itself, and not where the run was interrupted.

    Raises:
        UserError, RewardError: judgements, loss and reward that do not fit together.
    """

    def __init__(
        self,
        reward: TrainableReward | RewardPlan | str,
        judgements: Judgements,
        *,
        options: RewardOptions | None = None,
        validation: Judgements | None = None,
        seed: int = 0,
        device: str = "cpu",
        name: str = "",
        trained_on: Sequence[str] = (),
        validate_at_end: bool = True,
    ) -> None:
        self.options = o = options or RewardOptions()
        loss = o.loss or ("regression" if judgements.kind == "ratings" else "soft-label")
        self._loss_name, self._loss = loss, REWARD_LOSSES[loss]
        if not isinstance(reward, TrainableReward):
            plan = completed(reward, judgements)
            reward = TrainableReward(plan, device=device, seed=seed, name=name)
        check_loss(loss, reward.head, judgements, validation)
        self.reward = reward
        self.policy = Learner(self, reward)
        self.needs = Needs()
        self.listener: Listener = Silence()
        self.group: Group = Alone()
        self._judgements = judgements
        self._trained_on = tuple(trained_on)
        self._validate_at_end = validate_at_end
        self._inputs = RewardInputs(
            judgements,
            reward,
            workers=o.workers,
            keep_images=not (o.flip and reward.images_are_frozen),
        )
        rows = usable_rows(loss, self._inputs)
        self._deck = Deck(rows, o.batch_size, o.batches_per_iteration, seed)
        self._validations: Validations | None = None
        if validation is not None:
            held_out = RewardInputs(validation, reward, workers=o.workers)
            self._validations = Validations(reward, held_out, self._inputs, seed)
        if loss == "regression":
            reward.start_at(self._mean_label())
        self._iterations = 0  # collected so far
        # One thread, so that a batch is made in the same way whether or not it was asked for early.
        self._loader = ThreadPoolExecutor(1)
        self._coming: tuple[int, Future[list[RewardMinibatch]]] | None = None

    @property
    def history(self) -> list[dict[str, float]]:
        """The validations so far: `iteration` and the figures of each."""
        return [dict(entry) for entry in self._validations.history] if self._validations else []

    @property
    def best(self) -> Mapping[str, float] | None:
        """`iteration` and figures of the weights that `save` writes; None without validation."""
        best = self._validations.best if self._validations else None
        return None if best is None else {"iteration": best.iteration, **best.figures}

    def describe(self) -> list[str]:
        """What trains, on how much, with which loss."""
        rows, inputs = self._judgements, self._inputs
        ties = int((inputs.mask & (inputs.labels == 0.5)).sum()) if inputs.sides == 2 else 0
        what = f"{len(rows)} {rows.kind}"
        if ties:
            what += f", {ties} of the labels ties ({self._loss.ties} by this loss)"
        unlabelled = int((~inputs.mask).sum())
        if unlabelled:
            what += f", {unlabelled} labels missing and masked"
        held = f"{self._held_out_count()} held out" if self._validations else "none held out"
        frozen = [
            side
            for side, is_frozen in (
                ("pictures", self.reward.images_are_frozen and not self.options.flip),
                ("prompts", self.reward.texts_are_frozen and self.reward.head != "regression"),
            )
            if is_frozen
        ]
        head = f"{'new ' if self.reward.has_new_head else ''}{self.reward.head} head"
        lines = [
            f"{self.reward.card.name}: {head} over {self.reward.card.tower}; "
            f"trains {self.reward.what_trains()}",
            f"{what}; {held}; attributes: {', '.join(self.reward.attributes)}",
            f"loss {self._loss_name}, {self.options.batch_size} rows a batch",
        ]
        if self._validations and self._validations.deciding not in _USUAL:
            figures = " and ".join(self._validations.deciding).replace("_", " ")
            lines.append(
                f"the weights are best whose {figures} is: the labels held out say no more"
            )
        if frozen:
            fit = f"if they fit in {self.options.cache_gb:g} GB"
            lines.append(f"frozen features of {' and '.join(frozen)} are computed once, {fit}")
        ignored = [name for name in rows.attributes if name not in self.reward.attributes]
        if ignored:
            lines.append(f"not learnt: {', '.join(ignored)}")
        return [*lines, *rows.notes]

    def record(self) -> dict[str, Any]:
        """What the reward starts from and learns from, for the run folder.

        `trained_on` names its data, as the reward's file does, for people to read. A comparison of
        a policy that was aligned with this reward knows the reward's name only, not its data.
        """
        return {
            "trained_on": list(self._trained_on),
            "prompts": [],
            "reward": {
                "name": self.reward.card.name,
                "head": self.reward.head,
                "tower": self.reward.card.tower,
                "attributes": list(self.reward.attributes),
            },
            "judgements": {
                "kind": self._judgements.kind,
                "rows": len(self._judgements),
                "held_out": self._held_out_count(),
            },
        }

    def collect(self, iteration: int) -> RewardBatch:
        """Load the iteration's batches; every `validate_every` iterations validate before.

        Raises:
            RewardError: a picture that cannot be read, by name.
        """
        if self.options.batch_size < self.group.size:
            raise UserError(
                f"{self.group.size} processes cannot share batches of {self.options.batch_size}",
                where="algorithm.batch_size",
                fix="start fewer processes, or raise it",
            )
        self._make_ready()
        self._iterations = iteration
        metrics: dict[str, float] = {}
        if self._validations and iteration % self.options.validate_every == 0:
            metrics = {f"validation/{k}": v for k, v in self._validate().items()}
        self.listener.progress("loading", 0, 1)
        minibatches = self._batches(iteration)
        self._iterations = iteration + 1
        return RewardBatch(minibatches, metrics)

    def minibatches(self, batch: RewardBatch) -> Iterator[RewardMinibatch]:
        """The iteration's batches in their order."""
        yield from batch.minibatches

    def minibatch_count(self) -> int:
        """Minibatches of an iteration."""
        return self.options.minibatches

    def minibatch_arithmetic(self) -> str:
        """`4 batches an iteration = 4 minibatches`."""
        return self.options.arithmetic

    def losses(
        self, minibatch: RewardMinibatch, scale: float
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One loss: the mean over the minibatch's labels. Rows without a score take no part."""
        network = self.policy.denoiser.train()
        outputs = network(minibatch.images, minibatch.texts)
        sides = outputs.chunk(self._inputs.sides)
        scored = torch.stack([~side.detach().isnan() for side in sides]).all(dim=0)
        mask = minibatch.mask & scored
        used = (self._loss.used(minibatch.labels, mask) * minibatch.weights[:, None]).sum()
        extra = {"k": self.options.tie_constant} if self._loss.ties == "modelled" else {}
        loss = self._loss.function(*sides, minibatch.labels, mask, minibatch.weights, **extra)
        unscored = (minibatch.mask & ~scored).any(dim=1).sum().float()
        credit = torch.empty(0)
        if self._inputs.sides == 2:
            credit = _credit(sides[0], sides[1], minibatch.labels, mask)
        # Means over the minibatch of all ranks: each rank's part, times the size, because gradients
        # and metrics are averaged over the ranks.
        part = self._part(used) if self.group.size > 1 else 1.0
        part = 0.0 if math.isnan(part) else part  # nothing to learn from on any rank
        credited = self._part(torch.tensor(float(len(credit))))
        metrics = {
            "train/loss": loss.detach() * part,
            "train/unscored": unscored * self.group.size,
        }
        if not math.isnan(credited):
            metrics["train/accuracy"] = credit.mean() * credited if len(credit) else unscored * 0
        yield loss * (scale * part), metrics

    def _part(self, mine: Tensor) -> float:
        """This rank's share of something x the group's size; NaN where no rank has any."""
        every = self.group.gather(mine.detach().double()[None])
        return float(mine / every.sum()) * self.group.size

    def loss_count(self, minibatch: RewardMinibatch) -> int:
        """1."""
        return 1

    def save(self, folder: Path, *, dtype: str = "float32") -> Path:
        """Write the best weights (the last where nothing was held out) into `folder`.

        Returns:
            The file.
        """
        if self._validate_at_end:
            self.finish()
        best = self._validations.best if self._validations else None
        card = replace(
            self.reward.card,
            trained_on=self._trained_on,
            validation={k: v for k, v in (self.best or {}).items() if math.isfinite(v)},
            range=self._range(best),
        )
        tensors = None if best is None else best.tensors
        return self.reward.save(folder, dtype=dtype, tensors=tensors, card=card)

    def finish(self) -> None:
        """Validate the last weights, if they were not yet."""
        self._make_ready()
        if self._validations and not self._validations.done(self._iterations):
            self._validate()

    def state_dict(self) -> dict[str, Any]:
        """The validations, and the best weights so far (tensors that nobody writes to).

        The data cursor is the iteration itself: the deck is a function of the seed.
        """
        return {
            "iterations": self._iterations,
            "validations": self._validations.state_dict() if self._validations else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._iterations = state["iterations"]
        if self._validations and state["validations"]:
            self._validations.load_state_dict(state["validations"])

    def _held_out_count(self) -> int:
        return len(self._validations.held_out) if self._validations else 0

    def _make_ready(self) -> None:
        left = self.options.cache_gb * _GIGABYTE
        self._inputs.make_ready(self.listener, left)
        if self._validations:
            self._validations.held_out.make_ready(self.listener, left - self._inputs.kept_bytes)

    def _validate(self) -> dict[str, float]:
        assert self._validations is not None
        self.listener.progress("validating", 0, 1)
        found = self._validations.run(self.policy.denoiser, self._iterations)
        self.listener.message(self._validations.sentence())
        return found

    def _batches(self, iteration: int) -> list[RewardMinibatch]:
        """The iteration's batches; those of the next are read meanwhile, where files are read."""
        if not self._inputs.reads_files:
            return self._load(iteration)
        if self._coming is None or self._coming[0] != iteration:
            self._coming = (iteration, self._loader.submit(self._load, iteration))
        now = self._coming[1]
        self._coming = None
        made = now.result()
        self._coming = (iteration + 1, self._loader.submit(self._load, iteration + 1))
        return made

    def _load(self, iteration: int) -> list[RewardMinibatch]:
        rows = self._deck.deal(iteration)
        flips = self._deck.flips(iteration) if self.options.flip else [None] * len(rows)
        mine = self._deck.share(self.group)
        return [
            self._inputs.take(all_rows[mine], None if mirrored is None else mirrored[mine])
            for all_rows, mirrored in zip(rows, flips, strict=True)
        ]

    def _mean_label(self) -> Tensor:
        labels, mask = self._inputs.labels, self._inputs.mask
        return (labels.nan_to_num() * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1)

    def _range(self, best: Best | None) -> str:
        """Where the saved weights' scores lie, in words: of rows held out, else trained on."""
        if best is not None:
            return f"{best.score_range} (held-out data)" if best.score_range else ""
        if self._validations is not None:
            return ""  # interrupted before the first validation: nobody waits for one now
        rows = self._inputs.part(self._deck.rows[:RANGE_OF])
        told = score_range(score_rows(self.reward, self.policy.denoiser, rows))
        return f"{told} (training data)" if told else ""


def _credit(first: Tensor, second: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Expected agreement [n] with one person on each decided pair, as `agreement` counts it."""
    difference = first.detach() - second.detach()
    equal = torch.full_like(labels, 0.5)
    credit = torch.where(difference < 0, 1 - labels, equal)
    return torch.where(difference > 0, labels, credit)[mask & (labels != 0.5)]
