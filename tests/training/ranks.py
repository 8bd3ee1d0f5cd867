"""What one process of a distributed test does; run by path, once per rank, in a forked process.

`WORK` names a function below, `FOLDER` is where runs and answers go, `SETTINGS` are its arguments.
The same functions make the run of one process that the others are compared with.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.draft import Draft
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.algorithms.rwr import RWR
from diffusion_align.algorithms.rwr_options import RWROptions
from diffusion_align.data.prompts import Prompt
from diffusion_align.reporting.console import Quiet
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training import distribution
from diffusion_align.training.distribution import meet
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions
from reward_models.base import RewardInfo, Scores

HERE = Path(__file__).resolve().parent


def load(path: Path) -> ModuleType:
    name = f"{path.stem}_of_ranks"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Picky:
    """Mean pixel, less for later prompts; NaN for what is brighter than `limit`."""

    limit: float = 2.0
    asked: int = 0
    fail_on_rank: int | None = None
    slow_on_rank: int | None = None
    scope: str = "item"
    differentiable: bool = False

    @property
    def info(self) -> RewardInfo:
        scope: Any = self.scope
        return RewardInfo(
            "picky", "image", self.differentiable, "about 0 to 6", "-", "-", scope=scope
        )

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        self.asked += 1
        if self.fail_on_rank == rank() and self.asked > 3:
            raise ValueError("the reward is out of order")
        if self.slow_on_rank == rank() and self.asked > 3:
            time.sleep(3.0)
        values = media.flatten(1).mean(1)
        ranks = values.argsort().argsort().float() if self.scope == "group" else 0.0
        values[values > self.limit] = float("nan")
        return Scores(
            values * torch.tensor([1.0 + len(prompt) for prompt in prompts]) + ranks,
            {"plain": values},
        )


def ddpo(folder: Path, **settings: Any) -> DDPO:
    """The toy world: 3 prompts x 3 samples in minibatches of 3 do not divide by 2."""
    toy = load(HERE.parent / "algorithms" / "toy.py")
    reward = Picky(**settings.get("reward", {}))
    options = {
        "prompts_per_iteration": 3,
        "samples_per_prompt": 3,
        "train_batch_size": 3,
        "timesteps_per_loss": 2,
        "inner_epochs": 2,
        "buffer_min_count": 3,
        "clip_range": 0.1,
        **settings.get("algorithm", {}),
    }
    prompts = [Prompt("a"), Prompt("bb"), Prompt("cccc"), Prompt("ddddd")]
    return DDPO(
        toy.ToyPolicy(),
        reward,
        prompts,
        options=DDPOOptions(**options),
        sampling=SamplingOptions(steps=4, guidance_scale=1.0, batch_size=2),
        seed=3,
    )


def rwr(folder: Path, **settings: Any) -> RWR:
    """The same world by reward-weighted regression."""
    like = ddpo(folder, **settings)
    options = RWROptions(
        prompts_per_iteration=3, samples_per_prompt=3, train_batch_size=3, inner_epochs=2
    )
    prompts = [Prompt("a"), Prompt("bb"), Prompt("cccc"), Prompt("ddddd")]
    return RWR(like.policy, like.reward, prompts, options=options, sampling=like.sampling, seed=3)


def draft(folder: Path, **settings: Any) -> Draft:
    """The same world by the reward's gradient: a chain of losses, two of them LV copies."""
    like = ddpo(folder, **settings)
    assert isinstance(like.reward, Picky)
    like.reward.differentiable = True
    options = DraftOptions(
        preset="draft",
        lv_copies=2,
        kl_weight=0.1,
        prompts_per_iteration=3,
        samples_per_prompt=3,
        train_batch_size=3,
    )
    prompts = [Prompt("a"), Prompt("bb"), Prompt("cccc"), Prompt("ddddd")]
    return Draft(like.policy, like.reward, prompts, options=options, sampling=like.sampling, seed=3)


def real(folder: Path, **settings: Any) -> DDPO:
    """A real UNet with LoRA, guidance and a KL term, judged by a real scorer."""
    import reward_models
    from diffusion_align.policy import Policy

    options = DDPOOptions(
        prompts_per_iteration=3,
        samples_per_prompt=3,
        train_batch_size=3,
        timesteps_per_loss=2,
        advantages="group",
        kl_weight=0.1,
        clip_range=1e-2,
    )
    return DDPO(
        Policy.load("tiny-sd", lora_rank=4),
        reward_models.load("tiny-aesthetic"),
        ["a red circle", "a blue square", "a green triangle"],
        options=options,
        sampling=SamplingOptions(steps=4, batch_size=4, guidance_scale=2.0),
    )


