"""Reward backpropagation: the estimate beside the measured high-water of one real update."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from diffusion_align.assemble.check import measure
from diffusion_align.assemble.estimate import estimate
from diffusion_align.cli import app
from diffusion_align.config import RunConfig, load_config

BAR = 0.15
SMALL = (
    "model.device=cpu",
    "sampling.steps=8",
    "sampling.batch_size=8",
    "algorithm.prompts_per_iteration=8",
    "algorithm.train_batch_size=4",
    "algorithm.decode_batch_size=1",
    "train.accumulation=2",
    "evaluation.batch_size=4",
    "evaluation.rewards=[]",
)
K_5 = ("algorithm.preset=draft-k", "algorithm.active_steps=5")
COPY = "algorithm.lv_copies=1"
GRAPH = "algorithm.engine=autograd"


def config(*words: str) -> RunConfig:
    loaded = load_config("draft_tiny", ["output=unused", *SMALL, *words])
    assert isinstance(loaded, RunConfig)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("algorithm.preset=draft-lv", "sampling.guidance_scale=3"),
        ("algorithm.preset=draft-k", "algorithm.active_steps=1"),
        K_5,
        (*K_5, "sampling.guidance_scale=3"),
        (*K_5, GRAPH),
        (*K_5, GRAPH, "sampling.guidance_scale=3"),
        ("algorithm.preset=draft-lv", GRAPH),
        ("algorithm.preset=alignprop",),
        ("algorithm.preset=alignprop", GRAPH),
        ("algorithm.preset=drtune", "algorithm.decode_batch_size=8"),
        (*K_5, "algorithm.kl_weight=0.1", "train.accumulation=2"),
        (*K_5, "model.gradient_checkpointing=true", "lora=null"),
        (*K_5, "train.mixed_precision=bf16"),
        (*K_5, "algorithm.loss=relu", "algorithm.loss_target=0.9"),
        ("supervised.pictures=small-world:64", "supervised.batch_size=8"),
    ],
    ids="-".join,
)
def test_the_estimate_for_tiny_sd_is_within_the_bar(words: tuple[str, ...]) -> None:
    chosen = config(*words)
    found, measured = estimate(chosen), measure(chosen)
    assert found.step == pytest.approx(measured.step, rel=BAR)
    weights = sum(v for k, v in found.held.items() if k.startswith(("frozen", "trained")))
    assert weights == measured.level
    assert measured.iteration["updating"] > 0
    print(f"estimated {found.step / 2**20:.2f} MiB, measured {measured.step / 2**20:.2f} MiB")


def test_stored_terms_are_exact_and_the_rest_is_within_the_bar() -> None:
    """8 chains of 8 steps, eta 1, K = 2, a copy: x at 2 steps, the noise of one (the last step is
    deterministic), x_0, x_0 noised again, what that leads to, and the gradient of either end."""
    chosen = config("algorithm.preset=draft-lv", "algorithm.active_steps=2", COPY)
    found, measured = estimate(chosen), measure(chosen)
    assert found.collected["stored latents"] == 8 * (2 + 1 + 1 + 2 + 2) * 256 * 4
    assert "log-probabilities" not in found.collected
    assert found.later["optimiser's moments"] == 2 * found.held["trained parameters"]
    assert found.gradients == found.held["trained parameters"]
    assert found.step == pytest.approx(measured.step, rel=BAR)


@pytest.mark.slow
def test_one_graph_grows_with_k_in_the_estimate_and_replay_does_not() -> None:
    def training(*words: str) -> int:
        return estimate(config(*words)).phases["updating"]

    first = "algorithm.preset=draft-k", "algorithm.active_steps=1"
    assert training(*K_5) < 1.1 * training(*first)
    assert training(*K_5, GRAPH) > 3 * training(*first, GRAPH)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["tiny-hps", "0.5*tiny-hps + 0.5*tiny-mps"])
def test_a_reward_that_is_not_loaded_is_estimated_by_its_towers(
    monkeypatch: pytest.MonkeyPatch, reward: str
) -> None:
    """Scored 8 at a time, the reward's own graph is what needs the most."""
    words = (f"reward={reward}", "sampling.batch_size=8")
    known = estimate(config(*words))
    monkeypatch.setattr("diffusion_align.assemble.reward_memory._LOADED_AT_ONCE", -1.0)
    found = estimate(config(*words))
    assert found.phases["scoring"] == pytest.approx(known.phases["scoring"], rel=BAR)
    assert not found.unknown


def test_the_cut_update_keeps_the_steps_and_accumulates_twice() -> None:
    from diffusion_align.assemble.one_update import amount, cut_to_one_update
    from diffusion_align.policy.catalogue import resolve

    chosen = config(
        "algorithm.prompts_per_iteration=32", "train.accumulation=8", "sampling.batch_size=2"
    )
    info = resolve(chosen.model.id)
    cut = cut_to_one_update(chosen, info)
    assert cut.sampling.steps == 2  # the last, and one before it
    assert cut.algorithm.options.samples == 8 and cut.train.accumulation == 2
    whole, part = amount(chosen, info, 1), amount(cut, info, 1)
    # One last step and two copies of each sample.
    assert (whole.calls, part.calls) == (32 * (8 + 2), 8 * (2 + 2))
    assert (whole.pairs, part.pairs, part.per_update) == (32 * 3, 8 * 3, 8 * 3)


def test_memory_auto_makes_the_fullest_phase_of_reward_gradients_smaller() -> None:
    from dataclasses import replace

    from diffusion_align.assemble.estimate import Estimate
    from diffusion_align.assemble.memory_plan import settle

    def pretended(config: RunConfig) -> Estimate:
        o = config.algorithm.options
        phases = {
            "decoding": 2 * o.decode_batch_size,
            "scoring": 3 * (o.reward_batch_size or config.sampling.batch_size),
            "updating": o.train_batch_size,
        }
        return Estimate({}, {}, {}, phases, 0, {}, 0, {}, ())

    base = config("memory=auto", "algorithm.decode_batch_size=8", "model.vae_slicing=false")
    base = replace(base, model=replace(base.model, vae_tiling=False, gradient_checkpointing=False))
    plan = settle(base, estimate=pretended, free=10)
    assert plan.chosen["algorithm.reward_batch_size"] == 2
    assert plan.chosen["algorithm.decode_batch_size"] == 4
    low = settle(config("memory=low")).config
    assert low.algorithm.options.reward_batch_size == 1
    assert (low.algorithm.options.train_batch_size, low.train.accumulation) == (1, 8)


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.slow
def test_the_command_shows_estimate_and_measured_beside_one_another() -> None:
    done = call("check", "draft_tiny", *SMALL, "algorithm.preset=alignprop")
    assert done.exit_code == 0, done.stderr
    for said in ("decoding: activations", "the most at once", "One real update", "is drawn for"):
        assert said in done.stdout
    assert "measured beside estimated" in done.stdout


@pytest.mark.parametrize("count", [1, 5])
def test_latents_of_the_active_steps_are_stored_and_no_others(count: int) -> None:
    """Without noise: K active ones, what they lead to, and its gradient."""
    words = ("algorithm.preset=draft-k", f"algorithm.active_steps={count}", "sampling.eta=0")
    found = estimate(config(*words))
    latent = 4 * 8 * 8
    assert found.collected["stored latents"] == 4 * 8 * (count + 2) * latent
