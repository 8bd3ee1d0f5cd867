"""Where metrics and pictures go: our side of it, against stand-ins for other people's packages.

The stand-ins record calls and refuse any that the packages' documentation does not know. The
packages themselves are asked in `test_tracker_packages.py`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_align.errors import UserError
from diffusion_align.reporting.trackers import open_trackers

CANARY = "hf_CANARYabcdefghij0123456789"


class FakeWandbRun:
    """https://docs.wandb.ai/ref/python/sdk/classes/run"""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.id = asked["id"] or "abc"
        self.asked, self.logged, self.axes = asked, [], {}  # type: ignore[var-annotated]
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool = True) -> None:
        self.logged.append((step, data))

    def finish(self, exit_code: int | None = None) -> None:
        self.finished = True


class FakeWandb:
    """https://docs.wandb.ai/ref/python/sdk/functions/init"""

    Error = type("Error", (Exception,), {})

    def __init__(self) -> None:
        self.runs: list[FakeWandbRun] = []
        self.fault: Exception | None = None

    def init(
        self,
        *,
        project: str,
        name: str,
        dir: str,
        id: str | None,
        resume: str,
        config: dict[str, Any],
        settings: dict[str, Any],
    ) -> FakeWandbRun:
        if self.fault is not None:
            raise self.fault
        self.runs.append(FakeWandbRun({**locals()}))
        return self.runs[-1]

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def Image(self, path: str, caption: str | None = None) -> tuple[str, str | None]:
        assert Path(path).is_file()
        return Path(path).name, caption


class FakeTrackio:
    """https://huggingface.co/docs/trackio/api"""

    def __init__(self) -> None:
        self.utils: Any = None
        self.asked: list[dict[str, Any]] = []
        self.logged: list[tuple[int | None, dict[str, Any]]] = []

    def init(
        self,
        project: str,
        name: str,
        resume: str,
        config: dict[str, Any],
        embed: bool,
        auto_log_gpu: bool,
        auto_log_cpu: bool,
    ) -> Any:
        self.asked.append({**locals()})
        print("* Trackio project initialized")
        return SimpleNamespace(log=self.log)

    def finish(self) -> None:
        print("* Run finished")

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((step, metrics))

    def Image(self, value: str, caption: str | None = None) -> tuple[str, str | None]:
        return Path(value).name, caption


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> FakeTrackio:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)  # type: ignore[arg-type]
    return fake


