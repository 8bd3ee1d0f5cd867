"""Small trainings that go wrong, and small ones that do not: the guards inside the loop."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import UserError
from diffusion_align.evaluation.options import EvaluationOptions
from diffusion_align.evaluation.probe import Probe
from diffusion_align.reporting.console import Quiet
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.checkpoint import load_checkpoint
from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards import GuardStop
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions
from diffusion_align.training.result import TrainResult
from reward_models.base import RewardInfo, Scores

SAMPLING = SamplingOptions(steps=4, guidance_scale=1.0, batch_size=48)
LEARNS = TrainOptions(steps=30, learning_rate=1e-2, checkpoint_every=0, sample_every=0)
PROMPTS = ["a", "bb", "ccc", "dddd"]


class Notebook(Quiet):
    """A reporter that remembers what guards said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    @property
    def warnings(self) -> list[str]:
        return [text for text in self.messages if text.startswith("guard ")]


def ddpo(toy: ModuleType, reward: Any = None, policy: Any = None, **options: Any) -> DDPO:
    chosen = {
        "prompts_per_iteration": 4,
        "samples_per_prompt": 12,
        "train_batch_size": 24,
        "timesteps_per_loss": 4,
        "clip_range": 0.05,
        "advantages": "group",
        **options,
    }
    return DDPO(
        policy or toy.ToyPolicy(),
        reward or toy.Brightness(),
        PROMPTS,
        options=DDPOOptions(**chosen),
        sampling=SAMPLING,
    )


def run(algorithm: Any, folder: Path, reporter: Any = None, **options: Any) -> TrainResult:
    chosen = {"options": LEARNS, **options}
    return train(algorithm, output=folder, reporter=reporter or Quiet(), **chosen)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_learning_rate_of_a_thousand_is_ratio_drift(toy: ModuleType, tmp_path: Path) -> None:
    notes = Notebook()
    options = replace(LEARNS, learning_rate=1e3)
    run(ddpo(toy), tmp_path / "warned", notes, options=options)
    (warning, *_) = [text for text in notes.warnings if "ratio_drift" in text]
    assert "clip range 0.05 mean" in warning and "train.learning_rate" in warning
    with pytest.raises(GuardStop, match="clipping no longer holds") as caught:
        guards = GuardOptions(ratio_drift="stop")
        run(ddpo(toy), tmp_path / "stopped", options=options, guards=guards)
    # Two iterations of two updates each, and the run is saved where it stopped.
    assert caught.value.where == "step 4" and checkpoints(tmp_path / "stopped") == ["step_000004"]
    # Who resumes with a smaller rate gets as many iterations as any other before it stops again.
    with pytest.raises(GuardStop) as caught:
        run(ddpo(toy), tmp_path / "stopped", options=options, guards=guards, resume=True)
    assert caught.value.where == "step 8"


def test_a_learning_rate_without_bounds_is_nan_and_never_saved(
    toy: ModuleType, tmp_path: Path
) -> None:
    options = replace(LEARNS, learning_rate=1e35, checkpoint_every=1)
    with pytest.raises(GuardStop, match=r"norm is (nan|inf)|hold NaN") as caught:
        run(ddpo(toy), tmp_path / "run", options=options)
    assert caught.value.guard == "not_finite" and "learning_rate" in caught.value.fix
    for name in checkpoints(tmp_path / "run"):
        saved = load_checkpoint(tmp_path / "run" / "checkpoints" / name).parameters
        assert all(bool(value.isfinite().all()) for value in saved.values())


def test_parameters_that_became_nan_in_the_last_update_are_not_saved(
    regression: ModuleType, tmp_path: Path
) -> None:
    algorithm = regression.Regression()
    losses = 0

    def poison(where: str) -> None:
        nonlocal losses
        losses += where == "between"
        if losses == 24:  # after the last backward of step 3
            with torch.no_grad():
                algorithm.policy.bare.bias.fill_(math.nan)

    algorithm.event = poison
    with pytest.raises(GuardStop, match=r"1 of 2 trained tensors .*first: bias") as caught:
        run(
            algorithm, tmp_path / "run", options=replace(LEARNS, accumulation=4, checkpoint_every=1)
        )
    assert caught.value.where == "step 3" and "is sound" in caught.value.fix
    assert checkpoints(tmp_path / "run") == ["step_000001", "step_000002"]


