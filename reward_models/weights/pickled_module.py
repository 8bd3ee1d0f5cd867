"""A whole pickled `nn.Module` to its state dict, without its classes and without running any.

MPS's official file is such a module, of classes that exist only in its authors' repository and
under transformers 4.27. `unpickle` reads it as inert data; here that tree is walked by the three
dicts in which every `nn.Module` keeps its tensors and children, and the tensors that it names are
read from the file. Both containers of `torch.save` are known: the zip archive (since torch 1.6) and
the older file of five pickles and raw storages. Sizes, strides and offsets are claims of the
pickle: each is checked against the bytes that are really there before a tensor is made.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_models.weights.inert import Standin, Storage, StoredTensor
from reward_models.weights.unpickle import read_pickle

# At the start of the older container, in front of the version of its layout.
_MAGIC = 0x1950A86A20F9469CFC6C
_LAYOUT = 1001

# Far above any model; a tree that is larger repeats itself to fill the memory.
_MAX_DEPTH = 64
_MAX_MODULES = 100_000

# What zipfile, struct and torch raise over bytes that make no sense.
_DAMAGE = (zipfile.BadZipFile, EOFError, LookupError, OverflowError, RuntimeError, struct.error)

_Fetch = Callable[[Storage], bytearray]


def read_module(path: Path) -> dict[str, Tensor]:
    """The state dict of a file that `torch.save(module, path)` wrote, on the CPU.

    Names and order are those of `nn.Module.state_dict`: parameters, then buffers (those that were
    registered as not persistent left out), then children. Tied tensors share memory.

    Raises:
        ValueError: it is no such file, it is damaged, or it claims what it does not hold.
        OSError: it cannot be read.
    """
    container = _zip_container if zipfile.is_zipfile(path) else _old_container
    try:
        with container(path) as (tree, little_endian, fetch):
            if not (isinstance(tree, Standin) and "_modules" in _attributes(tree)):
                raise ValueError("it holds no pickled model")
            bytes_of: dict[str, Tensor] = {}
            tensors = {}
            for name, stored in _named_tensors(tree):
                key = stored.storage.key
                if key not in bytes_of:
                    raw = _raw(fetch(stored.storage))
                    width = _dtype(stored.storage.dtype).itemsize
                    bytes_of[key] = raw if little_endian else _swap(raw, stored.dtype)
                    if len(raw) != stored.storage.count * width:
                        raise ValueError(f"it holds another number of bytes than {name} claims")
                tensors[name] = _view(bytes_of[key], stored, name)
            return tensors
    except _DAMAGE as error:
        raise ValueError(f"it is damaged ({error})") from error


@contextmanager
def _zip_container(path: Path) -> Iterator[tuple[Any, bool, _Fetch]]:
    """An archive X/data.pkl, X/data/KEY, perhaps X/byteorder; nothing in it is compressed."""
    budget = path.stat().st_size
    with zipfile.ZipFile(path) as archive:

        def read(name: str) -> bytearray:
            nonlocal budget
            try:
                entry = archive.getinfo(name)
            except KeyError:
                raise ValueError(f"it lacks {name}") from None
            # Together the entries cannot be longer than the file, unless they overlap.
            budget -= entry.file_size
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or budget < 0:
                raise ValueError(f"its entry {name} is not stored as torch does")
            with archive.open(entry) as stream:
                content = bytearray(stream.read(entry.file_size))
            if len(content) != entry.file_size:
                raise ValueError(f"its entry {name} is cut off")
            return content

        roots = [n[: -len("data.pkl")] for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("it is a zip archive, but not one that torch.save wrote")
        root = roots[0]
        order = "little"
        if f"{root}byteorder" in archive.NameToInfo:
            order = read(f"{root}byteorder").decode("ascii", "replace")
        if order not in ("little", "big"):
            raise ValueError(f"its byte order is {order!r}")
        tree, _ = read_pickle(bytes(read(f"{root}data.pkl")))
        yield tree, order == "little", lambda storage: read(f"{root}data/{storage.key}")


@contextmanager
def _old_container(path: Path) -> Iterator[tuple[Any, bool, _Fetch]]:
    """Pickles of a magic number, a version, the system, the object, the keys; then each storage."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        # A map never reads further than the file reaches, whatever length a pickle claims.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            magic, version, system = (read_pickle(content)[0] for _ in range(3))
            if magic != _MAGIC or version != _LAYOUT or not isinstance(system, dict):
                raise ValueError("torch.save did not write it")
            little_endian = bool(system.get("little_endian", True))
            tree, storages = read_pickle(content)
            keys, _ = read_pickle(content)
            places = _places(content, keys, storages, "<q" if little_endian else ">q")
            yield tree, little_endian, lambda storage: bytearray(content[places[storage.key]])


