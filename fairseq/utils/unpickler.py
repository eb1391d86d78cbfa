"""A pickle as data: an interpreter of pickle's opcodes that calls nothing but what it is given.

Python's own unpickler calls whatever a file names, allocates what a length claims before it has read it, and crashes
where tuples nest too deeply. This one keeps memory in proportion to the file, and makes an inert ``Record`` of every
class and of every function's result that the caller does not supply. The opcodes are those of protocols 0 to 5, as
documented in the standard library's ``pickletools``; extension codes and out-of-band buffers are refused.
"""

from __future__ import annotations

import codecs
import struct
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

MOST_OPCODES = 4_000_000  # a checkpoint of 400 layers with Adam's state has about a million
MOST_CLASSES = 1000
MOST_INT_BYTES = 1024

_MARK = object()
_STOP = ord(".")
_FORMS = {code: struct.Struct(code) for code in ("<B", "<H", "<i", "<I", "<Q", ">d")}


class PickleError(Exception):
    """What is wrong with a pickle."""


class Record:
    """What stands in for an object of a class that is not loaded: its state, no behaviour."""

    args: tuple[Any, ...]
    state: dict[Any, Any]
    items: list[Any]  # appended, or keys and values by turns

    def __init__(self, *args: Any) -> None:
        self.args, self.state, self.items = args, {}, []


class Class:
    """A class or function that a pickle names and that is not loaded. Calling it gives a ``Record``."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Function:
    """A function that a pickle may call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


_SCALARS = (str, bytes, int, float, type(None))


def _check_key(key: Any) -> None:
    """Hashing a deeply nested tuple would overflow the stack, so keys are flat."""
    if isinstance(key, tuple):
        if not all(isinstance(item, _SCALARS) for item in key):
            raise PickleError("a nested key")
    elif not isinstance(key, (*_SCALARS, Record, Class)):
        raise PickleError(f"a key of type {type(key).__name__}")