def test_a_nan_at_an_iterations_first_update_loses_nothing(
    regression: ModuleType, tmp_path: Path
) -> None:
    """The run is saved although no checkpoint was due, and goes on as if nothing had been."""
    options = replace(LEARNS, steps=12, accumulation=2)
    straight = regression.Regression()
    run(straight, tmp_path / "straight", options=options)
    broken = regression.Regression()
    losses = broken.losses

    def poisoned(minibatch: torch.Tensor, scale: float) -> Iterator[Any]:
        for loss, metrics in losses(minibatch, scale):
            yield loss * (math.nan if len(broken.scales) == 9 else 1.0), metrics

    broken.losses = poisoned
    notes = Notebook()
    with pytest.raises(GuardStop, match="norm is nan"):
        run(broken, tmp_path / "run", notes, options=options)
    assert checkpoints(tmp_path / "run") == ["step_000004"]
    assert any("go on with --resume" in text for text in notes.messages)
    resumed = regression.Regression()
    run(resumed, tmp_path / "run", options=options, resume=True)
    for mine, theirs in zip(
        resumed.policy.bare.parameters(), straight.policy.bare.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_skipped_update_is_as_if_it_had_no_gradient(
    regression: ModuleType, tmp_path: Path
) -> None:
    options = replace(LEARNS, steps=4, accumulation=4)
    seen: list[torch.Tensor] = []

    def algorithm() -> Any:
        made = regression.Regression()
        losses = made.losses

        def poisoned(minibatch: torch.Tensor, scale: float) -> Iterator[Any]:
            if len(made.scales) % 4 == 0:
                seen.append(made.policy.bare.weight.detach().clone())
            for loss, metrics in losses(minibatch, scale):
                yield loss * (math.inf if len(made.scales) == 6 else 1.0), metrics

        made.losses = poisoned
        return made

    notes, guards = Notebook(), GuardOptions(not_finite="skip")
    run(algorithm(), tmp_path / "run", notes, options=options, guards=guards)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])  # step 2 was left out
    assert not torch.equal(seen[2], seen[3])
    assert len(notes.warnings) == 1 and "step 2" in notes.warnings[0]


def test_a_reward_that_collapses_stops_the_run_and_saves_it(
    toy: ModuleType, tmp_path: Path
) -> None:
    trained = toy.Brightness()

    class Mistaken(toy.ToyPolicy):  # type: ignore[name-defined]
        """Its updates point the wrong way, as with a wrong sign in a loss."""

        def __init__(self) -> None:
            super().__init__()
            for parameter in self.bare.parameters():
                parameter.register_hook(lambda gradient: -gradient)

    options = replace(LEARNS, steps=200, learning_rate=2e-2)
    guards = GuardOptions(reward_collapse_deviations=0.5)
    algorithm = ddpo(toy, trained, Mistaken())
    with pytest.raises(GuardStop, match="running reward fell from") as caught:
        run(algorithm, tmp_path / "run", options=options, guards=guards)
    assert "earlier checkpoint" in caught.value.fix
    rows = TrainResult(tmp_path / "run", 0, 0, {}, False).rows()
    assert checkpoints(tmp_path / "run") == [f"step_{rows[-1]['step']:06d}"]


# --- what is held out --------------------------------------------------------------------------


class Darkness:
    """The opposite of what is trained: the plainest witness of a hack."""

    info = RewardInfo("darkness", "image", True, "-1 to 0", "-", "-")

    def score(self, media: torch.Tensor, prompts: Any, **options: Any) -> Scores:
        return Scores(-media.flatten(1).mean(1))


def hacked(toy: ModuleType) -> tuple[DDPO, Probe]:
    class Drawn(toy.ToyPolicy):  # type: ignore[name-defined]
        @contextmanager
        def reference(self, kind: str = "start") -> Iterator[None]:
            with super().reference():
                yield

        def save(self, folder: Any) -> None:
            from safetensors.torch import save_file

            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(dict(self.bare.state_dict()), Path(folder) / "w.safetensors")

    policy = Drawn()
    probe = Probe(
        policy,
        PROMPTS,
        rewards={"brightness": toy.Brightness(), "darkness": Darkness()},
        options=EvaluationOptions(seeds=4, sample_prompts=4, eta=1.0),
        sampling=SAMPLING,
    )
    return ddpo(toy, policy=policy), probe


HACK = replace(LEARNS, steps=80, learning_rate=2e-2, sample_every=4, checkpoint_every=3)
EARLY = GuardOptions(stop_when_heldout_falls="stop")


@pytest.fixture(scope="module")
def ended(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Notebook]:
    folder, notes = tmp_path_factory.mktemp("hacked") / "run", Notebook()
    algorithm, probe = hacked(toy)
    result = run(algorithm, folder, notes, options=HACK, probe=probe, guards=EARLY)
    assert result.steps < HACK.steps
    return folder, notes


