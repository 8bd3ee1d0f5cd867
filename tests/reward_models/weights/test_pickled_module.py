"""Whole pickled modules: every tensor of the state dict, bit by bit, and no claim is believed."""

from __future__ import annotations

import pickle
import random
import struct
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reward_models.base import RewardError
from reward_models.weights.pickled_module import read_module
from reward_models.weights.reading import read_tensors
from tests.reward_models.weights.pickle_parts import (
    SOURCE,
    call,
    dict_of,
    glob,
    module,
    numbers,
    storage,
    tensor,
    write_old,
    write_zip,
)

ONES = struct.pack("<4f", 1, 2, 3, 4)
# torch means files of the protocol 4, which nothing but these tests writes.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

BOTH = pytest.mark.parametrize("write", [write_zip, write_old])


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path / "home"))


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A module of classes that can be imported only until this fixture has saved it."""
    source = types.ModuleType("far_away")
    exec(SOURCE, source.__dict__)
    monkeypatch.setitem(sys.modules, "far_away", source)
    torch.manual_seed(0)
    made: nn.Module = source.Whole()
    yield made


def same(left: Tensor, right: Tensor) -> bool:
    as_bytes = [t.detach().contiguous().flatten().view(torch.uint8) for t in (left, right)]
    fits = left.dtype == right.dtype and left.shape == right.shape
    return fits and torch.equal(*as_bytes)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_every_tensor_comes_out_bit_by_bit_without_its_class(
    whole: nn.Module, tmp_path: Path, zipped: bool, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "whole.pth"
    torch.save(whole, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    expected = whole.state_dict()
    assert {"again.kept", "spread", "eighth", "noted"} <= set(expected)
    assert not any("passing" in key for key in expected)
    monkeypatch.delitem(sys.modules, "far_away")
    tensors = read_module(path)
    assert "far_away" not in sys.modules
    assert list(tensors) == list(expected)
    assert all(same(tensors[key], expected[key]) for key in expected)
    tied = tensors["tied.weight"], tensors["parts.0.linear.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    with pytest.raises(RewardError, match=r"nothing in it was executed") as refused:
        read_tensors(path)
    assert "weights_only" not in str(refused.value)
    assert protocol > 2 or "it holds far_away.Whole" in str(refused.value)


def test_the_state_dict_loads_strictly_into_the_class(whole: nn.Module, tmp_path: Path) -> None:
    torch.save(whole, tmp_path / "whole.pth")
    other = type(whole)()
    other.load_state_dict(read_module(tmp_path / "whole.pth"))
    assert torch.equal(other.get_parameter("turned"), whole.get_parameter("turned"))


def test_big_endian_files_are_turned(tmp_path: Path) -> None:
    swapped = struct.pack(">4f", 1, 2, 3, 4)
    path = write_zip(tmp_path / "a.pth", module(dict_of(("w", tensor()))), {"0": swapped})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["model/byteorder"] = b"big"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert read_module(path)["w"].tolist() == [1, 2, 3, 4]


@BOTH
@pytest.mark.parametrize(
    "claim",
    [
        {"size": (5,)},
        {"offset": 1},
        {"offset": 2**62, "size": (1,)},
        {"size": (2,), "stride": (4,)},
        {"size": (2, 2), "stride": (2**62, 1)},
        {"size": (2**40,), "stride": (0,)},
        {"size": (2**62, 4), "stride": (0, 0)},
        {"size": (0,), "stride": (1,), "offset": 5},
        {"size": (1,), "where": storage(count=5)},
        {"size": (1,), "where": storage(count=3)},
        {"size": (1,), "where": storage(count=2**60)},
        {"size": (1,), "where": storage(kind="DoubleStorage")},
        {"size": (1,), "where": storage(key="7")},
        {"size": (1,), "where": storage(key="../../etc/passwd")},
    ],
)
def test_what_lies_outside_the_storage_is_refused(
    claim: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.pth", module(dict_of(("w", tensor(**claim)))), {"0": ONES})
    with pytest.raises(ValueError):
        read_module(path)
    with pytest.raises(RewardError, match=r"a.pth"):
        read_tensors(path, pickled_module=True)


@BOTH
def test_what_lies_inside_is_read(write: Any, tmp_path: Path) -> None:
    parts = dict_of(
        ("last", tensor(offset=3, size=(1,))),
        ("turned", tensor(size=(2, 2), stride=(1, 2))),
        ("number", tensor(offset=1, size=(), stride=())),
        ("none", tensor(offset=4, size=(0, 2), stride=(2, 1))),
    )
    found = read_module(write(tmp_path / "a.pth", module(parts), {"0": ONES}))
    assert found["last"].tolist() == [4] and found["turned"].tolist() == [[1, 3], [2, 4]]
    assert found["number"].item() == 2 and found["none"].shape == (0, 2)


def test_children_that_hold_themselves_are_refused(tmp_path: Path) -> None:
    """The machine can tie a knot: the object is noted first, then put into its own children."""
    knot = glob("far.away", "Model") + b")\x81\x94"
    state = dict_of(
        ("_parameters", b"}"), ("_buffers", b"}"), ("_modules", dict_of(("a", b"h\x00")))
    )
    with pytest.raises(ValueError, match="contain each other"):
        read_module(write_zip(tmp_path / "a.pth", knot + state + b"b", {}))


def test_children_that_multiply_are_refused(tmp_path: Path) -> None:
    """Each level holds the one below twice: 2^40 names in a kilobyte."""
    program = module(b"}") + b"\x94"
    for level in range(40):
        below = bytes([0x68, level])
        children = dict_of(("a", below), ("b", below))
        state = dict_of(("_parameters", b"}"), ("_buffers", b"}"), ("_modules", children))
        program += b"0" + glob("far.away", "Model") + b")\x81" + state + b"b\x94"
    with pytest.raises(ValueError, match="contain each other"):
        read_module(write_zip(tmp_path / "a.pth", program, {}))


@pytest.mark.parametrize(
    "parameters",
    [
        dict_of(("w", call(glob("torch._utils", "_rebuild_qtensor"), storage()))),
        dict_of(("w", numbers(1, 2))),
        b"]",
        b"}(K\x01" + tensor() + b"u",
    ],
)
def test_parameters_that_are_no_tensors_are_refused(parameters: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        read_module(write_zip(tmp_path / "a.pth", module(parameters), {"0": ONES}))


@pytest.mark.parametrize("how", ["compressed", "overlapping", "two models", "no model", "lying"])
def test_archives_that_torch_does_not_write_are_refused(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    parts = dict_of(("a", tensor()), ("b", tensor(where=storage(key="1"))))
    write_zip(path, module(parts), {"0": ONES, "1": ONES})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
    if how == "two models":
        entries["other/data.pkl"] = entries["model/data.pkl"]
    if how == "no model":
        del entries["model/data.pkl"]
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        if how == "overlapping":
            first, second = (archive.NameToInfo[f"model/data/{key}"] for key in "01")
            second.header_offset = first.header_offset
    if how == "lying":
        raw = path.read_bytes()
        found = raw.rindex(b"model/data/1") - 46  # in the list at the end
        huge = raw[: found + 20] + struct.pack("<II", 2**31, 2**31) + raw[found + 28 :]
        path.write_bytes(huge)
    with pytest.raises(ValueError):
        read_module(path)


def test_no_damage_leads_to_another_error(tmp_path: Path) -> None:
    """Hundreds of files with a few bytes changed, in both containers."""
    rng = random.Random(0)
    small = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    outcomes = set()
    for zipped in (True, False):
        torch.save(small, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        raw = (tmp_path / "a.pth").read_bytes()
        program = raw.index(b"ctorch.nn")
        for _ in range(150):
            changed = bytearray(raw)
            for _ in range(rng.randint(1, 4)):
                place = (
                    program + rng.randrange(1200) if rng.random() < 0.8 else rng.randrange(len(raw))
                )
                changed[place % len(raw)] = rng.randrange(256)
            if rng.random() < 0.1:
                del changed[rng.randrange(len(changed)) :]
            (tmp_path / "b.pth").write_bytes(changed)
            try:
                read_module(tmp_path / "b.pth")
                outcomes.add("read")
            except ValueError:
                outcomes.add("refused")
            with suppress(RewardError):
                read_tensors(tmp_path / "b.pth", pickled_module=True)
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"plain text, long enough for it"])
def test_what_is_no_file_of_torch_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError):
        read_module(tmp_path / "a.pth")


def test_a_plain_pickle_of_a_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps(nn.Linear(2, 2)))
    with pytest.raises(ValueError):
        read_module(tmp_path / "a.pth")


def test_a_model_of_transformers_needs_no_transformers(tmp_path: Path) -> None:
    """What MPS's file holds: a CLIPModel inside a class of its authors, fp16 throughout."""
    transformers = pytest.importorskip("transformers")
    block = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={**block, "vocab_size": 50},
        vision_config={**block, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    clip = transformers.CLIPModel(config).half()
    wrapper = nn.Module()
    wrapper.model = clip
    torch.save(wrapper, tmp_path / "MPS.pth")
    tensors = read_module(tmp_path / "MPS.pth")
    expected = wrapper.state_dict()
    assert list(tensors) == list(expected)
    assert all(same(tensors[key], expected[key]) for key in expected)
