"""The copies of pickles: made once, the same to the last bit, never half, never needed."""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reward_models.base import RewardError
from reward_models.weights import converted
from reward_models.weights.reading import read_tensors


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(STATE, tmp_path / "head.pth")
    return tmp_path / "head.pth"


_shared = torch.arange(12.0).view(3, 4)
STATE: dict[str, Tensor] = {
    "single": torch.randn(3, 2),
    "half": torch.randn(5).half(),
    "brain": torch.randn(5).bfloat16(),
    "double": torch.randn(2).double(),
    "whole": torch.arange(-4, 4),
    "flags": torch.tensor([True, False]),
    "number": torch.tensor(2.5),
    "nothing": torch.empty(0, 3),
    "shared": _shared,
    "shared.again": _shared,
    "shared.turned": _shared.t(),
    "shared.part": _shared[1:, 2:],
    "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
}


def copies(home: Path) -> list[Path]:
    return sorted((home / "converted").iterdir()) if (home / "converted").is_dir() else []


def garble(source: Path) -> None:
    """Other content under the same size and time: whoever opens the source would notice."""
    status = source.stat()
    source.write_bytes(b"x" * status.st_size)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype
        and left[key].shape == right[key].shape
        and torch.equal(left[key].contiguous().flatten().view(torch.uint8), _bytes(right[key]))
        for key in left
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_the_second_reading_is_the_first_to_the_last_bit_and_opens_no_pickle(
    source: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "reward_models"):
        first = read_tensors(source)
    assert same(first, STATE) and len(copies(home)) == 1
    assert str(source) in caplog.text and str(copies(home)[0]) in caplog.text
    garble(source)
    assert same(read_tensors(source), STATE)


def test_the_copy_is_plain_safetensors(source: Path, home: Path) -> None:
    read_tensors(source)
    (copy,) = copies(home)
    assert copy.name.startswith("head-") and copy.suffix == ".safetensors"
    assert same(load_file(copy), STATE)


def test_who_may_read_the_source_may_read_its_copy(source: Path, home: Path) -> None:
    source.chmod(0o640)
    read_tensors(source)
    (copy,) = copies(home)
    assert copy.stat().st_mode & 0o777 == 0o640


def test_prefixes_and_wrappers_are_gone_from_the_copy(tmp_path: Path, home: Path) -> None:
    torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "a.pth")
    read_tensors(tmp_path / "a.pth")
    assert set(load_file(copies(home)[0])) == {"a"}


@pytest.mark.parametrize("change", ["content", "time", "reader"])
def test_a_changed_source_is_converted_anew(
    source: Path, home: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_tensors(source)
    expected = STATE
    if change == "content":
        expected = {"other": torch.ones(3)}
        torch.save(expected, source)
    elif change == "time":
        expected = deepcopy(STATE)
        expected["whole"] += 1
        size, before = source.stat().st_size, source.stat().st_mtime_ns
        torch.save(expected, source)
        assert source.stat().st_size == size
        os.utime(source, ns=(before, before + 1))
    else:
        monkeypatch.setattr(converted, "READER", "next")
    assert same(read_tensors(source), expected)
    (copy,) = copies(home)  # in the place of the old one
    assert same(load_file(copy), expected)
    garble(source)
    assert same(read_tensors(source), expected)


def test_files_of_one_name_have_their_own_copies(tmp_path: Path, home: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.save({name: torch.ones(1)}, tmp_path / name / "head.pth")
    for name in ("a", "b", "a"):
        assert set(read_tensors(tmp_path / name / "head.pth")) == {name}
    assert len(copies(home)) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "foreign"])
def test_a_damaged_copy_is_made_again(
    source: Path, home: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    read_tensors(source)
    (copy,) = copies(home)
    whole = copy.read_bytes()
    if damage == "foreign":
        save_file({"other": torch.ones(2)}, copy)
    else:
        copy.write_bytes({"cut": whole[:-3], "empty": b"", "garbage": b"x" * 100}[damage])
    assert same(read_tensors(source), STATE)
    assert copies(home) == [copy] and same(load_file(copy), STATE)
    assert ("damaged" in caplog.text) == (damage != "foreign")


def test_a_home_that_cannot_be_written_is_not_fatal(
    source: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("a file where the folder should be")
    for _ in range(2):
        assert same(read_tensors(source), STATE)
    assert "could not be converted" in caplog.text


def test_a_conversion_that_breaks_off_leaves_nothing(
    source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    assert same(read_tensors(source), STATE)
    assert copies(home) == []


def test_a_source_that_changes_while_it_is_read_is_not_kept(
    source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.load

    def meanwhile(path: Path, **options: Any) -> Any:
        content = original(path, **options)
        os.utime(path, ns=(1, 1))
        return content

    monkeypatch.setattr(torch, "load", meanwhile)
    assert same(read_tensors(source), STATE)
    assert copies(home) == []


def test_readers_at_once_do_not_disturb_each_other(source: Path, home: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert all(same(found, STATE) for found in pool.map(read_tensors, [source] * 8))
    assert len(copies(home)) == 1 and same(load_file(copies(home)[0]), STATE)


def test_safetensors_are_not_copied(tmp_path: Path, home: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    read_tensors(tmp_path / "a.safetensors")
    assert copies(home) == []


def test_what_is_refused_is_not_kept(tmp_path: Path, home: Path) -> None:
    torch.save({"a": 3}, tmp_path / "a.pth")
    with pytest.raises(RewardError):
        read_tensors(tmp_path / "a.pth")
    assert copies(home) == []


def test_a_program_is_opened_once_and_refused_without_its_digest(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(nn.Linear(3, 2)), str(path))
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    first = read_tensors(path, archive_sha256=known)
    assert len(copies(home)) == 1
    monkeypatch.setattr(torch.jit, "load", None)
    assert same(read_tensors(path, archive_sha256=known), first)
    with pytest.raises(RewardError, match="is a TorchScript archive"):
        read_tensors(path)


def test_a_pickled_module_is_converted_and_refused_where_none_is_expected(
    tmp_path: Path, home: Path
) -> None:
    path = tmp_path / "whole.pth"
    layer = nn.Linear(3, 2)
    torch.save(layer, path)
    assert same(read_tensors(path, pickled_module=True), dict(layer.state_dict()))
    with pytest.raises(RewardError, match="holds more than tensors"):
        read_tensors(path)
    garble(path)
    assert same(read_tensors(path, pickled_module=True), dict(layer.state_dict()))