class Unpickler:
    """Reads the pickle that starts at ``position`` of ``data``; afterwards ``position`` is behind it.

    data: bytes, or a memory map. find: (module, name) -> what a name stands for, for the names that are supported.
    persistent: what an object with a persistent id is.
    """

    def __init__(
        self,
        data: Any,
        position: int,
        find: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any],
    ) -> None:
        self.data, self.position, self.end = data, position, len(data)
        self.find, self.persistent = find, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.classes: dict[tuple[str, str], Class] = {}
        self.copied = 0

    def load(self) -> Any:
        """The pickle's object. Raises PickleError, or what a wrong operand leads to (TypeError, ValueError, ...)."""
        data, end, run = self.data, self.end, [_OPCODES.get(bytes([code])) for code in range(256)]
        for _ in range(MOST_OPCODES):  # three million of 1,000 layers with Adam's state
            position = self.position
            if position >= end:
                raise PickleError("cut short")
            self.position = position + 1
            opcode = run[data[position]]
            if opcode is None:
                if data[position] == _STOP:
                    return self.pop()
                raise PickleError(f"opcode {data[position : position + 1]!r}")
            opcode(self)
        raise PickleError(f"more than {MOST_OPCODES:,} opcodes")

    def read(self, size: int) -> bytes:
        start = self.position
        if size < 0 or start + size > self.end:
            raise PickleError("cut short")
        self.position = start + size
        return bytes(self.data[start : self.position])

    def number(self, code: str) -> Any:
        form, start = _FORMS[code], self.position
        if start + form.size > self.end:
            raise PickleError("cut short")
        self.position = start + form.size
        return form.unpack_from(self.data, start)[0]

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.position)
        if stop < 0:
            raise PickleError("cut short")
        line = self.read(stop - self.position)
        self.position += 1
        return line

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("an operand is missing")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.push(value)
        return value

    def items(self) -> list[Any]:
        """What was pushed since the last mark."""
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise PickleError("no mark")

    def put(self, index: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("an operand is missing")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"nothing remembered as {index}")
        self.push(self.memo[index])

    def text(self, size: int) -> None:
        self.push(self.read(size).decode("utf-8", "surrogatepass"))

    def old_text(self, data: bytes) -> None:
        """A string of Python 2: UTF-8 where it is, else bytes."""
        try:
            self.push(data.decode("utf-8"))
        except UnicodeDecodeError:
            self.push(data)

    def integer(self, size: int) -> None:
        if size > MOST_INT_BYTES:
            raise PickleError(f"an integer of {size:,} bytes")
        self.push(int.from_bytes(self.read(size), "little", signed=True))

    def decimal(self) -> None:
        line = self.line()
        self.push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line.removesuffix(b"L")))

    def copy(self, values: Any) -> None:
        """Account for a copy of ``values``: all of them together are no more than opcodes could have made."""
        self.copied += len(values)
        if self.copied > MOST_OPCODES:
            raise PickleError("copies without end")

    def name(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("a name that is no string")
        if (module, name) in self.find:
            return self.find[module, name]
        if (module, name) not in self.classes:
            if len(self.classes) >= MOST_CLASSES:
                raise PickleError(f"more than {MOST_CLASSES:,} classes")
            self.classes[module, name] = Class(module, name)
        return self.classes[module, name]

    def call(self, function: Any, args: Any) -> None:
        if not isinstance(args, tuple):
            raise PickleError("arguments that are no tuple")
        if isinstance(function, Function):
            for argument in args:
                if isinstance(argument, (list, dict)):
                    self.copy(argument)
            self.push(function.call(*args))
        elif isinstance(function, Class):
            self.push(Record(*args))
        else:
            raise PickleError(f"a call of {type(function).__name__}")

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Namespace):
            if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
                raise PickleError("settings that are no names with values")
            target.__dict__ = state  # not a copy of it, which could be made again and again
        elif isinstance(target, Record):
            target.state = state if isinstance(state, dict) else {}
        elif not isinstance(target, dict):  # a state_dict's own attributes are of no use
            raise PickleError(f"attributes for {type(target).__name__}")

    def extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Record):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise PickleError(f"items for {type(target).__name__}")

    def add(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, set):
            for value in values:
                _check_key(value)
            target.update(values)
        else:
            self.extend(target, values)

    def set_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Record):
            target.items.extend(items)
        elif isinstance(target, dict):
            if len(items) % 2:
                raise PickleError("a key without a value")
            for key, value in zip(items[::2], items[1::2], strict=True):
                _check_key(key)
                target[key] = value
        else:
            raise PickleError(f"items for {type(target).__name__}")

    def dict_of(self, items: list[Any]) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        self.set_items(made, items)
        return made

    def frozen(self, items: list[Any]) -> frozenset[Any]:
        made: set[Any] = set()
        self.add(made, items)
        return frozenset(made)

    def tuple_of(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def inst(self) -> None:
        module, name = self.line().decode(), self.line().decode()
        self.call(self.name(module, name), tuple(self.items()))

    def obj(self) -> None:
        function, *args = self.items()
        self.call(function, tuple(args))

    def newobj_ex(self) -> None:
        self.pop()  # keyword arguments, which nothing that is supported takes
        self.newobj()

    def newobj(self) -> None:
        args, function = self.pop(), self.pop()
        self.call(function, args)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.name(module, name))


def _two(method: Callable[[Unpickler, Any, Any], None]) -> Callable[[Unpickler], None]:
    """An opcode that takes a value and the target below it, which stays."""

    def run(u: Unpickler) -> None:
        value = u.pop()
        method(u, u.top(), value)

    return run


def _three(u: Unpickler) -> None:
    value, key = u.pop(), u.pop()
    u.set_items(u.top(), [key, value])


