"""Pickles put together by hand, instruction by instruction, and the files that torch makes of them.

What a malicious file does is written here with the raw instructions, because Python's own pickler
would never write most of it.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

STOP = b"."


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + raw


def numbers(*values: int) -> bytes:
    return tuple_of(*(number(value) for value in values))


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def dict_of(*pairs: tuple[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in pairs) + b"u"


def call(function: bytes, *args: bytes) -> bytes:
    return function + tuple_of(*args) + b"R"


def storage(key: str = "0", kind: str = "FloatStorage", count: int = 4) -> bytes:
    parts = (text("storage"), glob("torch", kind), text(key), text("cpu"), number(count))
    return tuple_of(*parts) + b"Q"


def tensor(
    *,
    where: bytes | None = None,
    offset: int = 0,
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    hooks: bytes = b"N",
) -> bytes:
    return call(
        glob("torch._utils", "_rebuild_tensor_v2"),
        where if where is not None else storage(),
        number(offset),
        numbers(*size),
        numbers(*stride),
        b"\x89",
        hooks,
    )


def module(parameters: bytes, *attributes: tuple[str, bytes]) -> bytes:
    """An object of a class that does not exist, with the three dicts of every `nn.Module`."""
    state = dict_of(
        ("_parameters", parameters), ("_buffers", b"}"), ("_modules", b"}"), *attributes
    )
    return glob("far.away", "Model") + b")\x81" + state + b"b"


def write_zip(path: Path, program: bytes, storages: Mapping[str, bytes]) -> Path:
    """The archive of `torch.save`; `program` without protocol header and STOP."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", b"\x80\x04" + program + STOP)
        archive.writestr("model/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"model/data/{key}", content)
        archive.writestr("model/version", "3\n")
    return path


def write_old(path: Path, program: bytes, storages: Mapping[str, bytes], width: int = 4) -> Path:
    """The older container, of the same program and of storages of one element size."""
    with path.open("wb") as out:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, out, protocol=2)
        out.write(b"\x80\x04" + program + STOP)
        pickle.dump(list(storages), out, protocol=2)
        for content in storages.values():
            out.write(struct.pack("<q", len(content) // width) + content)
    return path


# A module of every kind of tensor, in classes that nobody else has.
SOURCE = """
import torch
from torch import nn

class Part(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 3)
        self.register_buffer("kept", torch.arange(width))
        self.register_buffer("passing", torch.ones(width), persistent=False)
        self.register_buffer("none", None)
        self.register_parameter("no_bias", None)
        self.act = torch.nn.functional.gelu
        self.options = {"dtype": torch.float16, "size": torch.Size([1]), "on": torch.device("cpu")}

class Stack(nn.ModuleList):
    '''Another class of torch's, with a constructor that must not run.'''
    def __init__(self, parts, secret):
        super().__init__(parts)
        self.secret = secret

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = Stack([Part(4), Part(5)], secret=object)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.parts[0].linear.weight
        self.again = self.parts[1]
        self.sixteen = nn.Parameter(torch.randn(7).half())
        self.brain = nn.Parameter(torch.randn(2, 3).bfloat16(), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.slice = nn.Parameter(torch.randn(10, 4)[3:6, 1:3])
        self.number = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.noted = nn.Parameter(torch.randn(2))
        self.noted.remark = "kept on the tensor"
        self.register_buffer("whole", torch.arange(-3, 3))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("wave", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("eighth", torch.randn(4).to(torch.float8_e4m3fn))
        self.register_buffer("spread", torch.arange(5).expand((1, -1)))
        self.remark = torch.ones(2)
        self.norm = nn.BatchNorm1d(3)
        self.register_forward_hook(print)

    def forward(self, x):
        return x
"""
