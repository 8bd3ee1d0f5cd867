"""The supervised step: denoising regression on captioned pictures, beside a reward's gradient.

A reward that is climbed by its own gradient says nothing of all that it does not see. Fitting the
policy to pictures as well holds it where pictures are:

    scale x weight x mean over pictures of  |f(alpha_t x_0 + sigma_t eps, t, c) - y|^2 / dimensions

with y what the model predicts (`diffusion.noising.target`), t one of the timesteps that sampling
visits, x_0 the picture's latent. The method that holds a `Supervised` asks `due(iteration)` and, in
the same update, back-propagates what `losses` yields.

*Source:* ImageReward's ReFL, whose paper adds the pre-training loss to the reward's (Xu et al.
2023, arXiv 2304.05977); HY-Video-PRFL, which alternates both. How we differ: both share one update;
x_0 is the mean of the encoder's posterior and not a sample of it, so that it is encoded once; the
caption is always given (no prompt dropout); t is uniform over the sampler's timesteps.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.random import Generator
from torch import Tensor

from diffusion_align.algorithms.base import Alone, Group
from diffusion_align.algorithms.likelihood import tells_guidance
from diffusion_align.algorithms.losses import weighted_denoising_loss
from diffusion_align.algorithms.reward_deck import Deck
from diffusion_align.algorithms.supervised_options import SupervisedOptions
from diffusion_align.data.captioned import Captioned, read_captioned
from diffusion_align.diffusion.noising import add_noise, target
from diffusion_align.diffusion.schedules import Schedule
from diffusion_align.errors import UserError
from diffusion_align.policy import Policy
from diffusion_align.sampling.seeds import Purpose, normal, stream

__all__ = ["Supervised", "SupervisedOptions"]

# Beyond any item's position, as in `plan`.
_PICTURES = 2**30 + 4
_KEPT_LATENTS = 4096


class Supervised:
    """Captioned pictures as a term of the loss.

    Everything random is a function of the seed and the iteration: pictures are dealt from a deck
    that is shuffled anew for every pass, timesteps and noise have streams of their own. There is no
    cursor to lose, and a resumed run goes on exactly.

    Args:
        policy: whose denoiser is fitted; of a model that makes images.
        options: see `SupervisedOptions`.
        schedule: the one that the method samples with.
        seed: of the run.
        height, width: pixels that the pictures are brought to; None is the model's own size.
        guidance_scale: that the method samples with; None is the model's own. A network that is
            told its guidance is fitted at this one; any other on its conditional branch alone.
        pictures: what has been read already; None reads `options.pictures`.

    Raises:
        UserError: pictures that cannot be read, or a model of videos.
    """

    def __init__(
        self,
        policy: Policy,
        options: SupervisedOptions,
        *,
        schedule: Schedule,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        pictures: Captioned | None = None,
    ) -> None:
        if policy.info.modality == "video":
            raise UserError(
                f"{policy.info.name} makes videos, and a supervised step is fitted to pictures",
                where="supervised",
                fix="leave the section out",
            )
        self.options = options
        self.pictures = read_captioned(options.pictures) if pictures is None else pictures
        self._policy, self._schedule, self._seed = policy, schedule, seed
        self._guidance = 1.0
        if tells_guidance(policy):
            own_scale = policy.info.guidance_scale
            self._guidance = own_scale if guidance_scale is None else guidance_scale
        self._timesteps = schedule.timesteps.to(policy.device)
        own = policy.info.height, policy.info.width
        if own[0] is None or own[1] is None:
            raise RuntimeError("the policy was built without its model's size")
        self._size = (own[0] if height is None else height, own[1] if width is None else width)
        self._deck = Deck(torch.arange(len(self.pictures)), options.batch_size, 1, seed)
        self._latents: OrderedDict[int, Tensor] = OrderedDict()

    def due(self, iteration: int) -> bool:
        """Whether this iteration takes a supervised step."""
        return iteration % self.options.every == 0

    def losses(
        self, iteration: int, scale: float, group: Group | None = None
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield (loss, metrics), `loss_count` times; back-propagate each before the next.

        The losses add up to scale x weight x the mean denoising error of `batch_size` pictures.

        Args:
            scale: 1 where these are added to an update once (then it is no mean over minibatches).
            group: the method's own; every rank takes its share of the pictures.
        """
        o, group = self.options, group or Alone()
        rows = self._deck.deal(iteration // o.every)[0]
        places, counted = self._share(group)
        count = self.loss_count(group)
        for place, one in zip(
            places.split(o.pictures_per_loss), counted.split(o.pictures_per_loss), strict=True
        ):
            error = self._error(iteration, rows[place].tolist(), place.tolist(), one)
            # Gradients are averaged over the ranks, hence the group's size.
            part = group.size * len(place) / o.batch_size
            metrics = {"supervised/loss": error.detach() * (part * count)}
            yield error * (scale * o.weight * part), metrics

    def _share(self, group: Group) -> tuple[Tensor, Tensor]:
        """This rank's places in the batch (long [n]) and which of them count (float32 [n]).

        n is the same on every rank: one that has less to do takes its first place (or that of the
        batch) again, with a weight of 0.
        """
        mine = self._deck.share(group)
        missing = -(-self.options.batch_size // group.size) - len(mine)
        spare = mine[:1] if len(mine) else torch.zeros(1, dtype=torch.long)
        counted = torch.cat([torch.ones(len(mine)), torch.zeros(missing)])
        return torch.cat([mine, spare.expand(missing)]), counted

    def _error(self, iteration: int, rows: list[int], places: list[int], counted: Tensor) -> Tensor:
        """Mean over B pictures of `counted` x the denoising error, 0-d, with a graph."""
        device = self._policy.device
        height, width = self._size
        x_0 = torch.stack([self._latent(row) for row in rows]).to(device)
        noise = [self._stream("train-noise", iteration, place) for place in places]
        eps = normal(noise, x_0.shape[1:]).to(x_0)
        drawn = [self._stream("timestep", iteration, place) for place in places]
        steps = torch.tensor([int(source.integers(len(self._schedule))) for source in drawn])
        alpha, sigma = self._schedule.alpha_sigma(steps)
        cond = self._policy.encode(
            [self.pictures.captions[row] for row in rows],
            guidance_scale=self._guidance,
            height=height,
            width=width,
        )
        prediction = self._policy.predict(
            add_noise(x_0, eps, alpha, sigma),
            self._timesteps[steps.to(device)],
            cond,
            guidance_scale=self._guidance,
        )
        wanted = target(x_0, eps, alpha, sigma, self._schedule.prediction)
        return weighted_denoising_loss(prediction, wanted, counted)

    def _stream(self, purpose: Purpose, iteration: int, place: int) -> Generator:
        return stream(self._seed, purpose, iteration=iteration, position=_PICTURES, sample=place)

    @torch.no_grad()
    def _latent(self, row: int) -> Tensor:
        """A picture's latent [*latent], on the CPU.

        Each is encoded alone: in a batch its last bits would depend on the others, and a resumed
        run, which has lost the latents that were kept, meets it among others.
        """
        if row in self._latents:
            self._latents.move_to_end(row)
            return self._latents[row]
        pixels = self.pictures.pixels(row, *self._size).to(self._policy.device)
        latent = self._policy.encode_pixels(pixels[None])[0].cpu()
        self._latents[row] = latent
        if len(self._latents) > _KEPT_LATENTS:
            self._latents.popitem(last=False)
        return latent

    def loss_count(self, group: Group | None = None) -> int:
        """How many losses `losses` yields, on every rank alike."""
        largest = -(-self.options.batch_size // (group or Alone()).size)
        return math.ceil(largest / self.options.pictures_per_loss)

    @property
    def calls(self) -> int:
        """What a step costs: denoiser forwards of one sample, a backward counting as two."""
        return 3 * self.options.batch_size

    def describe(self) -> list[str]:
        """One line for the person who starts the run."""
        o = self.options
        when = "every iteration" if o.every == 1 else f"one iteration in {o.every}"
        return [
            f"supervised step: {when}, {o.batch_size} of {len(self.pictures)} pictures, "
            f"weight {o.weight:g}"
        ]

    def state_dict(self) -> dict[str, Any]:
        """Which pictures: nothing else must survive."""
        return {"pictures": self.pictures.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with other pictures.

        Raises:
            UserError: they are not those that the run began with.
        """
        if state["pictures"] != self.pictures.fingerprint:
            raise UserError(
                "these are not the pictures or captions that the run began with",
                where="supervised.pictures",
                fix="put the old ones back, or begin another run",
            )
