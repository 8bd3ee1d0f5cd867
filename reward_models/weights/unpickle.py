"""Reads a pickle as inert data: nothing that it names is imported, called or built.

A pickle is a program for a small stack machine, and the usual machine imports and calls whatever
the program says. This one knows every instruction of the protocols 0 to 5 too, but

- a global (`GLOBAL`, `STACK_GLOBAL`, `INST`, the `EXT` registry) is a pair of strings, `Global`,
  and is never looked up, so a dotted name such as `_utils.f.__globals__` leads nowhere;
- a call (`REDUCE`, `NEWOBJ`, `NEWOBJ_EX`, `OBJ`, `INST`) is one of the few that `inert.call` knows
  how to answer with a plain value, or becomes a `Standin` that notes the arguments;
- `BUILD` and the instructions that fill lists, dicts and sets are noted on a stand-in; no
  attribute of anything is ever set;
- a persistent id is the address of a tensor storage in the file, or the file is refused.

So there is no foreign object that could be abused. Instructions are decoded by the standard
library's `pickletools.genops`; a pickle has no jumps, so each is met once.
"""

from __future__ import annotations

import pickletools
from typing import Any

from reward_models.weights.inert import (
    STORAGE_DTYPES,
    Global,
    Standin,
    Storage,
    call,
    fill,
    hashable,
    put,
)

# Their value is their argument.
# fmt: off
_LITERALS = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
))
# fmt: on
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def read_pickle(stream: Any) -> tuple[Any, dict[str, Storage]]:
    """The value of a pickle, and the storages that it speaks of by key.

    Args:
        stream: bytes, or an object with `read`, `readline` and `tell`, which is left right behind
            the pickle.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, dict, set, `Global`, `Standin`, `Storage`
        and `StoredTensor`. A dict's keys and a set's members are scalars; others were replaced by
        empty stand-ins.

    Raises:
        ValueError: no whole, sound pickle, or one that asks for what torch never writes.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.stack.pop(), machine.storages
            machine.step(opcode.name, argument)
    except (LookupError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"it is no sound pickle ({type(error).__name__}: {error})") from error
    raise ValueError("it is no whole pickle")


class _Machine:
    """Stack, memo and the storages seen so far."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each MARK
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def step(self, name: str, arg: Any) -> None:
        """One instruction. Underflow is an IndexError, an unknown memo entry a KeyError."""
        stack = self.stack
        match name:
            case "PROTO":
                if arg > 5:
                    raise ValueError(f"it is a pickle of the unknown protocol {arg}")
            case "FRAME":
                pass
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self._items()
            case "POP_MARK":
                self._items()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case _ if name in _LITERALS:
                stack.append(arg)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _:
                if not self._container(name):
                    self._object(name, arg)

    def _items(self) -> list[Any]:
        """What lies above the last MARK, taken off together with it."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _container(self, name: str) -> bool:
        """Whether `name` made or filled a container."""
        match name:
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "EMPTY_TUPLE":
                empty: Any = {"LIST": [], "DICT": {}, "SET": set(), "TUPLE": ()}[name[6:]]
                self.stack.append(empty)
            case "LIST" | "TUPLE" | "FROZENSET" | "DICT":
                items = self._items()
                made: Any = items if name == "LIST" else tuple(items)
                if name == "FROZENSET":
                    made = {hashable(item) for item in items}
                self.stack.append(fill({}, _pairs(items)) if name == "DICT" else made)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(self.stack) < count:
                    raise IndexError("stack underflow")
                self.stack[-count:] = [tuple(self.stack[-count:])]
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [self.stack.pop()] if name == "APPEND" else self._items()
                put(self.stack[-1], items)
            case "SETITEM" | "SETITEMS":
                if name == "SETITEM":
                    value, key = self.stack.pop(), self.stack.pop()
                    items = [key, value]
                else:
                    items = self._items()
                fill(self.stack[-1], _pairs(items))
            case _:
                return False
        return True

    def _object(self, name: str, arg: Any) -> None:
        """Whatever would import, call or set something in another machine."""
        stack = self.stack
        match name:
            case "GLOBAL":
                module, _, attribute = arg.partition(" ")
                stack.append(Global(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not (isinstance(module, str) and isinstance(attribute, str)):
                    raise ValueError("it names a global by something else than text")
                stack.append(Global(module, attribute))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Global("copyreg extension", str(arg)))
            case "REDUCE" | "NEWOBJ":
                args, callee = stack.pop(), stack.pop()
                stack.append(call(callee, args))
            case "NEWOBJ_EX":
                options, args, callee = stack.pop(), stack.pop(), stack.pop()
                stack.append(call(callee, args))
                if isinstance(stack[-1], Standin):
                    stack[-1].items.append(options)
            case "INST":
                module, _, attribute = arg.partition(" ")
                made = call(Global(module, attribute), tuple(self._items()))
                self.stack.append(made)
            case "OBJ":
                callee, *rest = self._items()
                self.stack.append(call(callee, tuple(rest)))
            case "BUILD":
                state, target = stack.pop(), stack[-1]
                if isinstance(target, Standin):  # attributes of dicts and tensors are not needed
                    target.states.append(state)
            case "BINPERSID":
                stack.append(self._address(stack.pop()))
            case _:  # PERSID, out-of-band buffers: torch writes neither
                raise ValueError(f"it holds the instruction {name}, which no weight file needs")

    def _address(self, pid: Any) -> Any:
        """A storage, or in the older file format a module's class beside its source."""
        match pid:
            case ("module", Global() as kind, _, _):
                return kind
            case ("storage", Global() as kind, str(key), str(), int(count), *view):
                dtype = STORAGE_DTYPES.get(kind.name)
                if dtype is None or kind.module not in ("torch", "torch.storage"):
                    raise ValueError(f"it holds a storage of the unknown kind {kind}")
                if view not in ([], [None]) or type(count) is not int or count < 0:
                    raise ValueError(f"its storage {key!r} is not described as torch does")
                storage = self.storages.setdefault(key, Storage(key, dtype, count))
                if storage != Storage(key, dtype, count):
                    raise ValueError(f"it describes its storage {key!r} in two ways")
                return storage
        raise ValueError("it holds a persistent id that is no storage")


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("it holds a key without a value")
    return list(zip(items[::2], items[1::2]))