def test_a_reward_that_rises_at_the_cost_of_a_held_out_one_ends_the_run(
    ended: tuple[Path, Notebook],
) -> None:
    folder, notes = ended
    (said,) = [t for t in notes.warnings if "stop_when_heldout_falls" in t]
    assert "held-out darkness fell" in said and "2 looks in a row" in said
    rows = TrainResult(folder, 0, 0, {}, False).rows()
    looks = {row["step"]: row for row in rows if "heldout/darkness" in row}
    first, last = looks[0], looks[max(looks)]
    assert last["heldout/darkness"] < first["heldout/darkness"]
    assert last["heldout/brightness"] > first["heldout/brightness"]
    # Saved, and the model is there, as at any other end.
    assert checkpoints(folder)[-1] == f"step_{rows[-1]['step']:06d}"
    assert (folder / "final" / "w.safetensors").exists()


def test_it_is_the_same_run_after_a_restart(
    toy: ModuleType, tmp_path: Path, ended: tuple[Path, Notebook]
) -> None:
    """Cut in the middle, where the baseline and the counts must come from the checkpoint."""
    folder, notes = ended
    again = Notebook()
    algorithm, probe = hacked(toy)
    run(algorithm, tmp_path / "run", again, options=HACK, probe=probe, guards=EARLY, steps=6)
    algorithm, probe = hacked(toy)
    run(
        algorithm,
        tmp_path / "run",
        again,
        options=HACK,
        probe=probe,
        guards=EARLY,
        resume=True,
    )
    assert again.warnings == notes.warnings
    name = checkpoints(folder)[-1]
    assert checkpoints(tmp_path / "run")[-1] == name
    states = [
        load_checkpoint(place / "checkpoints" / name).state["guards"]
        for place in (folder, tmp_path / "run")
    ]
    assert states[0] == states[1]


class Near:
    """Best where a picture has a certain brightness, which training passes on its way."""

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.info = RewardInfo("near", "image", True, "-1 to 0", "-", "-")

    def score(self, media: torch.Tensor, prompts: Any, **options: Any) -> Scores:
        return Scores(-(media.flatten(1).mean(1) - self.peak).abs())


def test_the_best_look_is_kept_named_and_the_one_that_was_looked_at(
    toy: ModuleType, tmp_path: Path
) -> None:
    algorithm, _ = hacked(toy)
    probe = Probe(
        algorithm.policy,
        PROMPTS,
        rewards={"brightness": toy.Brightness(), "near": Near(0.62)},
        options=EvaluationOptions(seeds=4, sample_prompts=4, eta=1.0),
        sampling=SAMPLING,
    )
    weights: dict[int, torch.Tensor] = {}
    policy: Any = algorithm.policy
    scores = probe.scores

    def watched(step: int) -> Any:
        weights[step] = policy.bare.weight.detach().clone()
        return scores(step)

    probe.scores = watched  # type: ignore[method-assign]
    run(algorithm, tmp_path / "run", options=HACK, probe=probe, guards=EARLY)
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    looks = {row["step"]: row["heldout/near"] for row in rows if "heldout/near" in row}
    best = max(looks, key=lambda step: looks[step])
    assert 0 < best < max(looks)
    assert [p.name for p in (tmp_path / "run" / "best").iterdir()] == [f"step_{best:06d}"]
    kept = load_file(tmp_path / "run" / "best" / f"step_{best:06d}" / "w.safetensors")
    assert torch.equal(kept["weight"], weights[best])


# --- what goes well ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"clip_range": 0.05},
        {"clip_range": 0.2, "clip_unit": "nats"},
        pytest.param(
            {"clip_range": 0.05, "kl_weight": 0.1, "advantages": "global"}, marks=pytest.mark.slow
        ),
        pytest.param({"clip_range": 0.05, "inner_epochs": 2}, marks=pytest.mark.slow),
    ],
    ids=["mean", "nats", "kl", "epochs"],
)
def test_a_healthy_run_trips_no_default_guard(
    toy: ModuleType, tmp_path: Path, options: dict[str, Any]
) -> None:
    notes = Notebook()
    result = run(ddpo(toy, **options), tmp_path / "run", notes, options=replace(LEARNS, steps=40))
    assert notes.warnings == []
    assert not any(name.startswith("guard/") for row in result.rows() for name in row)


def test_a_healthy_regression_trips_no_default_guard(
    regression: ModuleType, tmp_path: Path
) -> None:
    notes = Notebook()
    run(regression.Regression(), tmp_path / "run", notes, options=replace(LEARNS, steps=100))
    assert notes.warnings == []


def test_guards_raise_what_people_can_act_on() -> None:
    assert issubclass(GuardStop, UserError)
