"""Weight files: nothing in them runs, damage is named, and what is missing can be fetched."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reward_models import weights
from reward_models.base import RewardError
from reward_models.weights import WeightFile, load_strict, locate, on_disk, read_tensors, verify

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, empty caches: every test says what it adds."""
    home = tmp_path / "home"
    monkeypatch.setenv("REWARD_MODELS_HOME", str(home))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    return home


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.marker))}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("way", ["zip", "legacy", "plain pickle", "nested", "protocol 0"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path, way: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "head.pth"
    bomb = Bomb(marker)
    if way == "zip":
        torch.save(bomb, path)
    elif way == "legacy":
        torch.save({**STATE, "x": bomb}, path, _use_new_zipfile_serialization=False)
    elif way == "nested":
        torch.save({"state_dict": {**STATE, "b": bomb}}, path)
    else:
        path.write_bytes(pickle.dumps(bomb, protocol=0 if way == "protocol 0" else 4))
    with pytest.raises(RewardError, match=r"head.pth.*nothing in it was executed"):
        read_tensors(path)
    assert not marker.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(RewardError, match="holds more than tensors"):
        read_tensors(tmp_path / "whole.pth")


def test_a_torchscript_program_opens_only_when_it_is_the_published_one(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(nn.Linear(3, 2)), str(path))
    with pytest.raises(RewardError, match="is a TorchScript archive"):
        read_tensors(path)
    with pytest.raises(RewardError, match="not a known published one"):
        read_tensors(path, archive_sha256="0" * 64)
    assert set(read_tensors(path, archive_sha256=sha256(path))) == {"weight", "bias"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model": s},
        lambda s: {"model_state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
        lambda s: {**s, "text.position_ids": torch.arange(4)},
    ],
)
@pytest.mark.parametrize("legacy", [True, False])
def test_wrapped_and_prefixed_keys_come_out_plain(tmp_path: Path, wrap: Any, legacy: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save(wrap(STATE), path, _use_new_zipfile_serialization=not legacy)
    tensors = read_tensors(path)
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[key], STATE[key]) for key in STATE)


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a.weight"], STATE["a.weight"])


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_cut_off_weight_file_is_named(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"cut.{ending}"
    if ending == "pth":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(RewardError, match=f"cut.{ending}"):
        read_tensors(path)


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"a": torch.ones(1), "n": 3}, torch.ones(2), {"a": "text"}]
)
def test_what_holds_no_weights_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(RewardError, match=r"odd.pth: holds"):
        read_tensors(tmp_path / "odd.pth")


def test_leftover_and_misshapen_keys_are_listed(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    path = tmp_path / "a.pth"
    good = {"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2)}
    load_strict(module, good, path)
    with pytest.raises(RewardError, match=r"missing 0.bias; unexpected extra"):
        load_strict(module, {"0.weight": good["0.weight"], "extra": torch.ones(1)}, path)
    with pytest.raises(RewardError, match=r"size mismatch for 0.weight"):
        load_strict(module, {**good, "0.weight": torch.zeros(4, 3)}, path)


def test_a_file_that_cannot_be_had_comes_with_its_command() -> None:
    hub = WeightFile("head.pth", repo="org/name", files=("other.pth",), revision="abc")
    with pytest.raises(RewardError, match=r"hf download org/name other.pth --revision abc"):
        locate(hub)
    url = WeightFile("a+b.pth", url="https://example.org/a%2Bb.pth")
    with pytest.raises(RewardError, match=r"curl -L --create-dirs -o \S+a\+b.pth https://"):
        locate(url)
    assert on_disk(hub) is None and on_disk(url) is None


def test_the_users_own_path_comes_first(tmp_path: Path) -> None:
    mine = tmp_path / "mine.pth"
    torch.save(STATE, mine)
    published = WeightFile("head.pth", sha256="0" * 64, repo="org/name")
    assert locate(published, mine) == mine
    with pytest.raises(RewardError, match="no such weight file"):
        locate(published, tmp_path / "none.pth")


def test_a_file_of_the_published_name_must_be_the_published_file(tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    torch.save(STATE, path)
    published = WeightFile("head.pth", sha256=sha256(path))
    assert locate(published, path) == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RewardError, match=r"head.pth: sha256 is \w+..., the published file has"):
        locate(published, path)


def test_the_home_folder_is_searched_and_verified(bare_machine: Path) -> None:
    bare_machine.mkdir()
    path = bare_machine / "head.pth"
    torch.save(STATE, path)
    assert locate(WeightFile("head.pth", sha256=sha256(path))) == path
    with pytest.raises(RewardError, match=r"head.pth: sha256"):
        locate(WeightFile("head.pth", sha256="0" * 64))


def test_the_hub_cache_is_searched_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "snapshot" / "second.bin"
    cached.parent.mkdir()
    cached.write_bytes(b"x")
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, name, revision: str(cached) if name == "second.bin" else None,
    )
    file = WeightFile("a", repo="org/name", files=("first.safetensors", "second.bin"))
    assert locate(file) == cached


def test_the_hub_is_asked_online_and_then_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare_machine: Path
) -> None:
    asked: list[str] = []

    def download(repo: str, name: str, revision: str) -> str:
        asked.append(f"{repo}/{name}@{revision}")
        raise ConnectionError("unplugged")

    served = tmp_path / "served.pth"
    torch.save(STATE, served)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    file = WeightFile("head.pth", sha256(served), repo="org/name", url=served.as_uri())
    with pytest.raises(RewardError, match="offline mode is on"):
        locate(file)  # neither is tried
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert locate(file) == bare_machine / "head.pth"
    assert asked == ["org/name/head.pth@main"]
    with pytest.raises(RewardError, match=r"fetched \(org/name: unplugged\)"):
        locate(WeightFile("third.pth", repo="org/name", files=("one", "two")))
    assert asked[1:] == ["org/name/one@main"]  # without a connection there is no second try
    damaged = WeightFile("other.pth", "0" * 64, url=served.as_uri())
    with pytest.raises(RewardError, match=r"other.pth .*could not be fetched"):
        locate(damaged)
    assert not (bare_machine / "other.pth").exists()


def test_an_embedded_file_is_held_against_its_recorded_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "ASSETS", tmp_path)
    file = WeightFile("tiny.safetensors", asset=True)
    with pytest.raises(RewardError, match="reinstall"):
        locate(file)
    save_file(STATE, tmp_path / "tiny.safetensors")
    with pytest.raises(RewardError, match=r"no sha256 of tiny.safetensors"):
        locate(file)
    sums = {"tiny.safetensors": sha256(tmp_path / "tiny.safetensors")}
    (tmp_path / "SHA256SUMS").write_text(json.dumps(sums))
    assert locate(file) == tmp_path / "tiny.safetensors"
    (tmp_path / "SHA256SUMS").write_text(json.dumps({"tiny.safetensors": "0" * 64}))
    with pytest.raises(RewardError, match=r"tiny.safetensors: sha256"):
        locate(file)


def test_nothing_published_nothing_verified(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    verify(tmp_path / "a", "")