def look(folder: Path, prompts: dict[str, str]) -> Path:
    """What a probe leaves: pictures, and whose prompt each of them is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*prompts, "grid.png"]:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name)
    rows = [json.dumps({"path": name, "prompt": prompt}) for name, prompt in prompts.items()]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_jsonl_is_always_there_appends_and_writes_no_nan(tmp_path: Path) -> None:
    for step in (1, 2):
        trackers = open_trackers((), tmp_path)
        trackers.log({"step": step, "reward/mean": float("nan") if step == 1 else 0.5})
        # Flushed at once: a crash after this loses nothing.
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
        trackers.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "reward/mean": None}, {"step": 2, "reward/mean": 0.5}]
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("tensorboard", "torch.utils.tensorboard"),
        ("wandb", "wandb"),
        ("trackio", "trackio"),
    ],
)
def test_a_missing_extra_says_how_to_install_it(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        open_trackers((name,), tmp_path)
    assert f"pip install 'diffusion-align[{name}]'" in str(caught.value)


def test_an_unknown_tracker_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandbb") as caught:
        open_trackers(("wandbb",), tmp_path)
    assert "did you mean wandb" in str(caught.value)


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path: Path, wandb: FakeWandb) -> None:
    said: list[str] = []
    for step in (0, 3):
        trackers = open_trackers(("wandb",), tmp_path, step=step, say=said.append)
        assert trackers.run_ids == {"wandb": "abc"}
        trackers.log({"step": step + 1, "a": 1.0, "bad": math.inf})
        trackers.close()
    first, second = wandb.runs
    assert (first.asked["id"], second.asked["id"]) == (None, "abc")
    assert first.asked["resume"] == second.asked["resume"] == "allow"
    assert said == ["wandb: going on with run abc"]
    assert first.logged == [(None, {"step": 1, "a": 1.0})]
    assert first.finished and second.finished


def test_wandb_draws_over_our_step_and_never_hears_of_one_going_back(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    # W&B drops data whose own step is lower than its last: we leave that one to W&B.
    trackers = open_trackers(("wandb",), tmp_path)
    for step in (5, 3):
        trackers.log({"step": step, "a": float(step)})
    (run,) = wandb.runs
    assert run.axes == {"step": None, "*": "step"}
    assert [step for step, _ in run.logged] == [None, None]
    assert [row["step"] for _, row in run.logged] == [5, 3]


def test_wandb_is_told_to_keep_nothing_of_the_process(tmp_path: Path, wandb: FakeWandb) -> None:
    open_trackers(("wandb",), tmp_path)
    settings = wandb.runs[0].asked["settings"]
    assert settings["console"] == "off" and settings["disable_git"] and settings["disable_code"]
    assert settings["x_disable_meta"] and not settings["x_save_requirements"]


def test_a_wandb_that_cannot_begin_says_what_to_do(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.fault = wandb.Error("api_key not configured (no-tty)")
    with pytest.raises(UserError, match="no-tty") as caught:
        open_trackers(("wandb",), tmp_path)
    assert "WANDB_MODE=offline" in str(caught.value)


def test_a_setting_that_wandb_refuses_says_what_to_do(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.fault = ValueError("1 validation error for Settings: mode")
    with pytest.raises(UserError, match="validation error for Settings") as caught:
        open_trackers(("wandb",), tmp_path)
    assert "WANDB_" in str(caught.value)


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_a_folder_that_trackio_cannot_write_is_refused_at_once(
    tmp_path: Path, trackio: FakeTrackio, kind: str
) -> None:
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("x")
    else:
        place = Path("/proc/nothing-can-be-made-here")
    trackio.utils = SimpleNamespace(TRACKIO_DIR=place)
    with pytest.raises(UserError, match="trackio cannot write there") as caught:
        open_trackers(("trackio",), tmp_path / "run")
    assert str(place) in str(caught.value) and "TRACKIO_DIR" in str(caught.value)
    assert trackio.asked == []


def test_where_the_second_tracker_cannot_begin_the_first_is_closed(
    tmp_path: Path, wandb: FakeWandb, trackio: FakeTrackio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("no dashboard today")

    monkeypatch.setattr(trackio, "init", broken)
    with pytest.raises(UserError, match="trackio did not begin: RuntimeError: no dashboard"):
        open_trackers(("wandb", "trackio"), tmp_path)
    assert wandb.runs[0].finished


def test_damaged_captions_cost_pictures_and_not_the_run(tmp_path: Path, wandb: FakeWandb) -> None:
    said: list[str] = []
    trackers = open_trackers(("wandb",), tmp_path, say=said.append)
    for step, damaged in ((2, "{bad"), (4, '["no", "object"]'), (6, '{"path": "x"}')):
        folder = look(tmp_path / "samples" / f"step_{step}", {"p0000_s00.png": "a circle"})
        (folder / "prompts.jsonl").write_text(damaged)
        trackers.pictures(step, folder)
    assert len(said) == 3 and "no pictures of step 2" in said[0]
    trackers.log({"step": 7, "a": 1.0})
    assert [row["step"] for _, row in wandb.runs[0].logged] == [7]


def test_a_checkpoint_fills_in_what_the_folder_forgot(tmp_path: Path, wandb: FakeWandb) -> None:
    open_trackers(("wandb",), tmp_path, run_ids={"wandb": "kept"}).close()
    assert wandb.runs[0].asked["id"] == "kept"
    open_trackers(("wandb",), tmp_path, run_ids={"wandb": "older"}).close()
    assert wandb.runs[1].asked["id"] == "kept"
    (tmp_path / "trackers.json").write_text('{"wand')  # a crash cut it short
    open_trackers(("wandb",), tmp_path, run_ids={"wandb": "older"}).close()
    assert wandb.runs[2].asked["id"] == "older"


def test_trackio_finds_its_run_again_by_a_name_of_its_own(
    tmp_path: Path, trackio: FakeTrackio, capsys: pytest.CaptureFixture[str]
) -> None:
    names = []
    for folder in ("a/demo", "a/demo", "b/demo"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        trackers = open_trackers(("trackio",), tmp_path / folder)
        names.append(trackers.run_ids["trackio"])
        trackers.log({"step": 7, "a": 1.0, "bad": math.nan})
        trackers.close()
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("demo-") for name in names)
    assert [asked["name"] for asked in trackio.asked] == names
    assert {asked["resume"] for asked in trackio.asked} == {"allow"}
    assert trackio.logged[0] == (7, {"a": 1.0})
    assert capsys.readouterr().out == ""  # stdout is for results


def test_a_secret_that_comes_into_the_environment_later_is_kept_out_of_the_next_row(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers = open_trackers(("wandb",), tmp_path)
    trackers.log({"step": 1, "a": 1.0})
    monkeypatch.setenv("HF_TOKEN", CANARY)
    trackers.log({"step": 2, f"reward_part/{CANARY}": 2.0})
    trackers.close()
    assert CANARY not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert wandb.runs[0].logged[-1] == (None, {"step": 2, "reward_part/***HF_TOKEN***": 2.0})


def test_pictures_go_to_each_tracker_with_their_captions(
    tmp_path: Path, wandb: FakeWandb, trackio: FakeTrackio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    folder = look(tmp_path / "samples" / "step_000004", {"p0000_s00.png": f"a circle {CANARY}"})
    trackers = open_trackers(("wandb", "trackio"), tmp_path)
    trackers.pictures(4, folder)
    seen = {
        "samples/grid": ("grid.png", None),
        "samples/p0000_s00": ("p0000_s00.png", "a circle ***HF_TOKEN***"),
    }
    assert wandb.runs[0].logged == [(None, {"step": 4, **seen})]
    assert trackio.logged == [(4, seen)]


def test_trackers_are_told_the_config_without_its_secrets(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    (tmp_path / "config.yaml").write_text(f"reward: x\ntrain:\n  note: {CANARY}\n  rate: 1.0e-4\n")
    (tmp_path / "env.json").write_text('{"python": "3.11", "api_key": "0123abcd9876"}')
    open_trackers(("wandb",), tmp_path)
    assert wandb.runs[0].asked["config"] == {
        "reward": "x",
        "train": {"note": "***HF_TOKEN***", "rate": 1e-4},
        "environment": {"python": "3.11", "api_key": "***api_key***"},
    }


def test_a_run_made_in_python_is_described_by_its_options(tmp_path: Path, wandb: FakeWandb) -> None:
    (tmp_path / "run.json").write_text('{"algorithm": "ddpo", "prompts": ["a", "b"]}')
    open_trackers(("wandb",), tmp_path, options={"steps": 3})
    assert wandb.runs[0].asked["config"] == {
        "train": {"steps": 3},
        "algorithm": "ddpo",
        "prompts": 2,
        "environment": {},
    }


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, wandb: FakeWandb, trackio: FakeTrackio
) -> None:
    said: list[str] = []
    trackers = open_trackers(("wandb", "trackio"), tmp_path, say=said.append)

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is gone")

    wandb.runs[0].log = broken  # type: ignore[method-assign]
    for step in (1, 2):
        trackers.log({"step": step, "a": 0.5})
    trackers.close()
    assert len(said) == 1 and "wandb" in said[0] and "the server is gone" in said[0]
    assert [step for step, _ in trackio.logged] == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_metrics_that_cannot_be_written_do_stop_the_run(tmp_path: Path) -> None:
    trackers = open_trackers((), tmp_path)
    trackers.close()
    with pytest.raises(ValueError, match="closed"):
        trackers.log({"step": 1})
