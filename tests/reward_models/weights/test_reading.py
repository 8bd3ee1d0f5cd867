"""Reading weight files: nothing in them runs, damage is named, and keys come out plain."""

from __future__ import annotations

import hashlib
import os
import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reward_models.base import RewardError
from reward_models.weights.reading import load_strict, read_tensors

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path / "home"))


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


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_keys_that_only_begin_like_a_wrapper_stay(tmp_path: Path, wrapper: str) -> None:
    """VideoX-Fun's MPS is a flat file of `model.*` and `cross_model.*`."""
    flat = {"model.text_model.w": torch.ones(1), "cross_model.layers.0.w": torch.zeros(1)}
    torch.save(flat, tmp_path / "MPS.pth")
    assert read_tensors(tmp_path / "MPS.pth").keys() == flat.keys()
    torch.save({wrapper: flat, "epoch": 3}, tmp_path / "wrapped.pth")
    assert read_tensors(tmp_path / "wrapped.pth").keys() == flat.keys()


def test_the_mirrors_prefix_and_position_ids_go(tmp_path: Path) -> None:
    """RE-N-Y/mpsv1 puts `mps.` in front of every key."""
    flat = {"model.w": torch.ones(1), "cross_model.w": torch.zeros(1)}
    ids = {"mps.model.text_model.embeddings.position_ids": torch.arange(3)}
    save_file({f"mps.{k}": v for k, v in flat.items()} | ids, tmp_path / "m.safetensors")
    assert read_tensors(tmp_path / "m.safetensors").keys() == flat.keys()
    torch.save({"position_ids": torch.ones(1), "my_position_ids": torch.ones(1)}, tmp_path / "p.pt")
    assert set(read_tensors(tmp_path / "p.pt")) == {"my_position_ids"}


def test_two_keys_that_become_one_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "module.a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(RewardError, match=r"a.pth: holds a twice"):
        read_tensors(tmp_path / "a.pth")


def test_a_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "a.pth")
    with pytest.raises(RewardError, match=r"a.pth: holds more than tensors: model"):
        read_tensors(tmp_path / "a.pth")


def test_tensors_come_out_contiguous_and_without_a_gradient(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    odd = {
        "turned": base.t(),
        "part": base[1:, 1:3],
        "parameter": nn.Parameter(torch.ones(2)),
        "again": base,
    }
    torch.save(odd, tmp_path / "a.pth")
    for _ in range(2):  # from the pickle, then from its copy
        tensors = read_tensors(tmp_path / "a.pth")
        assert all(torch.equal(tensors[key], odd[key]) for key in odd)
        assert all(t.is_contiguous() and not t.requires_grad for t in tensors.values())
        assert not any(isinstance(t, nn.Parameter) for t in tensors.values())


def test_a_small_file_cannot_claim_much_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pth")
    with pytest.raises(RewardError, match=r"a.pth: claims 4,398,046,511,104 bytes"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "a.pth")
    with pytest.raises(RewardError, match=r"a.pth: holds tensors that are not plain: a"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>Google Drive - Virus scan warning", "a web page"),
        (b"<html>", "a web page"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_what_is_often_found_instead_is_named(
    tmp_path: Path, content: bytes, what: str, ending: str
) -> None:
    (tmp_path / f"a.{ending}").write_bytes(content)
    with pytest.raises(RewardError, match=rf"a.{ending}: is .*{what}"):
        read_tensors(tmp_path / f"a.{ending}")


def test_safetensors_are_known_without_their_ending(tmp_path: Path) -> None:
    """The hub's cache keeps files under their hash."""
    save_file(STATE, tmp_path / "f3ab01")
    assert read_tensors(tmp_path / "f3ab01").keys() == STATE.keys()
    assert not (tmp_path / "home").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for ending in ("pth", "safetensors"):
        with pytest.raises(RewardError, match=rf"none.{ending}"):
            read_tensors(tmp_path / f"none.{ending}")


def test_the_advice_of_torch_to_read_unsafely_is_not_passed_on(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "n": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(RewardError, match=r"it holds pathlib\S*Path") as refused:
        read_tensors(tmp_path / "a.pth")
    assert "weights_only" not in str(refused.value)


def test_a_file_of_another_model_is_recognised_in_the_error(tmp_path: Path) -> None:
    head = {"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}
    with pytest.raises(RewardError) as refused:
        load_strict(nn.Sequential(nn.Linear(768, 1)), head, tmp_path / "a.pth")
    assert str(refused.value).startswith(f"{tmp_path / 'a.pth'}: its keys do not fit this model: ")
    assert "missing 0.weight, 0.bias; unexpected weight, bias; it looks like a LAION" in str(
        refused.value
    )
    with pytest.raises(RewardError, match=r"size mismatch for weight.*it looks like a LAION"):
        load_strict(nn.Linear(5, 1), head, tmp_path / "a.pth")