def run(folder: Path, method: str = "ddpo", **settings: Any) -> Any:
    """Train in `folder`/run; the trained parameters are left in `weights-RANK.pt`.

    Settings `losses` and `witness` are names of functions below that are put around the losses.
    """
    distribution.LINGER = settings.get("linger", distribution.LINGER)
    algorithm = globals()[method](folder, **settings)
    if around := settings.get("losses"):
        globals()[around](folder, algorithm)
    chosen = {
        "steps": 6,
        "learning_rate": 1e-2,
        "accumulation": 2,
        "sample_every": 0,
        **settings.get("train", {}),
    }
    probe = globals()[settings["probe"]](algorithm) if "probe" in settings else None
    try:
        result = train(
            algorithm,
            options=TrainOptions(**chosen),
            output=folder / "run",
            resume=settings.get("resume", False),
            reporter=Quiet(),
            probe=probe,
        )
    finally:
        (folder / f"asked-{rank()}.txt").write_text(str(getattr(algorithm.reward, "asked", "")))
    weights = [p.detach().clone() for p in algorithm.policy.trainable_parameters()]
    torch.save(weights, folder / f"weights-{rank()}.pt")
    return result


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def tell_kinds(folder: Path, algorithm: Any) -> None:
    """Write down what kind of parameters are trained."""
    losses = algorithm.losses

    def telling(minibatch: Any, scale: float) -> Iterator[Any]:
        kinds = {type(p.data).__name__ for p in algorithm.policy.trainable_parameters()}
        (folder / f"kinds-{rank()}.txt").write_text(" ".join(sorted(kinds)))
        yield from losses(minibatch, scale)

    algorithm.losses = telling


def fail_on_rank_1(folder: Path, algorithm: Any) -> None:
    """An error in the middle of an update, on one rank only."""
    losses = algorithm.losses

    def failing(minibatch: Any, scale: float) -> Iterator[Any]:
        if rank() == 1:
            raise ZeroDivisionError("one rank cannot divide")
        yield from losses(minibatch, scale)

    algorithm.losses = failing


def drift_on_rank_1(folder: Path, algorithm: Any) -> None:
    """A parameter that one rank changes by itself."""
    losses = algorithm.losses

    def drifting(minibatch: Any, scale: float) -> Iterator[Any]:
        yield from losses(minibatch, scale)
        if rank() == 1:
            with torch.no_grad():
                algorithm.policy.bare.bias[2] += 1e-7

    algorithm.losses = drifting


@dataclass
class Look:
    """A probe that makes a forward, as a real one does, and a picture that says who made it."""

    algorithm: Any

    def samples(self, step: int, folder: Path) -> None:
        policy = self.algorithm.policy
        with torch.no_grad():
            policy.predict(
                torch.zeros(1, 1, 2, 2),
                torch.tensor(1.0),
                policy.encode(["a"]),
                guidance_scale=1.0,
            )
        (folder / "picture.txt").write_text(f"rank {rank()}")

    def heldout(self, step: int) -> dict[str, float]:
        return {"constant": 0.5}


class Judging(Look):
    """A probe whose scores hang on who asks: the main process sees them rise, others fall."""

    def scores(self, step: int) -> dict[str, Any]:
        better = step if rank() == 0 else -step
        return {"taste": np.arange(8.0).reshape(4, 2) + better}


def gathers(folder: Path) -> None:
    """Values of unequal counts, plain values, decisions."""
    group = meet(on_cpu=True)
    unequal = group.gather(torch.full((2 * group.rank, 3), float(group.rank)))
    none = group.gather(torch.zeros(0, 2, dtype=torch.long))
    answers = {
        "unequal": unequal.tolist(),
        "none": list(none.shape),
        "integers": group.gather(torch.tensor([2**40 + group.rank])).tolist(),
        "plain": group.exchange({"rank": group.rank, "text": "x" * (group.rank * 100)}),
        "any": [group.any(group.rank == 1), group.any(False)],
        "main": group.on_main(lambda: f"made by {group.rank}"),
        "mean": group.mean({"a": float(group.rank), "b_max": float(group.rank)}),
    }
    (folder / f"answers-{group.rank}.json").write_text(json.dumps(answers))


def settles(folder: Path) -> None:
    """`memory: auto` where every process has memory of its own; the second has the least."""
    from diffusion_align.assemble import memory_plan, together

    pretend = load(HERE.parent / "assemble" / "test_memory_plan.py")
    own, least = (1000 - 880 * rank()) * 2**20, 120 * 2**20
    memory_plan._estimate = pretend.pretended
    together.free_memory = lambda config: own
    config = pretend.config("memory=auto")
    plan = together.settle_together(config)
    wanted = memory_plan.settle(config, free=least)
    assert wanted.chosen != memory_plan.settle(config, free=1000 * 2**20).chosen
    assert plan == wanted
    (folder / f"chosen-{rank()}.json").write_text(json.dumps(dict(plan.chosen)))


def main() -> None:
    scope = globals()
    os.environ.update(scope["ENVIRONMENT"])
    torch.set_num_threads(1)
    folder = Path(scope["FOLDER"])
    try:
        globals()[scope["WORK"]](folder, **scope["SETTINGS"])
    except BaseException as error:
        (folder / f"error-{os.environ['RANK']}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


if "WORK" in globals():
    main()