def _places(
    content: mmap.mmap, keys: Any, storages: dict[str, Storage], number: str
) -> dict[str, slice]:
    """Where each storage lies: behind a count of its elements, one after the other."""
    if not isinstance(keys, list) or set(map(str, keys)) != set(storages):
        raise ValueError("its list of storages is not that of its tensors")
    places, start = {}, content.tell()
    for key in map(str, keys):
        (count,) = struct.unpack_from(number, content, start)
        start += 8
        end = start + storages[key].count * _dtype(storages[key].dtype).itemsize
        if count != storages[key].count or end > len(content):
            raise ValueError(f"its storage {key} is cut off or not as long as it claims")
        places[key] = slice(start, end)
        start = end
    return places


def _named_tensors(module: Standin) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a state dict by name, in its order."""
    waiting: list[tuple[str, Any, int]] = [("", module, 0)]
    visited = 0
    while waiting:
        prefix, owner, depth = waiting.pop()
        own = _attributes(owner)
        visited += 1
        if depth > _MAX_DEPTH or visited > _MAX_MODULES:
            raise ValueError("its modules contain each other")
        passing = own.get("_non_persistent_buffers_set")
        left_out = passing if isinstance(passing, set) else set()
        for table in ("_parameters", "_buffers"):
            for name, value in _entries(own, table):
                if value is None or (table == "_buffers" and name in left_out):
                    continue
                if not isinstance(value, StoredTensor):
                    raise ValueError(f"{prefix}{name} is no plain tensor")
                yield f"{prefix}{name}", value
        children = [entry for entry in _entries(own, "_modules") if entry[1] is not None]
        waiting += [(f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children)]


def _entries(attributes: dict[Any, Any], table: str) -> list[tuple[str, Any]]:
    entries = attributes.get(table)
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"one of its modules has no proper {table}")
    return list(entries.items())


def _attributes(owner: Any) -> dict[Any, Any]:
    """What was set on an object last: its dict, or the first of (dict, slots)."""
    if isinstance(owner, Standin) and owner.states:
        state = owner.states[-1]
        state = state[0] if isinstance(state, tuple) and len(state) == 2 else state
        if isinstance(state, dict):
            return state
    return {}


def _view(raw: Tensor, stored: StoredTensor, name: str) -> Tensor:
    """The tensor that is described, if it lies inside its storage."""
    dtype = _dtype(stored.dtype)
    if len(raw) % dtype.itemsize:
        raise ValueError(f"{name} does not fit its storage")
    flat = raw.view(dtype)
    elements, last = 1, stored.offset
    for size, stride in zip(stored.size, stored.stride):
        elements *= size
        last += (size - 1) * stride
    if not elements:
        if stored.offset > len(flat):
            raise ValueError(f"{name} reaches outside its storage")
        return flat[:0].reshape(stored.size)
    # More elements than are stored would be repeats, with which a small file fills any memory.
    if last >= len(flat) or elements > len(flat):
        raise ValueError(f"{name} reaches outside its storage")
    return flat.as_strided(stored.size, stored.stride, stored.offset)


def _raw(content: bytearray) -> Tensor:
    if not content:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8)


def _swap(raw: Tensor, dtype: str) -> Tensor:
    """Bytes of the other order; a complex number is two floats."""
    width = _dtype(dtype).itemsize // (2 if _dtype(dtype).is_complex else 1)
    if len(raw) % width:
        raise ValueError("one of its storages is cut off")
    return raw.view(-1, width).flip(1).flatten()


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
