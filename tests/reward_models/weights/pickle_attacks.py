"""Pickles that do harm in Python's own reader: each makes a folder, by which it is caught."""

from __future__ import annotations

from tests.reward_models.weights.pickle_parts import call, dict_of, glob, text, tuple_of

EXTENSION = 201


def attacks(canary: str) -> dict[str, bytes]:
    """Programs that make the folder `canary` when Python's own reader runs them."""
    mkdir, arg = glob("os", "mkdir"), text(canary)
    code = text(f"__import__('os').mkdir({canary!r})")
    made = glob("bombs", "Plain") + b")\x81"
    return {
        "reduce": call(mkdir, arg),
        "system": call(glob("os", "system"), text(f"mkdir '{canary}'")),
        "exec": call(glob("builtins", "exec"), code),
        "eval": call(glob("builtins", "eval"), code),
        "python 2 names": b"\x80\x02" + call(glob("__builtin__", "eval"), code),
        "getattr": call(
            call(
                glob("builtins", "getattr"),
                call(glob("builtins", "__import__"), text("os")),
                text("mkdir"),
            ),
            arg,
        ),
        "attribute chain": text("os") + text("path.os.mkdir") + b"\x93" + tuple_of(arg) + b"R",
        "chain through torch": text("torch")
        + text("serialization.os.mkdir")
        + b"\x93"
        + tuple_of(arg)
        + b"R",
        "globals of an allowed function": call(
            call(
                glob("operator", "getitem"),
                call(
                    glob("operator", "getitem"),
                    text("torch") + text("_utils._rebuild_tensor_v2.__globals__") + b"\x93",
                    text("__builtins__"),
                ),
                text("eval"),
            ),
            code,
        ),
        "inst": b"(" + arg + b"ios\nmkdir\n",
        "obj": b"(" + mkdir + arg + b"o",
        "newobj": glob("bombs", "New") + tuple_of(arg) + b"\x81",
        "newobj_ex": glob("bombs", "New") + tuple_of() + dict_of(("path", arg)) + b"\x92",
        "extension": bytes([0x82, EXTENSION]) + tuple_of(arg) + b"R",
        "extension 4": b"\x84" + EXTENSION.to_bytes(4, "little") + tuple_of(arg) + b"R",
        "setstate": glob("bombs", "SetState") + b")\x81" + arg + b"b",
        "attribute of an instance": glob("bombs", "Watched")
        + b")\x81"
        + tuple_of(b"N", dict_of(("path", arg)))
        + b"b",
        "attribute of a class": glob("bombs", "Victim")
        + tuple_of(b"N", dict_of(("path", arg)))
        + b"b",
        "item of a dict": glob("bombs", "Dict") + b")\x81" + arg + b"K\x01s",
        "items of a dict": glob("bombs", "Dict") + b")\x81(" + arg + b"K\x01u",
        "item of a list": glob("bombs", "List") + b")\x81" + arg + b"a",
        "items of a list": glob("bombs", "List") + b")\x81(" + arg + b"e",
        "member of a set": b"\x8f(" + _with_state("Key", arg) + b"\x90",
        "key of a dict": b"}" + _with_state("Key", arg) + b"K\x01s",
        "end of life": _with_state("Dying", arg) + b"0N",
        "reconstructor": call(glob("copyreg", "__newobj__"), glob("bombs", "New"), arg),
        "ordered dict of a bomb": call(
            glob("collections", "OrderedDict"), _with_state("Pairs", arg)
        ),
        "set of a bomb": call(glob("builtins", "set"), _with_state("Pairs", arg)),
        "map": call(
            glob("builtins", "list"), call(glob("builtins", "map"), mkdir, b"](" + arg + b"e")
        ),
        "rebuild from a type": call(
            glob("torch._tensor", "_rebuild_from_type_v2"),
            mkdir,
            glob("bombs", "Plain"),
            tuple_of(arg),
            b"}",
        ),
        "under a plain object": made + dict_of(("x", call(mkdir, arg))) + b"b",
    }


def _with_state(kind: str, arg: bytes) -> bytes:
    return glob("bombs", kind) + b")\x81" + dict_of(("path", arg)) + b"b"


# Classes that do harm at every chance an object gives.
HARM = """
import os
class Plain: pass
class New:
    def __new__(cls, path): os.mkdir(path); return object.__new__(cls)
class SetState:
    def __setstate__(self, path): os.mkdir(path)
class Watched:
    def __setattr__(self, name, value): os.mkdir(value)
class Meta(type):
    def __setattr__(cls, name, value): os.mkdir(value)
class Victim(metaclass=Meta): pass
class Dict(dict):
    def __setitem__(self, key, value): os.mkdir(key)
class List(list):
    def append(self, item): os.mkdir(item)
    def extend(self, items): [os.mkdir(item) for item in items]
class Key:
    def __hash__(self): os.mkdir(self.path); return 0
class Dying:
    def __del__(self): os.mkdir(self.path)
class Pairs:
    def __iter__(self): os.mkdir(self.path); return iter(())
"""
