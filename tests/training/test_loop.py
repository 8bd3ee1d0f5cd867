"""The loop: accumulation, synchronisation, resume, interruption, guards, the run folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch

from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import UserError
from diffusion_align.reporting.console import Quiet
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.checkpoint import load_checkpoint
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions
from diffusion_align.training.result import TrainResult
from diffusion_align.training.setup import Machinery

OPTIONS = TrainOptions(
    steps=8, learning_rate=1e-2, accumulation=2, checkpoint_every=1, sample_every=0
)


class Notebook(Quiet):
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[dict[str, float]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, row: Mapping[str, float]) -> None:
        self.steps.append(dict(row))


def run(algorithm: Any, folder: Path, **options: Any) -> TrainResult:
    chosen = {"options": OPTIONS, "reporter": Quiet(), **options}
    return train(algorithm, output=folder, **chosen)


def weights(algorithm: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in algorithm.policy.bare.parameters()]


def timeless(result: TrainResult) -> list[dict[str, Any]]:
    clock = ("seconds", "time/", "memory/")
    return [
        {name: value for name, value in row.items() if not name.startswith(clock)}
        for row in result.rows()
    ]


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


# --- the update --------------------------------------------------------------------------------


def test_an_update_is_adamw_on_the_mean_of_the_minibatches(
    regression: ModuleType, tmp_path: Path
) -> None:
    algorithm = regression.Regression(policy=regression.Student(dropout=0.0))
    twin = regression.Student(dropout=0.0)
    adam = torch.optim.AdamW(twin.bare.parameters(), lr=1e-2, weight_decay=1e-4)
    batch = regression.Regression().collect(0).x
    for chunk in batch.split(8):
        target = chunk[:, :2] - chunk[:, 2:4]
        (twin.bare(chunk) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.bare.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    run(algorithm, tmp_path / "run", steps=2)
    for mine, theirs in zip(weights(algorithm), twin.bare.parameters()):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_scale_is_one_over_accumulation(regression: ModuleType, tmp_path: Path) -> None:
    algorithm = regression.Regression()
    run(algorithm, tmp_path / "run", steps=2)
    assert algorithm.scales == [0.5] * 4


def test_only_the_last_loss_of_an_update_synchronises(
    regression: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def no_sync(self: Machinery) -> Any:
        events.append("quiet")
        yield

    def backward(self: Machinery, loss: torch.Tensor) -> None:
        events.append("backward")
        loss.backward()

    monkeypatch.setattr(Machinery, "no_sync", no_sync)
    monkeypatch.setattr(Machinery, "backward", backward)
    run(regression.Regression(), tmp_path / "run", steps=1)
    assert events == ["quiet", "backward"] * 3 + ["backward"]


def test_a_wrong_loss_count_is_found(regression: ModuleType, tmp_path: Path) -> None:
    algorithm = regression.Regression()
    algorithm.loss_count = lambda minibatch: 1
    with pytest.raises(RuntimeError, match="loss_count"):
        run(algorithm, tmp_path / "run")


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["collect", "losses", "between"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_crash_and_a_resume_equal_an_uninterrupted_run(
    regression: ModuleType, tmp_path: Path, place: str, every: int
) -> None:
    """Bit for bit, dropout and the global generators included."""
    options = {"options": TrainOptions(**{**vars(OPTIONS), "checkpoint_every": every})}
    straight = regression.Regression()
    expected = run(straight, tmp_path / "straight", **options)

    class Killed(BaseException):
        pass

    count = 0

    def kill(where: str) -> None:
        nonlocal count
        count += where == place
        if where == place and count == {"collect": 4, "losses": 13, "between": 27}[place]:
            raise Killed

    with pytest.raises(Killed):
        run(regression.Regression(event=kill), tmp_path / "broken", **options)
    resumed = regression.Regression()
    result = run(resumed, tmp_path / "broken", resume=True, **options)
    assert same(straight, resumed)
    assert timeless(result) == timeless(expected)
    a, b = (
        load_checkpoint(tmp_path / name / "checkpoints" / "step_000008").state
        for name in ("straight", "broken")
    )
    assert torch.equal(a["random"]["torch"], b["random"]["torch"])
    for key, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][key][name])


def test_ddpo_resumes_bit_for_bit(toy: ModuleType, tmp_path: Path) -> None:
    def make() -> DDPO:
        return DDPO(
            toy.ToyPolicy(),
            toy.Brightness(failing=(1,)),
            ["a", "bb", "ccc"],
            options=DDPOOptions(
                prompts_per_iteration=2,
                samples_per_prompt=4,
                train_batch_size=4,
                buffer_min_count=6,
                clip_range=0.01,
                timestep_fraction=0.5,
                inner_epochs=2,
            ),
            sampling=SamplingOptions(steps=4, guidance_scale=1.0),
        )

    straight, early, late = make(), make(), make()
    expected = run(straight, tmp_path / "straight")
    run(early, tmp_path / "cut", steps=4)
    result = run(late, tmp_path / "cut", resume=True)
    assert same(straight, late)
    assert timeless(result) == timeless(expected)


def test_metrics_and_samples_past_the_checkpoint_are_cut(
    regression: ModuleType, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(regression.Regression(), folder, steps=4)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "iteration": 2, "seconds": 1}\n{"step": 6, "iter')
    (folder / "samples" / "step_000005").mkdir()
    (folder / "samples" / "step_000004").mkdir()
    result = run(regression.Regression(), folder, steps=6, resume=True)
    assert [row["step"] for row in result.rows()] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (folder / "samples").iterdir()] == ["step_000004"]


def test_a_run_that_stops_inside_an_iteration_resumes_exactly(
    regression: ModuleType, tmp_path: Path
) -> None:
    """3 steps are one and a half iterations: the half is done again, not saved half."""
    straight, cut = regression.Regression(), regression.Regression()
    run(straight, tmp_path / "straight")
    run(regression.Regression(), tmp_path / "cut", steps=3)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step_000002"]
    run(cut, tmp_path / "cut", resume=True)
    assert same(straight, cut)


def test_steps_inside_an_iteration_are_announced_and_repeated_at_most_once(
    regression: ModuleType, tmp_path: Path
) -> None:
    """Even where checkpoints are only asked for at the end."""

    class Screen(Notebook):
        def start(self, **told: Any) -> None:
            self.messages += told["lines"]

    options = replace(OPTIONS, checkpoint_every=0, steps=7)
    notes, again = Screen(), Notebook()
    run(regression.Regression(), tmp_path / "run", options=options, reporter=notes)
    assert any("7 steps are 3 iterations of 2 and 1 more" in m for m in notes.messages)
    assert any("train.steps=6 or 8" in m for m in notes.messages)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000006"]
    report = tmp_path / "run" / "final" / "report.html"
    report.write_text("made afterwards")
    repeated = regression.Regression()
    run(repeated, tmp_path / "run", options=options, resume=True, reporter=again)
    assert repeated.collected == 4 and "resumed at step 6, iteration 3" in again.messages
    assert report.exists()  # the same weights came out of it
    run(regression.Regression(), tmp_path / "even", reporter=(notes := Screen()))
    assert not any("iterations of" in message for message in notes.messages)


def test_a_run_that_goes_on_puts_the_earlier_report_aside(
    regression: ModuleType, tmp_path: Path
) -> None:
    run(regression.Regression(), tmp_path / "run", steps=4)
    (tmp_path / "run" / "final" / "report.html").write_text("of step 4")
    notes = Notebook()
    run(regression.Regression(), tmp_path / "run", resume=True, reporter=notes)
    assert (tmp_path / "run" / "final.old-1" / "report.html").read_text() == "of step 4"
    assert [p.name for p in (tmp_path / "run" / "final").iterdir()] == ["w.safetensors"]
    assert any("final.old-1" in message for message in notes.messages)


@pytest.mark.parametrize("error", [ValueError("the judge is down"), UserError("no score")])
def test_an_error_while_collecting_loses_nothing(
    regression: ModuleType, tmp_path: Path, error: Exception
) -> None:
    straight = regression.Regression()
    expected = run(straight, tmp_path / "straight", options=replace(OPTIONS, checkpoint_every=0))

    def fail(place: str) -> None:
        if place == "collect" and broken.collected == 3:
            torch.rand(5)  # what was drawn before the error must not count
            broken.collected = 99
            raise error

    notes, options = Notebook(), replace(OPTIONS, checkpoint_every=0)
    broken = regression.Regression(event=fail)
    with pytest.raises(type(error), match=str(error)):
        run(broken, tmp_path / "run", options=options, reporter=notes)
    saved = tmp_path / "run" / "checkpoints" / "step_000006"
    assert saved.exists()
    assert any(str(saved) in m and "--resume" in m for m in notes.messages)
    resumed = regression.Regression()
    result = run(resumed, tmp_path / "run", options=options, resume=True)
    assert same(straight, resumed) and timeless(result) == timeless(expected)


def test_the_error_outlives_a_save_that_fails(
    regression: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(place: str) -> None:
        if place == "collect" and broken.collected == 1:
            raise ValueError("the judge is down")

    def full(*args: Any, **options: Any) -> None:
        raise UserError("could not be written (no space)")

    monkeypatch.setattr("diffusion_align.training.savepoints.save_checkpoint", full)
    notes, broken = Notebook(), regression.Regression(event=fail)
    options = replace(OPTIONS, checkpoint_every=0)
    with pytest.raises(ValueError, match="the judge is down"):
        run(broken, tmp_path / "run", options=options, reporter=notes)
    assert any("could not be saved" in message for message in notes.messages)


def test_an_error_before_anything_was_learnt_saves_nothing(
    regression: ModuleType, tmp_path: Path
) -> None:
    def fail(place: str) -> None:
        raise ValueError("the judge is down")

    notes = Notebook()
    with pytest.raises(ValueError, match="the judge is down"):
        run(regression.Regression(event=fail), tmp_path / "run", reporter=notes)
    assert not (tmp_path / "run" / "checkpoints").exists() and notes.messages == []


def test_what_is_changed_for_a_resumed_run_is_what_it_runs_with(
    regression: ModuleType, tmp_path: Path
) -> None:
    """The optimiser's moments are the checkpoint's, its settings are those given now."""
    before, after = regression.Regression(), regression.Regression()
    run(before, tmp_path / "run", steps=4)
    changed = replace(
        OPTIONS,
        learning_rate=1e-12,
        adam_beta1=0.5,
        adam_beta2=0.75,
        adam_epsilon=1e-3,
        weight_decay=0.25,
    )
    result = run(after, tmp_path / "run", options=changed, resume=True)
    assert [row["train/learning_rate"] for row in result.rows()] == [1e-2] * 4 + [1e-12] * 4
    for old, new in zip(weights(before), weights(after), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-9)  # too slow to move
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "step_000008").state["optimizer"]
    (group,) = state["param_groups"]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-12, (0.5, 0.75), 1e-3)
    assert group["weight_decay"] == 0.25
    assert {float(moments["step"]) for moments in state["state"].values()} == {8.0}


def test_a_checkpoint_of_something_else_is_refused(
    regression: ModuleType, toy: ModuleType, tmp_path: Path
) -> None:
    run(regression.Regression(), tmp_path / "run", steps=2)
    other = regression.Regression()
    other.policy.denoiser = other.policy.bare = torch.nn.Linear(6, 2, bias=False)
    with pytest.raises(UserError, match="1 parameters are unknown"):
        run(other, tmp_path / "run", resume=True)
    renamed = type("Other", (regression.Regression,), {})()
    with pytest.raises(UserError, match="one of Regression, not of Other"):
        run(renamed, tmp_path / "run", resume=True)


def test_resuming_a_finished_run_changes_nothing(regression: ModuleType, tmp_path: Path) -> None:
    first, again = regression.Regression(), regression.Regression()
    run(first, tmp_path / "run")
    (tmp_path / "run" / "final" / "report.html").write_text("made afterwards")
    result = run(again, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "final" / "report.html").exists()
    assert same(first, again) and result.steps == 8 and len(result.rows()) == 8


# --- the folder --------------------------------------------------------------------------------


def test_an_existing_run_is_an_error_with_both_commands(
    regression: ModuleType, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")  # written by the command line: no run yet
    run(regression.Regression(), folder, steps=2)
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError) as caught:
        run(regression.Regression(), folder)
    text = str(caught.value)
    assert f"train {folder / 'config.yaml'} --resume" in text
    assert f"train {folder / 'config.yaml'} --new" in text and "step 2" in text
    assert (folder / "metrics.jsonl").read_text() == before
    run(regression.Regression(), folder, steps=4, new=True)
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == before
    with pytest.raises(UserError, match="no run to resume"):
        run(regression.Regression(), tmp_path / "other", resume=True)


def test_files_have_their_names_and_rows_their_shape(
    regression: ModuleType, tmp_path: Path
) -> None:
    result = run(regression.Regression(), tmp_path / "run", steps=4)
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "checkpoints",
        "env.json",
        "final",
        "metrics.jsonl",
        "run.json",
        "samples",
    ]
    assert (result.folder / "final" / "w.safetensors").exists()
    environment = json.loads((result.folder / "env.json").read_text())
    assert environment["packages"]["torch"] and environment["device"] == "cpu"
    rows = result.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["iteration"] for row in rows] == [0, 0, 1, 1]
    for row in rows:
        assert list(row)[:3] == ["step", "iteration", "seconds"]
        assert all(isinstance(value, int | float) for value in row.values())
        assert {"reward/mean", "loss", "train/gradient_norm", "time/sampling"} <= {
            *row,
            "time/sampling",
        }
        assert row["error_max"] >= row["loss"]
    assert result.metrics["step"] == 4


def test_a_run_says_what_it_was_trained_on(toy: ModuleType, tmp_path: Path) -> None:
    algorithm = DDPO(
        toy.ToyPolicy(),
        toy.Brightness(),
        ["a", "bü"],
        options=DDPOOptions(prompts_per_iteration=2, samples_per_prompt=4, clip_range=0.1),
        sampling=SamplingOptions(steps=3, guidance_scale=1.0),
    )
    result = run(algorithm, tmp_path / "run", options=replace(OPTIONS, steps=1, accumulation=1))
    assert json.loads((result.folder / "run.json").read_text(encoding="utf-8")) == {
        "algorithm": "ddpo",
        "trained_on": ["brightness"],
        "prompts": ["a", "bü"],
    }


def test_pictures_and_held_out_scores_come_at_step_0_every_n_and_the_end(
    regression: ModuleType, tmp_path: Path
) -> None:
    @dataclass
    class Probe:
        seen: list[int] = field(default_factory=list)

        def samples(self, step: int, folder: Path) -> None:
            (folder / "picture.txt").write_text(str(step))
            self.seen.append(step)

        def heldout(self, step: int) -> dict[str, float]:
            return {"taste": step / 10}

    probe = Probe()
    options = TrainOptions(**{**vars(OPTIONS), "sample_every": 3, "log_every": 4, "steps": 7})
    result = run(regression.Regression(), tmp_path / "run", options=options, probe=probe)
    assert probe.seen == [0, 3, 6, 7]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step_000000",
        "step_000003",
        "step_000006",
        "step_000007",
    ]
    assert [row["step"] for row in result.rows()] == [0, 3, 4, 6, 7]
    assert result.rows()[0]["heldout/taste"] == 0.0


def test_the_callers_random_state_is_left_alone(regression: ModuleType, tmp_path: Path) -> None:
    algorithm = regression.Regression()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(algorithm, tmp_path / "run", steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_folder_the_next_free_one_is_taken(
    regression: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        result = train(regression.Regression(), steps=1, options=OPTIONS, reporter=Quiet())
        assert result.folder == Path(f"runs/regression-00{number}")


def test_settings_of_one_run_do_not_stay_for_the_next(
    regression: ModuleType, tmp_path: Path
) -> None:
    for precision in ("bf16", "no"):
        algorithm = regression.Regression()
        options = TrainOptions(**{**vars(OPTIONS), "mixed_precision": precision, "steps": 1})
        run(algorithm, tmp_path / precision, options=options)
        assert algorithm.policy.denoiser is algorithm.policy.bare
        assert algorithm.policy.denoiser(torch.zeros(1, 6)).dtype == torch.float32
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        options = TrainOptions(**{**vars(OPTIONS), "mixed_precision": "fp16"})
        run(regression.Regression(), tmp_path / "fp16", options=options)


def test_an_unwritable_folder_is_named(regression: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a run folder"):
        run(regression.Regression(), tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        run(regression.Regression(), tmp_path / "file" / "below")


# --- Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "steps"), [("collect", 2), ("losses", 4)])
def test_ctrl_c_saves_and_a_resume_goes_on_exactly(
    regression: ModuleType, tmp_path: Path, place: str, steps: int
) -> None:
    """While sampling nothing is lost but the samples; while updating the iteration is finished."""
    straight = regression.Regression()
    run(straight, tmp_path / "straight")
    count = 0

    def press(where: str) -> None:
        nonlocal count
        count += where == place
        if where == place and count == {"collect": 2, "losses": 5}[place]:
            os.kill(os.getpid(), signal.SIGINT)

    notes = Notebook()
    pressed = regression.Regression(event=press)
    result = run(pressed, tmp_path / "run", reporter=notes)
    assert result.interrupted and result.steps == steps
    assert (tmp_path / "run" / "final").exists()
    assert any("stopped at step" in message for message in notes.messages)
    resumed = regression.Regression()
    run(resumed, tmp_path / "run", resume=True)
    assert same(straight, resumed)


def test_a_second_ctrl_c_quits_at_once(regression: ModuleType, tmp_path: Path) -> None:
    def press(where: str) -> None:
        if where == "between":
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(regression.Regression(event=press), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


# --- guards ------------------------------------------------------------------------------------


def test_a_nan_loss_stops_before_the_parameters_are_touched(
    regression: ModuleType, tmp_path: Path
) -> None:
    algorithm = regression.Regression()
    seen: list[list[torch.Tensor]] = []

    def poison(where: str) -> None:
        if where == "losses" and len(algorithm.scales) == 5:
            seen.append(weights(algorithm))
            with torch.no_grad():
                algorithm.policy.bare.bias.fill_(float("nan"))

    algorithm.event = poison
    with pytest.raises(UserError, match="norm is nan") as caught:
        run(algorithm, tmp_path / "run")
    assert "learning_rate" in str(caught.value) and "loss" in str(caught.value)
    assert torch.equal(weights(algorithm)[0], seen[0][0])
    assert (tmp_path / "run" / "checkpoints" / "step_000002").exists()


def test_equal_rewards_stop_the_run(regression: ModuleType, tmp_path: Path) -> None:
    algorithm = regression.Regression(reward_std=0.0)
    with pytest.raises(UserError, match="3 iterations in a row"):
        run(algorithm, tmp_path / "run")


def test_equal_rewards_of_ddpo_stop_with_advice(toy: ModuleType, tmp_path: Path) -> None:
    algorithm = DDPO(
        toy.ToyPolicy(),
        toy.Constant(),
        ["a"],
        options=DDPOOptions(prompts_per_iteration=1, train_batch_size=4),
        sampling=SamplingOptions(steps=3, guidance_scale=1.0),
    )
    with pytest.raises(UserError, match="nothing to learn from"):
        run(algorithm, tmp_path / "run", options=TrainOptions(steps=5))


def test_no_gradient_is_found_at_the_first_update(regression: ModuleType, tmp_path: Path) -> None:
    class Severed(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 0

    algorithm = regression.Regression()
    algorithm.event = lambda where: None
    algorithm.policy.denoiser = Severed(algorithm.policy.bare)

    def losses(minibatch: torch.Tensor, scale: float) -> Any:
        for _ in range(2):
            error = algorithm.policy.denoiser(minibatch).square().mean()
            yield error * scale, {"loss": error.detach()}

    algorithm.losses = losses
    with pytest.raises(UserError, match="no gradient reached"):
        run(algorithm, tmp_path / "run")


def test_a_frozen_policy_is_refused(regression: ModuleType, tmp_path: Path) -> None:
    algorithm = regression.Regression()
    algorithm.policy.bare.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        run(algorithm, tmp_path / "run")


def test_an_accumulation_that_does_not_divide_is_refused_before_anything_is_made(
    regression: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        run(regression.Regression(), tmp_path / "run", options=replace(OPTIONS, accumulation=3))
    assert str(caught.value) == (
        "accumulation: 16 points / 4 = 4 minibatches do not split into updates of 3\n"
        "    nearest that do: 2, 4"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [0, -3])
def test_the_number_of_steps_is_checked_where_it_is_given(
    regression: ModuleType, tmp_path: Path, steps: int
) -> None:
    with pytest.raises(ValueError, match="steps: must be at least 1"):
        run(regression.Regression(), tmp_path / "run", steps=steps)
    assert not (tmp_path / "run").exists()


# --- learning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["mean", "nats"])
def test_the_toy_learns_what_it_is_rewarded_for(
    toy: ModuleType, tmp_path: Path, unit: Literal["mean", "nats"]
) -> None:
    algorithm = DDPO(
        toy.ToyPolicy(),
        toy.Brightness(),
        ["a", "bb", "ccc"],
        options=DDPOOptions(
            prompts_per_iteration=3,
            samples_per_prompt=16,
            train_batch_size=12,
            timesteps_per_loss=4,
            clip_range=0.05 if unit == "mean" else 0.2,
            clip_unit=unit,
            advantages="group",
        ),
        sampling=SamplingOptions(steps=4, guidance_scale=1.0, batch_size=48),
    )
    options = TrainOptions(steps=60, learning_rate=2e-2, accumulation=2)
    rewards = [row["reward/mean"] for row in run(algorithm, tmp_path / "r", options=options).rows()]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:2]) / 2 + 0.1
