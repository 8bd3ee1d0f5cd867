"""A look at the model during training: sample pictures and scores on held-out prompts.

It draws a few evaluation prompts on the evaluation noise, so the pictures of all steps can be
laid on top of each other: whatever differs was learnt. The untouched base is drawn once and put
beside every one of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusion_align.data.images import save_grid, write_png
from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.exports import write_text
from diffusion_align.evaluation.generate import (
    Pictures,
    Reference,
    evaluation_sampling,
    generate,
)
from diffusion_align.evaluation.options import EvaluationOptions
from diffusion_align.evaluation.scoring import score_pictures
from diffusion_align.evaluation.statistics import Floats
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.secrecy.redaction import redact

if TYPE_CHECKING:
    from diffusion_align.policy import Policy
    from reward_models.base import Reward, RewardInfo

GRID_SEEDS = 3


class Probe:
    """What the training loop calls at step 0, every n steps and at the end.

    Args:
        policy: the policy in training; it is left as it was.
        prompts: evaluation prompts; the first `options.sample_prompts` are used.
        rewards: name -> scorer, scored on the pictures; may be empty.
        options: seeds, batch size and sampler of the evaluation.
        sampling: of the training; what `options` say of steps, guidance, eta comes first.
        run_seed: chooses the evaluation noise.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[str | Prompt],
        *,
        rewards: Mapping[str, Reward],
        options: EvaluationOptions | None = None,
        sampling: SamplingOptions | None = None,
        run_seed: int = 0,
    ) -> None:
        options = options or EvaluationOptions()
        chosen = prompts[: options.sample_prompts]
        self._policy, self._rewards, self._run_seed = policy, rewards, run_seed
        self._prompts = [p if isinstance(p, Prompt) else Prompt(p) for p in chosen]
        self._seeds = options.seeds
        self._sampling = evaluation_sampling(sampling or SamplingOptions(), options)
        self._base: Pictures | None = None
        self._latest: tuple[int, Pictures] | None = None
        self._scored: tuple[int, dict[str, Floats]] | None = None

    def samples(self, step: int, folder: Path) -> None:
        """Write `p0000_s00.png` ... of the policy as it is now and `grid.png`, base beside it.

        `prompts.jsonl` names the prompt of each, as `score` reads it.

        Raises:
            UserError: `folder` cannot be written.
        """
        pictures = self._pictures(step)
        if self._base is None:
            self._base = self._draw("start")
        captions = [redact(prompt.text) for prompt in self._prompts]
        rows = []
        for p, caption in enumerate(captions):
            for s in range(self._seeds):
                name = f"p{p:04d}_s{s:02d}.png"
                write_png(folder / name, pictures.pixels[p, s].numpy())
                rows.append(json.dumps({"path": name, "prompt": caption}, ensure_ascii=False))
        write_text(folder / "prompts.jsonl", "\n".join(rows) + "\n")
        shown = range(min(self._seeds, GRID_SEEDS))
        sides = (self._base, pictures)
        save_grid(
            folder / "grid.png",
            [
                [side.pixels[p, s].numpy() for s in shown for side in sides]
                for p in range(len(self._prompts))
            ],
            row_labels=captions,
            column_labels=["base", f"step {step}"] * len(shown),
            gap_before=range(2, 2 * len(shown), 2),
        )

    def heldout(self, step: int) -> dict[str, float]:
        """Mean score of each reward on the pictures of `step`; without a score it is left out.

        Raises:
            RewardError: a reward broke its contract.
        """
        return {
            name: float(np.nanmean(scores))
            for name, scores in self.scores(step).items()
            if np.isfinite(scores).any()
        }

    def infos(self) -> dict[str, RewardInfo]:
        """What each reward says of itself, by its name."""
        return {name: reward.info for name, reward in self._rewards.items()}

    def scores(self, step: int) -> dict[str, Floats]:
        """Float64 [P, S] by reward: every picture of `step`, NaN where it could not be scored.

        Entry [p, s] has the same prompt and the same noise at every step, so that the difference
        of two steps is a paired one. Scored when first asked for.

        Raises:
            RewardError: a reward broke its contract.
        """
        if not self._rewards:
            return {}
        if self._scored is None or self._scored[0] != step:
            pictures = self._pictures(step)
            self._scored = (
                step,
                {
                    name: score_pictures(
                        reward,
                        name,
                        pictures,
                        self._prompts,
                        device=self._policy.device,
                        batch_size=self._sampling.batch_size,
                        fps=self._policy.info.fps,
                    )[name]
                    for name, reward in self._rewards.items()
                },
            )
        return self._scored[1]

    def _pictures(self, step: int) -> Pictures:
        """The pictures of `step`, drawn when first asked for."""
        if self._latest is None or self._latest[0] != step:
            self._latest = (step, self._draw(None))
        return self._latest[1]

    def _draw(self, reference: Reference | None) -> Pictures:
        return generate(
            self._policy,
            self._prompts,
            self._seeds,
            self._sampling,
            reference=reference,
            run_seed=self._run_seed,
        )
