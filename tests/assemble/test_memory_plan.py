"""`memory: auto | low | high`: explicit keys win, auto stops as soon as it fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_align.assemble.estimate import Estimate
from diffusion_align.assemble.memory_plan import settle, write_plan
from diffusion_align.config import RunConfig, load_config
from diffusion_align.errors import UserError

MEGA = 1 << 20


def config(*words: str) -> RunConfig:
    loaded = load_config("demo", ["model.device=cpu", "output=unused", *words])
    assert isinstance(loaded, RunConfig)
    return loaded


def pretended(config: RunConfig) -> Estimate:
    """100 MiB of weights; training 1 MiB per pair, a third of it checkpointed; decoding 2 each."""
    options = config.algorithm.options
    training = options.train_batch_size * options.timesteps_per_loss * MEGA
    if config.model.gradient_checkpointing:
        training //= 4
    decoding = 2 * MEGA * (1 if config.model.vae_slicing else config.sampling.batch_size)
    return Estimate(
        held={"frozen unet": 100 * MEGA},
        later={},
        collected={},
        phases={"sampling": 1 * MEGA, "decoding": decoding, "updating": training},
        gradients=0,
        beside={},
        step=0,
        flops={},
        unknown=(),
    )


def auto(free: int, *words: str) -> Any:
    return settle(config("memory=auto", *words), estimate=pretended, free=free * MEGA)


def test_auto_makes_looks_at_the_model_smaller() -> None:
    def looking(config: RunConfig) -> Estimate:
        return replace(
            pretended(config),
            phases={"sampling": MEGA, "looking": 2 * MEGA * config.evaluation.batch_size},
        )

    plain = config("memory=auto", "model.vae_slicing=true", "model.vae_tiling=true")
    plan = settle(plain, estimate=looking, free=200 * MEGA)
    assert plan.chosen == {"evaluation.batch_size": 32}  # 128 in the demo
    assert settle(config("memory=low")).config.evaluation.batch_size == 1


def test_high_changes_nothing_and_is_the_default() -> None:
    plain = config()
    assert plain.memory == "high"
    plan = settle(plain)
    assert plan.config is plain and not plan.chosen and not plan.lines


def test_low_takes_everything_that_was_left_open() -> None:
    plan = settle(config("memory=low", "model.vae_slicing=false"))
    model, options = plan.config.model, plan.config.algorithm.options
    assert model.gradient_checkpointing and model.vae_tiling and model.release_text_encoders
    assert model.vae_slicing is False  # said by the person
    assert (options.train_batch_size, plan.config.train.accumulation) == (1, 64)
    assert options.timesteps_per_loss == 1 and plan.config.sampling.batch_size == 1
    assert plan.config.train.mixed_precision == "no" and plan.config.train.optimizer == "adamw"
    assert "model.gradient_checkpointing=true" in plan.lines[0]


def test_auto_takes_nothing_where_it_fits() -> None:
    plan = auto(1000)
    assert not plan.chosen and "0.98 GiB free" in plan.lines[0]


def test_auto_helps_the_fullest_phase_until_it_fits() -> None:
    # 356 MiB are needed (decoding 128 pictures), training comes next with 128.
    plan = auto(260)
    assert plan.chosen == {"model.vae_slicing": True}
    plan = auto(200)
    assert plan.chosen == {"model.vae_slicing": True, "model.gradient_checkpointing": True}
    assert pretended(plan.config).peak <= 0.9 * 200 * MEGA


def test_auto_splits_batches_when_switches_are_used_up() -> None:
    plan = auto(125, "model.vae_slicing=true", "model.gradient_checkpointing=true")
    options, train = plan.config.algorithm.options, plan.config.train
    assert pretended(plan.config).peak <= 0.9 * 125 * MEGA
    assert options.train_batch_size * train.accumulation == 64 and train.accumulation > 1
    assert options.timesteps_per_loss == 1


def test_auto_leaves_what_a_person_said() -> None:
    plan = auto(200, "model.gradient_checkpointing=false")
    assert plan.config.model.gradient_checkpointing is False


def test_auto_says_when_nothing_helps_and_what_would() -> None:
    plan = auto(50)
    assert "may not fit" in plan.lines[0] and "train.mixed_precision=bf16" in plan.lines[0]


def test_a_resumed_run_keeps_what_was_chosen(tmp_path: Path) -> None:
    output = f"output={tmp_path}"
    plan = settle(config("memory=auto", output), estimate=pretended, free=200 * MEGA)
    write_plan(tmp_path, plan)

    def never(config: RunConfig) -> Estimate:
        raise AssertionError("a resumed run does not choose again")

    again = settle(config("memory=auto", output), resume=True, estimate=never, free=1 << 50)
    assert again.config == plan.config and again.chosen == plan.chosen
    (tmp_path / "memory.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"memory\.json"):
        settle(config("memory=auto", output), resume=True)


def test_a_recorded_plan_is_json(tmp_path: Path) -> None:
    plan = settle(config("memory=auto"), estimate=pretended, free=200 * MEGA)
    write_plan(tmp_path, plan)
    assert json.loads((tmp_path / "memory.json").read_text()) == dict(plan.chosen)
    write_plan(tmp_path / "none", replace(plan, config=config()))  # high leaves no file
    assert not (tmp_path / "none").exists()


def test_a_split_minibatch_learns_the_same() -> None:
    """One update of 8 samples, and the same update from 4 minibatches of 2, on the real model."""
    from diffusion_align.assemble.loading import load_policy
    from diffusion_align.assemble.named import load_algorithm, training_prompts
    from reward_models import load

    small = config(
        "sampling.steps=2",
        "algorithm.prompts_per_iteration=2",
        "algorithm.samples_per_prompt=4",
        "algorithm.train_batch_size=8",
        "algorithm.old_log_probs=replayed",
        "lora.rank=1",
        "train.steps=1",
        "train.sample_every=0",
    )
    split = replace(
        small,
        algorithm=replace(
            small.algorithm, options=replace(small.algorithm.options, train_batch_size=2)
        ),
        train=replace(small.train, accumulation=4),
    )
    gradients = []
    for chosen in (small, split):
        policy = load_policy(chosen)
        algorithm = load_algorithm(
            chosen, policy, load("incompressibility"), training_prompts(chosen)
        )
        batch = algorithm.collect(0)
        for minibatch in algorithm.minibatches(batch):
            for loss, _ in algorithm.losses(minibatch, 1 / chosen.train.accumulation):
                loss.backward()
        parts = [p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    scale = float(gradients[0].abs().max())
    assert scale > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4 * scale, rtol=1e-3)
