"""The reader of pickles runs nothing: every attack that works on Python's own reader fails here."""

from __future__ import annotations

import copyreg
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from reward_models.base import RewardError
from reward_models.weights.inert import Global, Standin, Storage, StoredTensor
from reward_models.weights.reading import read_tensors
from reward_models.weights.unpickle import read_pickle
from tests.reward_models.weights.pickle_attacks import EXTENSION, HARM, attacks
from tests.reward_models.weights.pickle_parts import (
    STOP,
    call,
    dict_of,
    glob,
    module,
    number,
    numbers,
    storage,
    tensor,
    text,
    tuple_of,
    write_old,
    write_zip,
)

FOUR = b"\0\0\x80?" * 4  # four float32 ones
NAMES = list(attacks(""))


@pytest.fixture
def bombs(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Importable classes that do harm at every chance an object gives."""
    source = types.ModuleType("bombs")
    exec(
        HARM,
        source.__dict__,
    )
    monkeypatch.setitem(sys.modules, "bombs", source)
    copyreg.add_extension("os", "mkdir", EXTENSION)
    yield source
    copyreg.remove_extension("os", "mkdir", EXTENSION)


def run_for_real(program: bytes) -> None:
    """Python's own reader, with torch's persistent ids."""

    class Reader(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return pid

    Reader(BytesIO(b"\x80\x04" + program + STOP)).load()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", NAMES)
def test_what_runs_elsewhere_does_not_run_here(
    name: str, tmp_path: Path, bombs: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path / "home"))
    canary = tmp_path / "canary"
    program = attacks(str(canary))[name]
    with suppress(Exception):  # what it makes of itself afterwards is its own affair
        run_for_real(program)
    assert canary.is_dir(), "this attack is a dud, so it would prove nothing"
    canary.rmdir()
    carriers = {
        "alone": program,
        "in a dict": dict_of(("state_dict", dict_of(("w", tensor()), ("x", program)))),
        "attribute": module(dict_of(("w", tensor())), ("training", program)),
        "parameter": module(dict_of(("w", program))),
        "hooks": module(dict_of(("w", tensor(hooks=program)))),
        "argument": module(
            dict_of(
                ("w", call(glob("torch._utils", "_rebuild_parameter"), tensor(), program, b"N"))
            )
        ),
        "storage": module(dict_of(("w", tensor(where=program)))),
        "class": program + b")\x81" + dict_of(("_parameters", b"}")) + b"b",
    }
    for place, whole in carriers.items():
        for write in (write_zip, write_old):
            path = write(tmp_path / f"{place}-{write.__name__}.pth", whole, {"0": FOUR})
            for expected in (True, False):
                try:
                    tensors = read_tensors(path, pickled_module=expected)
                except RewardError as error:
                    assert path.name in str(error)
                else:
                    assert list(tensors) == ["w"] and tensors["w"].tolist() == [1.0] * 4
                assert not canary.exists(), (place, write.__name__, expected)
    # A module that is sound apart from the bomb gives its tensors all the same.
    sound = tmp_path / "attribute-write_zip.pth"
    assert read_tensors(sound, pickled_module=True)["w"].tolist() == [1.0] * 4


def test_no_import_call_or_lookup_happens_while_reading(tmp_path: Path) -> None:
    """The interpreter itself is the witness: its audit events while all attacks are read."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for number_, program in enumerate(attacks(str(tmp_path / "canary")).values()):
        (folder / str(number_)).write_bytes(b"\x80\x04" + program + STOP)
    watch = """
import pathlib, sys
from reward_models.weights.unpickle import read_pickle
programs = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).iterdir())]
events, watching, read = set(), True, 0
sys.addaudithook(lambda event, args: watching and events.add(event))
for program in programs:
    try:
        read_pickle(program)
        read += 1
    except ValueError:
        pass
watching = False
print(sorted(events), read, len(programs), "bombs" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", watch, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.split() == ["[]", str(len(NAMES)), str(len(NAMES)), "False"]


def test_foreign_objects_are_noted() -> None:
    program = glob("far.away", "Thing") + tuple_of(number(7)) + b"\x81"
    program += dict_of(("size", number(3))) + b"b(" + text("a") + number(1) + b"u"
    value, _ = read_pickle(b"\x80\x04" + program + STOP)
    assert isinstance(value, Standin)
    assert (value.kind, value.args) == (Global("far.away", "Thing"), (7,))
    assert (value.states, value.items) == ([{"size": 3}], [("a", 1)])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_out_as_pickle_reads_them(protocol: int) -> None:
    shared = ["again"]
    plain: dict[Any, Any] = {
        "text": "größer 🐈",
        "numbers": [0, 1, -1, 255, 65536, 2**31, -(2**70), 10**400, 1.5, float("-inf")],
        "constants": (None, True, False),
        "nested": {
            "tuple": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
            "shared": [shared, shared],
        },
        3: {"a", "b"},
        None: "none",
    }
    value, storages = read_pickle(pickle.dumps(plain, protocol=protocol))
    if protocol < 4:
        assert value.pop(3) == plain.pop(3)  # a set is made by calling the class
    assert value == plain and storages == {}
    assert value["nested"]["shared"][0] is value["nested"]["shared"][1]


def test_a_tensor_is_an_address() -> None:
    value, storages = read_pickle(b"\x80\x02" + tensor(offset=1, size=(3,)) + STOP)
    kept = Storage("0", "float32", 4)
    assert value == StoredTensor(kept, "float32", 1, (3,), (1,)) and storages == {"0": kept}


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"0",
        b"R",
        b"b",
        b"a",
        b"s",
        b"t",
        b"u",
        b"2",
        b"\x86",
        b"h\x05",
        b"g7\n",
        b"\x93",
        b"Pname\n",
        b"NQ",
        text("a") + b"Q",
        tuple_of(text("storage"), text("torch")) + b"Q",
        storage(kind="OtherStorage"),
        storage(count=-1),
        storage(count=4) + storage(count=5),
        tuple_of(text("storage"), glob("far", "FloatStorage"), text("0"), text("cpu"), number(4))
        + b"Q",
        tensor(size=(-1,)),
        tensor(size=(2, 2)),
        tensor(stride=(-1,)),
        tensor(size=(1,) * 65, stride=(1,) * 65),
        tensor(where=b"N"),
        call(glob("torch._utils", "_rebuild_tensor_v2")),
        call(
            glob("torch._utils", "_rebuild_tensor_v2"), storage(), b"\x88", numbers(1), numbers(1)
        ),
        call(glob("torch._utils", "_rebuild_parameter"), b"N"),
        glob("os", "mkdir") + number(1) + b"R",
        number(1) + number(2) + b"\x93",
        b"\x97",
        b"\x98",
        b"\x80\x06",
        b"](" + number(1) + b"u",
        number(1) + b"(" + number(1) + b"e",
        b"X\xff\xff\xff\xffabc",
        b"\x8e" + b"\xff" * 8,
        b"\x8b\xff\xff\xff\x7f",
        b"\xff",
    ],
)
def test_what_is_not_sound_is_a_value_error(program: bytes) -> None:
    with pytest.raises(ValueError):
        value, _ = read_pickle(b"\x80\x04" + program + STOP)
        assert not isinstance(value, Storage | StoredTensor)


def test_a_pickle_without_an_end_is_a_value_error() -> None:
    whole = pickle.dumps({"a": [1, 2, (3, "four")]}, protocol=4)
    for length in range(len(whole)):
        with pytest.raises(ValueError):
            read_pickle(whole[:length])


def test_deep_nesting_does_not_overflow() -> None:
    deep = b"N" + b"\x85" * 100_000
    value, _ = read_pickle(b"\x80\x04}" + deep + b"K\x01s\x8f(" + deep + b"\x90" + STOP)
    assert isinstance(value, set)
    nested = b"\x80\x04" + glob("torch._tensor", "_rebuild_from_type_v2") + b"\x94"
    unpacked = b"N"
    for _ in range(1500):
        unpacked = b"(h\x00" + glob("torch", "Tensor") + unpacked + b"}t"
    with pytest.raises(ValueError):
        read_pickle(nested + unpacked + b"R" + STOP)
