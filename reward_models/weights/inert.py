"""What a pickle is read into: plain values, addresses of tensors, and stand-ins for all else.

`call` is the only place where a class or function that a pickle names has an effect. The effect of
the pairs in `_MAKERS` is that of the code below; nothing that a pickle names is looked up or
called. How torch describes its tensors is read off `torch._utils` and `torch.serialization`
(versions 1.6 to 2.15).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# torch's storage classes, and the dtype of their elements.
STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}
# Dtypes without a storage class of their own: torch names them beside an untyped storage.
_NAMED_DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")

_MAX_AXES = 64


@dataclass(frozen=True)
class Global:
    """What a pickle calls by module and name: two strings."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Standin:
    """What a pickle made of a class or function that we do not know; it does nothing.

    Args:
        kind: what was called.
        args: with which arguments.
        states: what `BUILD` gave it, in order; for most objects one dict of attributes.
        items: what was put into it.
    """

    kind: Any
    args: tuple[Any, ...] = ()
    states: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Storage:
    """An address: `count` elements of `dtype` under `key` in the file. Nothing is checked yet."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage as `dtype`; offset, size and stride in elements, not checked yet."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def call(callee: Any, args: Any) -> Any:
    """What becomes of callee(*args): a plain value for a pair that is known, else a stand-in.

    Raises:
        ValueError: arguments that torch never writes.
    """
    if not isinstance(args, tuple):
        raise ValueError("it calls something with arguments that are no tuple")
    make = _MAKERS.get(callee) if isinstance(callee, Global) else None
    return make(args) if make else Standin(callee, args)


def fill(target: Any, pairs: list[tuple[Any, Any]]) -> Any:
    """Put keys and values into a dict, or note them on a stand-in; gives the target back."""
    if isinstance(target, Standin):
        target.items.extend(pairs)
    elif isinstance(target, dict):
        target.update({hashable(key): value for key, value in pairs})
    else:
        raise ValueError(f"it sets an item of a {type(target).__name__}")
    return target


def put(target: Any, items: list[Any]) -> None:
    """Put items into a list or set, or note them on a stand-in."""
    if isinstance(target, Standin):
        target.items.extend(items)
    elif isinstance(target, list):
        target.extend(items)
    elif isinstance(target, set):
        target.update(hashable(item) for item in items)
    else:
        raise ValueError(f"it appends to a {type(target).__name__}")


def hashable(key: Any) -> Any:
    """Keys that a state dict needs; hashing a deep tuple would overflow the interpreter's stack."""
    plain = key is None or isinstance(key, str | int | float | bytes | Global | Standin)
    return key if plain else Standin(Global("", "key"))


def _members(args: tuple[Any, ...]) -> set[Any]:
    made: set[Any] = set()
    for items in args:
        put(made, list(items) if isinstance(items, list | tuple) else [])
    return made


def _ordered(args: tuple[Any, ...]) -> Any:
    """A dict that later instructions fill; Python 2 gave pairs at once."""
    pairs = args[0] if args else []
    if not isinstance(pairs, list) or any(not _is_pair(pair) for pair in pairs):
        return Standin(Global("collections", "OrderedDict"), args)
    return fill({}, [(key, value) for key, value in pairs])


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2


def _tensor(args: tuple[Any, ...], dtype: str = "") -> StoredTensor:
    """(storage, offset, size, stride, requires_grad, hooks, and perhaps conjugate or sign bits)."""
    storage, offset, size, stride = args[:4] if len(args) > 3 else (None,) * 4
    if not isinstance(storage, Storage) or not (_counts((offset,)) and _counts(size)):
        raise ValueError("it holds a tensor that is not described as torch does")
    if not _counts(stride) or len(size) != len(stride) or any(args[6:]):
        raise ValueError("it holds a tensor of an unusual kind (its strides or its flags)")
    return StoredTensor(storage, dtype or storage.dtype, offset, size, stride)


def _tensor_of_dtype(args: tuple[Any, ...]) -> StoredTensor:
    """The same, with a dtype behind the hooks."""
    dtype = args[6] if len(args) > 6 else None
    if not (isinstance(dtype, Global) and dtype.module == "torch" and dtype.name in _NAMED_DTYPES):
        raise ValueError(f"it holds a tensor of the unknown dtype {dtype}")
    return _tensor((*args[:6], *args[7:]), dtype.name)


def _parameter(args: tuple[Any, ...]) -> Any:
    """(tensor, requires_grad, hooks, and perhaps attributes): the tensor."""
    if not args or not isinstance(args[0], StoredTensor):
        raise ValueError("it holds a parameter that is no plain tensor")
    return args[0]


def _tensor_with_attributes(args: tuple[Any, ...]) -> Any:
    """(how to make the tensor, its type, the arguments for that, attributes): the tensor."""
    if len(args) != 4 or args[1] not in (Global("torch", "Tensor"), _PARAMETER):
        return Standin(Global("torch._tensor", "_rebuild_from_type_v2"), args)
    return call(args[0], args[2])


def _counts(numbers: Any) -> bool:
    """Whether these are the numbers that sizes are made of."""
    sound = isinstance(numbers, tuple) and len(numbers) <= _MAX_AXES
    return sound and all(type(number) is int and number >= 0 for number in numbers)


_PARAMETER = Global("torch.nn.parameter", "Parameter")
# The allow-list. What these pairs name is not called either: each has its own code above.
_MAKERS: dict[Global, Callable[[tuple[Any, ...]], Any]] = {
    Global("collections", "OrderedDict"): _ordered,
    Global("builtins", "set"): _members,
    Global("__builtin__", "set"): _members,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Global("torch._tensor", "_rebuild_from_type_v2"): _tensor_with_attributes,
}
