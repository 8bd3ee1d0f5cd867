"""Latents, judged: decoded, scored, and what the loss says of each of their numbers.

Decoding goes chunk by chunk without gradients, the reward's product is taken on the pixels, and
`Policy.decode_gradient` brings it to the latents, so that never more than one chunk's pixels and
one graph are there. Pixels reach the reward as they were decoded, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from diffusion_align.algorithms.chain_checks import check_finite, vae_broken
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.plan import Item
from diffusion_align.algorithms.reward_gradient import RewardLoss, WithGradient
from diffusion_align.algorithms.scoring import ChunkScorer
from diffusion_align.algorithms.sharing import Share
from diffusion_align.policy import Policy
from reward_models.base import Reward, Scores
from reward_models.video.frames import FrameChoice


@dataclass(frozen=True)
class Judgement:
    """Of this rank's n items; scores are those of all N.

    gradient: float [n, *latent], dL/dx_0 per item. pixels, latents: whether dL/dpixels and dL/dx_0
    are anywhere other than zero.
    """

    scores: Scores
    gradient: Tensor
    pixels: bool
    latents: bool


class Judge:
    """Takes latents of an iteration's items in their order, and gives back a `Judgement`.

    In a group of processes a reward of scope `group` gets whole prompts: pixels are exchanged, one
    prompt at a time, and its gradient is sent back.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        options: DraftOptions,
        iteration: int,
        share: Share,
        items: Sequence[Item],
    ) -> None:
        self._policy, self._options, self._iteration = policy, options, iteration
        self._share, self._items = share, items
        self._recorder = WithGradient(reward, RewardLoss.of(options))
        self._scorer = self._new_scorer()
        self._exchanges = share.group.size > 1 and reward.info.scope == "group"
        self._waiting: list[tuple[Tensor, str]] = []  # latents without a gradient yet
        self._gradients: list[Tensor] = []
        self._exchanged: list[Tensor] = []
        self._pixels = self._latents = False

    def add(self, x_0: Tensor, items: Sequence[Item]) -> Tensor:
        """Judge [B, *latent]; their pixels, float [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].

        Raises:
            UserError: the reward failed, or a gradient is not finite.
        """
        options = self._options
        with torch.no_grad():
            pixels = self._policy.decode(
                x_0, chunk=options.decode_batch_size or 1, frames=self._frames(x_0)
            )
        texts = [item.prompt.text for item in items]
        self._waiting += list(zip(x_0, texts, strict=True))
        if self._exchanges:
            self._exchanged.append(pixels.cpu())
            return pixels
        size = options.reward_batch_size or len(items)
        for start in range(0, len(items), size):
            chunk = slice(start, start + size)
            self._scorer.add(pixels[chunk], items[chunk])
            self._pull()
        return pixels

    def finish(self) -> Judgement:
        """Scores of all items, gradients of this rank's.

        Raises:
            UserError: as `add`.
        """
        scores = self._exchange() if self._exchanges else self._scorer.finish()
        self._pull()
        whole = self._share.gather_scores(scores, self._items, by_prompt=self._exchanges)
        return Judgement(whole, torch.cat(self._gradients), self._pixels, self._latents)

    def _pull(self) -> None:
        """Take dL/dpixels of what has been scored to the latents."""
        for pixel_gradient in self._recorder.take():
            self._arrived(pixel_gradient)

    def _arrived(self, pixel_gradient: Tensor) -> None:
        count = len(pixel_gradient)
        if not count:
            return
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        x_0 = torch.stack([latent for latent, _ in ready])
        self._pixels |= bool(pixel_gradient.any())
        gradient = self._decode_gradient(x_0, pixel_gradient.to(x_0.device))
        check_finite(gradient, [text for _, text in ready], self._iteration)
        self._latents |= bool(gradient.any())
        self._gradients.append(gradient)

    def _decode_gradient(self, x_0: Tensor, pixel_gradient: Tensor) -> Tensor:
        frames = self._frames(x_0)
        try:
            return self._policy.decode_gradient(
                x_0, pixel_gradient, chunk=self._options.decode_batch_size, frames=frames
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # It is torch's word for many things; whether this is one of a lost graph can be seen.
            with torch.enable_grad():
                pixels = self._policy.decode(x_0[:1].detach().requires_grad_(), frames=frames)
            if pixels.requires_grad:
                raise
            raise vae_broken(self._iteration) from error

    def _frames(self, x_0: Tensor) -> list[int] | None:
        """Which latent frames of clips are decoded; None is all of them, and of images."""
        choice = FrameChoice.parse(self._options.decode_frames)
        if getattr(self._policy.info, "modality", "image") == "image" or choice.kind == "all":
            return None
        return choice.indices(self._policy.latent_frames(x_0.shape[1:]))

    def _exchange(self) -> Scores:
        """Whole prompts to one rank each (prompt p to rank p modulo the size), gradients back."""
        share, group = self._share, self._share.group
        everyone = [share.places_of(rank) for rank in range(group.size)]
        pixels, start, found = torch.cat(self._exchanged), 0, []
        for position, same in groupby(self._items, key=lambda item: item.position):
            members = list(same)
            stop = start + len(members)
            rows = [(places >= start) & (places < stop) for places in everyone]
            held = [places[row] for places, row in zip(everyone, rows, strict=True)]
            whole = group.gather(pixels[rows[group.rank]])
            answer = whole[:0]
            if position % group.size == group.rank:
                order = torch.cat(held).argsort()
                scorer = self._new_scorer()
                scorer.add(whole[order].to(self._policy.device), members)
                found.append(scorer.finish())
                answer = self._recorder.take()[0].cpu()[order.argsort()]
            before = sum(map(len, held[: group.rank]))
            self._arrived(group.gather(answer)[before : before + len(held[group.rank])])
            start = stop
        names = found[0].parts if found else ()
        return Scores(
            torch.cat([torch.empty(0), *(scores.values for scores in found)]),
            {name: torch.cat([scores.parts[name] for scores in found]) for name in names},
        )

    def _new_scorer(self) -> ChunkScorer:
        info = self._policy.info
        clips = getattr(info, "modality", "image") == "video"
        # Latent frames that were picked apart do not follow one another at any rate.
        paced = clips and FrameChoice.parse(self._options.decode_frames).kind in ("all", "first")
        return ChunkScorer(
            self._recorder,
            self._iteration,
            timeout=self._options.reward_timeout,
            fps=getattr(info, "fps", None) if paced else None,
            keyed=clips,
        )
