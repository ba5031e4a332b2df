"""Tensors in a pickle of torch.save, found without unpickling it: nothing that it names is imported or called."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Storage:
    """A record of numbers: `dtype` is None where each view has its own (then `numel` counts bytes)."""

    key: str
    dtype: torch.dtype | None
    numel: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: where its elements are in a storage. `offset` and `strides` count elements; all unchecked."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle mentions; it stays a name."""

    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """An object that only code could make, which is not run: `name` says what it would be. What is put in is lost."""

    name: str


@dataclass(eq=False, slots=True)
class Record:
    """An object of a class whose name is known, and the state that the pickle gives it; no code of the class runs."""

    name: str
    state: Any = None


class RefusedPickle(ValueError):
    """Something where tensors should be is no part of a plain dictionary of tensors."""


_STORAGES: dict[str, torch.dtype | None] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.UntypedStorage": None,
    "torch.storage.UntypedStorage": None,
}
_MARK = object()


def _tensor(arguments: tuple[Any, ...]) -> View:
    """_rebuild_tensor and _rebuild_tensor_v2: storage, offset, shape, strides, requires_grad, hooks, metadata."""
    storage, offset, shape, strides = arguments[:4]
    return _view(storage, offset, shape, strides, storage.dtype, arguments[6:])


def _tensor_of_dtype(arguments: tuple[Any, ...]) -> View:
    """_rebuild_tensor_v3: the same with the dtype before the metadata, on a storage of bytes."""
    storage, offset, shape, strides, _, _, dtype = arguments[:7]
    return _view(storage, offset, shape, strides, _dtype(dtype), arguments[7:])


def _view(storage: Storage, offset: Any, shape: Any, strides: Any, dtype: Any, metadata: tuple[Any, ...]) -> View:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without storage or dtype")
    if metadata and metadata[0]:
        flags = [flag for flag in metadata[0] if isinstance(flag, str)]
        raise RefusedPickle(f"a tensor with {', '.join(flags)} set")
    return View(storage, offset, shape, strides, dtype)


def _dtype(value: Any) -> Any:
    name = value.name.removeprefix("torch.") if isinstance(value, Global) else ""
    return getattr(torch, name, None) if name.isidentifier() else None


def _dictionary(arguments: tuple[Any, ...]) -> Any:
    return _updated({}, *arguments)


def _updated(target: Any, pairs: Iterable[tuple[Any, Any]] = ()) -> Any:
    if isinstance(target, Opaque):
        return target
    for key, value in pairs:
        if isinstance(key, (str, int, float, bytes, Record)):
            target[key] = value
        else:  # the hash of a tuple that holds itself many times over takes for ever
            odd = f"a dictionary whose keys are of {type(key)}"
            target[odd] = Opaque(odd)
    return target


def _first(arguments: tuple[Any, ...]) -> Any:
    return arguments[0] if arguments else None


# What may be "called", each by its plain meaning here.
_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _first,
    "torch.device": _first,
    "torch.serialization._get_layout": _first,
    "_codecs.encode": _first,
    "builtins.set": _first,
    "__builtin__.set": _first,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_IGNORED = {"PROTO", "FRAME", "STOP"}


class _Machine:
    """The stack and the memo of a pickle; one method for each group of opcodes."""

    def __init__(self, records: Collection[str]) -> None:
        self.stack: list[Any] = []
        self._records = records
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[int(argument)] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[int(argument)])
        elif opcode == "MARK":
            stack.append(_MARK)
        elif opcode == "POP":
            stack.pop()
        elif opcode == "POP_MARK":
            self._marked()
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif opcode == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif opcode in ("REDUCE", "NEWOBJ", "BUILD"):
            self._call(opcode)
        elif opcode not in _IGNORED:
            self._container(opcode)

    def _marked(self) -> list[Any]:
        """Everything above the last mark, which is taken away with it."""
        stack = self.stack
        position = len(stack) - 1
        while stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise ValueError("a mark is missing")
        items = stack[position + 1 :]
        del stack[position:]
        return items

    def _name(self, argument: Any) -> None:
        if argument is None:
            name, module = self.stack.pop(), self.stack.pop()
        else:
            module, name = argument.split(" ", 1)
        self.stack.append(Global(f"{module}.{name}"))

    def _call(self, opcode: str) -> None:
        argument, target = self.stack.pop(), self.stack.pop()
        if opcode == "BUILD":
            if isinstance(target, Record):
                target.state = argument
            elif not isinstance(target, (dict, View, Opaque)):
                target = Opaque(_named(target))
            self.stack.append(target)  # attributes of a dictionary or a parameter: versions of modules, and the like
            return
        if opcode == "NEWOBJ" and isinstance(target, Global) and target.name in self._records:
            self.stack.append(Record(target.name))
            return
        if not isinstance(target, Global) or target.name not in _CALLS or opcode == "NEWOBJ":
            self.stack.append(Opaque(_named(target)))
            return
        self.stack.append(_CALLS[target.name](tuple(argument)))

    def _container(self, opcode: str) -> None:
        stack = self.stack
        if opcode in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}.get(opcode, list)())
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(opcode[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == "TUPLE":
            stack.append(tuple(self._marked()))
        elif opcode in ("LIST", "FROZENSET"):
            stack.append(self._marked())
        elif opcode == "DICT":
            items = self._marked()
            stack.append(_updated({}, zip(items[::2], items[1::2], strict=True)))
        elif opcode == "APPEND":
            item = stack.pop()
            _extend(stack[-1], [item])
        elif opcode in ("APPENDS", "ADDITEMS"):
            items = self._marked()
            _extend(stack[-1], items)
        elif opcode == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _updated(stack[-1], [(key, value)])
        elif opcode == "SETITEMS":
            items = self._marked()
            _updated(stack[-1], zip(items[::2], items[1::2], strict=True))
        else:
            raise RefusedPickle(f"opcode {opcode}")


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, Opaque):
        target.extend(items)


def _named(target: Any) -> str:
    return target.name if isinstance(target, (Global, Opaque)) else f"an object made of {type(target)}"


def _storage(identity: Any) -> Storage:
    kind, storage_type, key, _, numel = identity
    name = storage_type.name if isinstance(storage_type, Global) else ""
    if kind != "storage" or not isinstance(key, str) or type(numel) is not int:
        raise ValueError("a storage is not described as torch.save does")
    if name not in _STORAGES:
        raise RefusedPickle(name or "a storage without type")
    return Storage(key, _STORAGES[name], numel)


def read_pickle(data: bytes, records: Collection[str] = ()) -> Any:
    """The object that a pickle describes, with View for tensors, Global for names, Record for objects of the classes
    named in `records`, and Opaque for anything that would have to be called beside what plain dictionaries of tensors
    are made of.

    Raises RefusedPickle, with the name, for tensors and storages of a kind that is not known; ValueError for what is no
    pickle.
    """
    machine = _Machine(records)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return machine.stack[-1]
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__} in its pickle") from error