def _marked(method: Callable[[Unpickler, Any, list[Any]], None]) -> Callable[[Unpickler], None]:
    """An opcode that takes what follows the mark and the target below it, which stays."""

    def run(u: Unpickler) -> None:
        values = u.items()
        method(u, u.top(), values)

    return run


_OPCODES: dict[bytes, Callable[[Unpickler], Any]] = {
    b"\x80": lambda u: u.read(1),  # PROTO
    b"\x95": lambda u: u.read(8),  # FRAME
    b"(": lambda u: u.push(_MARK),
    b"0": lambda u: u.stack.pop(),  # POP
    b"1": lambda u: u.items(),  # POP_MARK
    b"2": lambda u: u.push(u.top()),  # DUP
    b"N": lambda u: u.push(None),
    b"\x88": lambda u: u.push(True),
    b"\x89": lambda u: u.push(False),
    b"I": lambda u: u.decimal(),
    b"L": lambda u: u.decimal(),
    b"J": lambda u: u.push(u.number("<i")),
    b"K": lambda u: u.push(u.number("<B")),
    b"M": lambda u: u.push(u.number("<H")),
    b"\x8a": lambda u: u.integer(u.number("<B")),
    b"\x8b": lambda u: u.integer(u.number("<I")),
    b"F": lambda u: u.push(float(u.line())),
    b"G": lambda u: u.push(u.number(">d")),
    b"S": lambda u: u.old_text(codecs.escape_decode(u.line().strip()[1:-1])[0]),
    b"T": lambda u: u.old_text(u.read(u.number("<i"))),
    b"U": lambda u: u.old_text(u.read(u.number("<B"))),
    b"V": lambda u: u.push(u.line().decode("raw-unicode-escape")),
    b"X": lambda u: u.text(u.number("<I")),
    b"\x8c": lambda u: u.text(u.number("<B")),
    b"\x8d": lambda u: u.text(u.number("<Q")),
    b"B": lambda u: u.push(u.read(u.number("<I"))),
    b"C": lambda u: u.push(u.read(u.number("<B"))),
    b"\x8e": lambda u: u.push(u.read(u.number("<Q"))),
    b"\x96": lambda u: u.push(u.read(u.number("<Q"))),  # BYTEARRAY8
    b"]": lambda u: u.push([]),
    b"l": lambda u: u.push(u.items()),
    b"a": _two(lambda u, target, value: u.extend(target, [value])),
    b"e": _marked(Unpickler.extend),
    b")": lambda u: u.push(()),
    b"t": lambda u: u.push(tuple(u.items())),
    b"\x85": lambda u: u.tuple_of(1),
    b"\x86": lambda u: u.tuple_of(2),
    b"\x87": lambda u: u.tuple_of(3),
    b"}": lambda u: u.push({}),
    b"d": lambda u: u.push(u.dict_of(u.items())),
    b"s": _three,
    b"u": _marked(Unpickler.set_items),
    b"\x8f": lambda u: u.push(set()),
    b"\x90": _marked(Unpickler.add),
    b"\x91": lambda u: u.push(u.frozen(u.items())),
    b"g": lambda u: u.get(int(u.line())),
    b"h": lambda u: u.get(u.number("<B")),
    b"j": lambda u: u.get(u.number("<I")),
    b"p": lambda u: u.put(int(u.line())),
    b"q": lambda u: u.put(u.number("<B")),
    b"r": lambda u: u.put(u.number("<I")),
    b"\x94": lambda u: u.put(len(u.memo)),
    b"c": lambda u: u.push(u.name(u.line().decode(), u.line().decode())),
    b"\x93": Unpickler.stack_global,
    b"R": Unpickler.newobj,
    b"\x81": Unpickler.newobj,
    b"\x92": Unpickler.newobj_ex,
    b"i": Unpickler.inst,
    b"o": Unpickler.obj,
    b"b": _two(Unpickler.build),
    b"P": lambda u: u.push(u.persistent(u.line().decode())),
    b"Q": lambda u: u.push(u.persistent(u.pop())),
}
