"""What stands for a reward that is not loaded, while a run is run dry.

A large reward is mostly its CLIP tower, whose shapes the catalogue knows: the tower is built
without memory and embeds the pictures, forwards and, where a gradient is asked for, backwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_align.assemble.reward_memory import empty_tower, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_align.config import RunConfig
    from reward_models.base import Scores
    from reward_models.clip_tower import ClipTower


def stands_for(name: str) -> bool:
    """Whether `stand_in` needs what the reward of that name does, but for its texts and head."""
    return all(row is not None and (row.tower or not row.files) for row in rows_of(name))


def stand_in(name: str, config: RunConfig) -> RowOfNumbers:
    """For the reward of that name; one on another device than the model's costs nothing there."""
    from diffusion_align.assemble.weightless import make_fake
    from diffusion_align.policy.devices import device_of
    from reward_models.clip_tower import ClipTower

    device = device_of(config.model.device)
    if config.reward_device is not None and device_of(config.reward_device) != device:
        return RowOfNumbers()
    names = {row.tower for row in rows_of(name) if row is not None and row.tower}
    towers = [ClipTower(empty_tower(tower)) for tower in sorted(names)]
    make_fake([tower.model for tower in towers], device)
    return RowOfNumbers(towers)


class RowOfNumbers:
    """A reward that gives its items 0, 1, 2 ... and their mean, whatever its towers see."""

    def __init__(self, towers: Sequence[ClipTower] = ()) -> None:
        from reward_models.base import RewardInfo

        self.info = RewardInfo("not at hand", "image", True, "0 and up", "", "")
        self._towers = towers

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, object]] | None = None,
    ) -> Scores:
        """Pictures [B, 3, H, W] or clips [B, F, 3, H, W]: float32 [B], differentiable."""
        import torch

        from reward_models.base import Scores

        self._embed(media.flatten(0, -4))
        row = torch.arange(float(len(prompts)), device=media.device)
        return Scores(row + media.flatten(1).float().mean(1))

    def _embed(self, pictures: Tensor) -> None:
        """For the memory of it. Towers of a sum are all there before the gradient is taken."""
        import torch

        backwards = pictures.requires_grad and torch.is_grad_enabled()
        leaf: Any = pictures.detach().requires_grad_(backwards)
        with torch.set_grad_enabled(backwards):
            seen = [tower.image_features(tower.prepare(leaf)).sum() for tower in self._towers]
            if seen and backwards:
                torch.autograd.grad(seen, leaf)
