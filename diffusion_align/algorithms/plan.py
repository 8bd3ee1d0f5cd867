"""The plan of an online iteration: which prompts, which samples, in which order they are trained.

Everything is a function of (seed, iteration), so there is no cursor to lose: an iteration can be
planned again exactly, by a resumed run as well as by the run that was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.random import Generator
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.errors import UserError
from diffusion_align.sampling.seeds import Purpose, stream

# Item streams are keyed by the prompt's position in the plan. These positions are beyond any plan
# and key the draws that belong to an iteration (or a pass over the prompts) as a whole.
_MINIBATCH_ORDER = 2**30
_PROMPT_ORDER = 2**30 + 1
# A prompt's window is keyed by a sample's number beyond any.
_WINDOW = 2**30


@dataclass(frozen=True)
class Item:
    """One sample of the plan: its prompt, that prompt's position, the sample's number."""

    prompt: Prompt
    position: int
    sample: int


@dataclass(frozen=True)
class Plan:
    """What one iteration samples.

    Prompts are dealt from a shuffled deck: every prompt comes once before any comes twice.
    """

    prompts: Sequence[Prompt]
    prompts_per_iteration: int
    samples_per_prompt: int
    seed: int

    def __len__(self) -> int:
        return self.prompts_per_iteration * self.samples_per_prompt

    def items(self, iteration: int) -> list[Item]:
        """The samples of an iteration; those of one prompt stand together."""
        return [
            Item(prompt, position, sample)
            for position, prompt in enumerate(self._deal(iteration))
            for sample in range(self.samples_per_prompt)
        ]

    def rollout_streams(self, items: Sequence[Item], iteration: int) -> list[Generator]:
        """Each item's own noise: initial latent first, then one draw per stochastic step."""
        return self._item_streams("rollout", items, iteration)

    def shared_streams(self, items: Sequence[Item], iteration: int) -> list[Generator]:
        """The first noise of each item where those of a prompt have it in common."""
        return self._item_streams("rollout", [replace(item, sample=0) for item in items], iteration)

    def noise_streams(self, items: Sequence[Item], iteration: int) -> list[Generator]:
        """The noise that each item's clean latent is trained under: one draw per inner epoch."""
        return self._item_streams("train-noise", items, iteration)

    def minibatch_orders(self, iteration: int, epochs: int) -> Tensor:
        """A permutation of the iteration's samples for each inner epoch: long [epochs, N]."""
        generator = self._timestep_stream(iteration, _MINIBATCH_ORDER, 0)
        orders = [torch.from_numpy(generator.permutation(len(self))) for _ in range(epochs)]
        return torch.stack(orders)

    def windows(self, iteration: int, steps: Tensor, length: int) -> Tensor:
        """`length` consecutive ones of `steps` (long [S]) for each sample: long [N, length].

        Samples of one prompt, which are compared with one another, have the same.
        """
        starts = {}
        for position in range(self.prompts_per_iteration):
            generator = self._timestep_stream(iteration, position, _WINDOW)
            starts[position] = int(generator.integers(len(steps) - length + 1))
        return torch.stack(
            [steps[(s := starts[item.position]) : s + length] for item in self.items(iteration)]
        )

    def timestep_orders(self, iteration: int, epochs: int, steps: Tensor, keep: int) -> Tensor:
        """Each sample's trained steps: the first `keep` of its own permutation of its `steps`.

        steps: long [S] for all, or [N, S]; returns long [epochs, N, keep]. *Source:* ddpo-pytorch,
        which permutes each sample's timesteps independently and trains on the first ones.
        """
        choice = steps.cpu().expand(len(self), -1).numpy()
        drawn = []
        for item, choices in zip(self.items(iteration), choice):
            generator = self._timestep_stream(iteration, item.position, item.sample)
            drawn.append(
                [torch.from_numpy(generator.permutation(choices)[:keep]) for _ in range(epochs)]
            )
        return torch.stack([torch.stack(item) for item in drawn], dim=1)

    def check_same(self, before: str) -> None:
        """Refuse to go on where the prompts are not those of `before`, a `fingerprint`.

        Raises:
            UserError: the iteration would say other prompts than it said then.
        """
        if before != self.fingerprint:
            raise UserError(
                "these are not the prompts that the run began with",
                where="prompts.source",
                fix="put the old list back (a function must return the same list each time), or "
                "begin another run",
            )

    @property
    def fingerprint(self) -> str:
        """Of all that the prompts say (text, negative, metadata) and of their order."""
        rows = [
            [prompt.text, prompt.negative, *([_plain(prompt.metadata)] if prompt.metadata else [])]
            for prompt in self.prompts
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def _deal(self, iteration: int) -> list[Prompt]:
        first = iteration * self.prompts_per_iteration
        count = len(self.prompts)
        decks: dict[int, list[int]] = {}
        dealt = []
        for card in range(first, first + self.prompts_per_iteration):
            deck, offset = divmod(card, count)
            if deck not in decks:
                generator = self._timestep_stream(deck, _PROMPT_ORDER, 0)
                decks[deck] = generator.permutation(count).tolist()
            dealt.append(self.prompts[decks[deck][offset]])
        return dealt

    def _item_streams(
        self, purpose: Purpose, items: Sequence[Item], iteration: int
    ) -> list[Generator]:
        return [
            stream(
                self.seed, purpose, iteration=iteration, position=item.position, sample=item.sample
            )
            for item in items
        ]

    def _timestep_stream(self, iteration: int, position: int, sample: int) -> Generator:
        return stream(self.seed, "timestep", iteration=iteration, position=position, sample=sample)


def _plain(value: Any) -> Any:
    """Metadata as JSON, whatever it holds; of an object only its type, as `repr` may not last."""
    if isinstance(value, Mapping):
        pairs = [[str(key), _plain(inner)] for key, inner in value.items()]
        return sorted(pairs, key=lambda pair: pair[0])
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return type(value).__qualname__
