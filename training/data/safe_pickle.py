"""Reads data pickles without executing them.

`pickle.load` runs whatever a file names. This reader is its own small machine: it knows the
opcodes that lists of dicts of NumPy arrays need, calls nothing that the file names, and refuses
the rest in one sentence. Admitted are lists, tuples, dicts with string keys, None, bool, int,
float, str, bytes, NumPy scalars and arrays of numbers, as pickle protocols 2 to 5 write them under
NumPy 1 and 2. Arrays come back read-only.

It streams: `iterate` gives the items of the list one by one and forgets them. A pickle refers back
to objects by number (the memo); a first pass over the opcodes finds the few numbers that are asked
for, so only those objects are kept. Sizes and counts in the file are checked against the file
before anything is allocated.
"""

import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from training.errors import UserError

WINDOW = 1 << 20  # bytes read at a time
# What the opcodes may make: bytes, and more for each byte of the file. Examples of 16 ids take 7.
MAX_MADE, MAX_MADE_PER_BYTE = 64 << 20, 16
MAX_STACK = 100_000  # values; picklers write lists and dicts in batches of 1,000
MAX_NESTED = 1_000_000  # entries of a list or dict inside an item
MAX_TUPLE = 32  # values, none of them a tuple
MAX_SHARED = 1_000_000  # objects referred back to
MAX_SHARED_BYTES = 1 << 30  # and their bytes
MAX_NAME = 256  # characters of a module or class
MAX_INT_BYTES = 16

# How each admitted opcode's argument is read: nothing, a struct, or a struct's count of bytes.
_PLAIN = {
    *b"(.0)t\x85\x86\x87",  # MARK STOP POP EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    *b"]lae}dsu",  # EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
    *b"N\x88\x89\x94\x93Rb",  # NONE NEWTRUE NEWFALSE MEMOIZE STACK_GLOBAL REDUCE BUILD
}
_FIXED = {
    opcode: struct.Struct(layout)
    for layout, opcodes in {
        "<B": b"\x80Kqh",  # PROTO BININT1 BINPUT BINGET
        "<H": b"M",  # BININT2
        "<i": b"J",  # BININT
        "<I": b"rj",  # LONG_BINPUT LONG_BINGET
        "<Q": b"\x95",  # FRAME
        ">d": b"G",  # BINFLOAT
    }.items()
    for opcode in opcodes
}
_COUNTED = {
    opcode: struct.Struct(layout)
    for layout, opcodes in {
        "<B": b"\x8a\x8cCU",  # LONG1 SHORT_BINUNICODE SHORT_BINBYTES SHORT_BINSTRING
        "<I": b"XBT",  # BINUNICODE BINBYTES BINSTRING (of Python 2)
        "<Q": b"\x8d\x8e\x96",  # BINUNICODE8 BINBYTES8 BYTEARRAY8
    }.items()
    for opcode in opcodes
}
_GLOBAL = ord("c")  # two lines
# Those that put something new on the stack.
_MAKING = {*_COUNTED, *b"KMJG)t\x85\x86\x87}d]lR"}

# Refused, with what the message calls it.
_REFUSED = {
    **dict.fromkeys(b"io\x81\x92", "an object of any class"),  # INST OBJ NEWOBJ NEWOBJ_EX
    **dict.fromkeys(b"\x82\x83\x84", "a class by number"),  # EXT1 EXT2 EXT4
    **dict.fromkeys(b"PQ\x97", "an object outside the file"),  # PERSID BINPERSID NEXT_BUFFER
}


class _Name:
    """One of the callables that NumPy's pickles name. Only ever a mark: none of them is called."""

    def __init__(self, name: str):
        self.name = name


_RECONSTRUCT, _SCALAR, _FROMBUFFER, _NDARRAY, _DTYPE, _ENCODE, _BYTES = map(
    _Name,
    ("_reconstruct", "scalar", "_frombuffer", "numpy.ndarray", "numpy.dtype", "encode", "bytes"),
)
_NAMES = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("_codecs", "encode"): _ENCODE,  # how protocol 2 writes bytes
    ("__builtin__", "bytes"): _BYTES,  # and no bytes
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _RECONSTRUCT
    _NAMES[f"{_core}.multiarray", "scalar"] = _SCALAR
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _FROMBUFFER  # protocol 5


class _Unfinished:
    """An array or dtype between REDUCE and BUILD; `value` is None until then."""

    __slots__ = ("code", "kind", "shared", "value")

    def __init__(self, kind: str, code: str = ""):
        self.kind = kind
        self.code = code
        self.shared = False
        self.value: Any = np.dtype(code) if kind == "dtype" else None


class _TopList:
    """The list whose items are given out."""


_TOP = _TopList()


class _Operations:
    """The opcodes of an open file, one (opcode, argument) at a time; `offset` is where the last
    one began. `spend` counts what they make."""

    def __init__(
        self, file: BinaryIO, name: str, on_read: Callable[[bytes], object] | None = None
    ):
        self._file = file
        self._name = name
        self._on_read = on_read
        self._size = file.seek(0, os.SEEK_END)
        self._left = MAX_MADE + MAX_MADE_PER_BYTE * self._size
        self.offset = 0

    def error(self, message: str) -> UserError:
        return UserError(f"{self._name}: {message} (at byte {self.offset:,})")

    def spend(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise self.error(
                f"refused: its {self._size:,} bytes make objects of more than "
                f"{MAX_MADE + MAX_MADE_PER_BYTE * self._size:,}"
            )

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if self._on_read is not None:
            self._on_read(data)
        return data

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self._file.seek(0)
        size = self._size
        data, position, base = b"", 0, 0  # data[0] is the file's byte number `base`
        longest = 2 * MAX_NAME + 16  # of an opcode without counted bytes
        while True:
            if len(data) - position < longest:
                base += position
                data = data[position:] + self._read(WINDOW)
                position = 0
            self.offset = base + position
            if position >= len(data):
                raise self.error("the file is cut short: the list has no end")
            opcode = data[position]
            position += 1
            if opcode in _PLAIN:
                if opcode == 0x2E:  # STOP
                    if base + position != size:
                        raise self.error(
                            f"{size - base - position:,} bytes follow the end of the list"
                        )
                    while self._read(WINDOW):
                        pass  # so that on_read has seen the whole file
                    yield opcode, None
                    return
                yield opcode, None
            elif (layout := _FIXED.get(opcode) or _COUNTED.get(opcode)) is not None:
                if position + layout.size > len(data):
                    raise self.error("the file is cut short: the list has no end")
                (argument,) = layout.unpack_from(data, position)
                position += layout.size
                if opcode in _FIXED:
                    yield opcode, argument
                    continue
                end = position + argument
                if base + end > size:
                    raise self.error(
                        f"the file is cut short or damaged: {argument:,} bytes should follow, "
                        f"{size - base - position:,} do"
                    )
                if end > len(data):
                    base += position
                    data = data[position:]
                    data += self._read(max(WINDOW, argument - len(data)))
                    position, end = 0, argument
                    if end > len(data):
                        raise self.error("the file became shorter while it was read")
                yield opcode, data[position:end]
                position = end
            elif opcode == _GLOBAL:
                lines = data[position : position + 2 * MAX_NAME].split(b"\n", 2)
                if len(lines) != 3:
                    raise self.error("the file is damaged: a name without end")
                position += len(lines[0]) + len(lines[1]) + 2
                yield opcode, (lines[0], lines[1])
            else:
                what = _REFUSED.get(opcode, "an unknown opcode")
                raise self.error(
                    f"refused: a data pickle has no need of {what} ({bytes([opcode])!r})"
                )


def _numbers_read(operations: _Operations) -> set[int]:
    """First pass: the memo numbers that are asked for anywhere in the file."""
    numbers: set[int] = set()
    for opcode, argument in operations:
        if opcode in b"hj":
            numbers.add(argument)
            if len(numbers) > MAX_SHARED:
                raise operations.error(f"more than {MAX_SHARED:,} objects are referred back to")
    return numbers


def iterate(path, *, on_read: Callable[[bytes], object] | None = None) -> Iterator[Any]:
    """The items of the list in the pickle at `path`, one at a time, in constant memory.

    on_read: gets all bytes of the file in order, once (for a checksum).
    Raises: UserError naming the file, what is wrong and at which byte; OSError if it cannot be
    read.
    """
    with open(path, "rb") as file:
        yield from iterate_file(file, str(path), on_read=on_read)


def load(path) -> list:
    """The whole list in the pickle at `path`: `iterate`, kept in memory."""
    return list(iterate(path))


def iterate_file(
    file: BinaryIO, name: str, *, on_read: Callable[[bytes], object] | None = None
) -> Iterator[Any]:
    """`iterate` for a file opened in binary mode; `name` stands in messages."""
    wanted = _numbers_read(_begin(file, name))
    yield from _run(_Operations(file, name, on_read), wanted, streaming=True)


def load_value(file: BinaryIO, name: str) -> Any:
    """The one value in a pickle, of any admitted kind (CIFAR-10's python batches are dicts)."""
    wanted = _numbers_read(_begin(file, name))
    (value,) = _run(_Operations(file, name), wanted, streaming=False)
    return value


def _begin(file: BinaryIO, name: str) -> _Operations:
    file.seek(0)
    start = file.read(4)
    if not start:
        raise UserError(f"{name} is empty")
    if start[0] != 0x80:
        kinds = {b"PK": "a zip or torch file", b"\x1f\x8b": "a gzip file", b"\x93N": "a .npy file"}
        kind = kinds.get(start[:2], "no pickle of protocol 2 to 5")
        raise UserError(f"{name} is {kind} (its first bytes are {start!r}), not a data pickle")
    return _Operations(file, name)


def _run(operations: _Operations, wanted: set[int], *, streaming: bool) -> Iterator[Any]:
    """Second pass: the stack machine. streaming: gives the items of the list, else the value."""
    error = operations.error
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    memo_writes = 0
    shared_bytes = made = 0
    top_seen = not streaming

    def pop_to_mark() -> list:
        if not marks:
            raise error("the file is damaged: a mark is missing")
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    def pop(count: int = 1) -> list:
        floor = marks[-1] if marks else 0
        if len(stack) - floor < count:
            raise error("the file is damaged: a value is missing")
        values = stack[-count:]
        del stack[-count:]
        return values

    for opcode, argument in operations:
        if len(stack) + len(marks) > MAX_STACK:
            raise error(f"refused: more than {MAX_STACK:,} values are open at once")

        if opcode in b"hj":  # BINGET LONG_BINGET
            if argument not in memo:
                raise error(
                    f"the file is damaged: it refers to object {argument:,}, which is not there"
                )
            stack.append(memo[argument])
        elif opcode == 0x94 or opcode in b"qr":  # MEMOIZE BINPUT LONG_BINPUT
            if (opcode == 0x94) != (argument is None) or not stack:
                raise error("the file is damaged: nothing to remember")
            number = memo_writes if opcode == 0x94 else argument
            memo_writes += 1
            if number in wanted:
                value = memo[number] = stack[-1]
                if isinstance(value, _Unfinished):
                    value.shared = True
                elif isinstance(value, bytes | str):
                    shared_bytes += len(value)
        elif opcode == 0x28:  # MARK
            marks.append(len(stack))
        elif opcode in b"KMJG":
            stack.append(argument)
        elif opcode == 0x8A:  # LONG1
            if len(argument) > MAX_INT_BYTES:
                raise error(f"refused: an integer of {len(argument)} bytes")
            stack.append(int.from_bytes(argument, "little", signed=True))
        elif opcode in b"CBUT\x8e\x96":
            stack.append(argument)
        elif opcode in b"\x8cX\x8d":
            try:
                stack.append(argument.decode("utf-8", "surrogatepass"))
            except UnicodeDecodeError:
                raise error("the file is damaged: a string is not UTF-8") from None
        elif opcode in b"N\x88\x89":
            stack.append({0x4E: None, 0x88: True, 0x89: False}[opcode])
        elif opcode == 0x29:  # EMPTY_TUPLE
            stack.append(())
        elif opcode in b"t\x85\x86\x87":  # TUPLE TUPLE1 TUPLE2 TUPLE3
            values = pop_to_mark() if opcode == 0x74 else pop(opcode - 0x84)
            stack.append(_tuple(values, operations))
        elif opcode == 0x7D:  # EMPTY_DICT
            stack.append({})
        elif opcode in b"dsu":  # DICT SETITEM SETITEMS
            pairs = pop(2) if opcode == 0x73 else pop_to_mark()
            if opcode == 0x64:
                stack.append({})
            (target,) = pop()
            _set_items(target, pairs, operations)
            stack.append(target)
        elif opcode in b"]lae":  # EMPTY_LIST LIST APPEND APPENDS
            values = [] if opcode == 0x5D else pop() if opcode == 0x61 else pop_to_mark()
            values = [_finished(value, operations) for value in values]
            if opcode in b"]l":
                stack.append([] if stack or top_seen else _TOP)
                top_seen = True
            (target,) = pop()
            stack.append(target)
            if target is _TOP:
                if len(stack) != 1:
                    raise error("refused: the list is used inside itself")
                yield from values
            elif type(target) is list:
                if any(value is target for value in values):
                    raise error("refused: a list inside itself")
                operations.spend(-sys.getsizeof(target))
                target.extend(values)
                operations.spend(sys.getsizeof(target))
                if len(target) > MAX_NESTED:
                    raise error(
                        f"refused: a list of more than {MAX_NESTED:,} entries inside an item"
                    )
            else:
                raise error("the file is damaged: something other than a list is appended to")
        elif opcode in b"c\x93":  # GLOBAL STACK_GLOBAL
            module, name = argument if argument is not None else pop(2)
            stack.append(_look_up(module, name, operations))
        elif opcode == 0x52:  # REDUCE
            function, arguments = pop(2)
            stack.append(_reduce(function, arguments, operations))
        elif opcode == 0x62:  # BUILD
            target, state = pop(2)
            _build(target, state, operations)
            if target.shared and target.kind == "array":
                shared_bytes += target.value.nbytes
            stack.append(target)
        elif opcode == 0x30:  # POP
            pop()
        elif opcode == 0x80:  # PROTO
            if not 2 <= argument <= 5:
                raise error(f"pickle protocol {argument} is not known (2 to 5 are)")
        elif opcode == 0x2E:  # STOP
            if marks or len(stack) != 1:
                raise error("the file is damaged: it ends in the middle of a value")
            if not streaming:
                yield _finished(stack[0], operations)
            elif stack[0] is not _TOP:
                raise error(f"it holds a {type(stack[0]).__name__}, not a list of examples")
        if opcode in _MAKING:
            made += sys.getsizeof(stack[-1])
            if made > WINDOW:  # a call for each would take a tenth of the time
                operations.spend(made)
                made = 0
        if shared_bytes > MAX_SHARED_BYTES:
            raise error(
                f"its items share more than {MAX_SHARED_BYTES:,} bytes with each other, "
                "too many to keep; write the list again with a copy of every array"
            )


def _tuple(values: list, operations: _Operations) -> tuple:
    """NumPy's arguments are tuples with tuples in them, two deep: deeper ones could fill the
    memory from the inside out."""
    for value in values:
        if type(value) is tuple and any(type(inner) is tuple for inner in value):
            raise operations.error("refused: tuples more than two deep")
    return tuple(values)


def _finished(value, operations: _Operations):
    """A value fit to be handed out or put into a container."""
    if isinstance(value, _Unfinished):
        if value.kind != "array":
            raise operations.error("refused: a dtype as a value")
        if value.value is None:
            raise operations.error("the file is damaged: an array without content")
        return value.value
    if isinstance(value, _Name):
        raise operations.error(f"refused: {value.name} itself as a value")
    if type(value) is tuple:
        if len(value) > MAX_TUPLE or any(type(inner) is tuple for inner in value):
            raise operations.error(
                f"refused: a tuple with a tuple or more than {MAX_TUPLE} values in it"
            )
        operations.spend(sys.getsizeof(value))
        return tuple(_finished(inner, operations) for inner in value)
    if value is _TOP:
        raise operations.error("refused: the list is used inside itself")
    return value


def _set_items(target, pairs: list, operations: _Operations) -> None:
    if type(target) is not dict or len(pairs) % 2:
        raise operations.error("the file is damaged: something other than a dict gets entries")
    operations.spend(-sys.getsizeof(target))
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if type(key) is bytes:
            key = key.decode("latin1")  # a string of Python 2
            operations.spend(sys.getsizeof(key))
        if type(key) is not str:
            raise operations.error(
                f"refused: a dict key of type {type(key).__name__}, not a string"
            )
        if value is target:
            raise operations.error("refused: a dict inside itself")
        target[key] = _finished(value, operations)
    operations.spend(sys.getsizeof(target))
    if len(target) > MAX_NESTED:
        raise operations.error(f"refused: a dict of more than {MAX_NESTED:,} entries")


def _look_up(module, name, operations: _Operations) -> _Name:
    if isinstance(module, bytes) and isinstance(name, bytes):
        module, name = module.decode("utf-8", "replace"), name.decode("utf-8", "replace")
    if type(module) is not str or type(name) is not str:
        raise operations.error("the file is damaged: a name that is no string")
    if (module, name) not in _NAMES:
        full = f"{module}.{name}"[:MAX_NAME]
        raise operations.error(
            f"refused: it wants to use {full!r}, and data need only NumPy arrays"
        )
    return _NAMES[module, name]


def _reduce(function, arguments, operations: _Operations):
    if type(arguments) is not tuple or not isinstance(function, _Name):
        raise operations.error("refused: it calls something that is no NumPy constructor")
    kinds = [type(argument) for argument in arguments]
    if function is _RECONSTRUCT:
        if len(arguments) == 3 and arguments[0] is _NDARRAY and arguments[1] == (0,):
            return _Unfinished("array")
    elif function is _DTYPE:
        if len(arguments) == 3 and kinds[0] in (str, bytes):
            code = _string(arguments[0])
            if code[:1] == "O":
                raise operations.error("refused: an array of Python objects")
            if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
                raise operations.error(f"refused: an array of dtype {code[:20]!r}, not of numbers")
            return _Unfinished("dtype", code)
    elif function is _SCALAR:
        if len(arguments) == 2 and kinds[1] is bytes:
            dtype = _dtype(arguments[0], operations)
            if len(arguments[1]) == dtype.itemsize:
                return np.frombuffer(arguments[1], dtype)[0]
    elif function is _FROMBUFFER:
        if len(arguments) == 4 and kinds[0] is bytes and arguments[3] in ("C", "F"):
            array = _Unfinished("array")
            dtype = _dtype(arguments[1], operations)
            array.value = _array(
                arguments[0], dtype, arguments[2], arguments[3] == "F", operations
            )
            return array
    elif function is _BYTES and not arguments:
        return b""
    elif function is _ENCODE and kinds == [str, str] and arguments[1] == "latin1":
        try:
            return arguments[0].encode("latin1")
        except UnicodeEncodeError:
            pass
    raise operations.error(f"the file is damaged: {function.name} with arguments that do not fit")


def _string(value) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _dtype(value, operations: _Operations) -> np.dtype:
    if not isinstance(value, _Unfinished) or value.kind != "dtype":
        raise operations.error("the file is damaged: a dtype is missing")
    return value.value


def _array(data, dtype: np.dtype, shape, fortran: bool, operations: _Operations) -> np.ndarray:
    if (
        type(data) is not bytes
        or type(shape) is not tuple
        or len(shape) > 8
        or any(type(n) is not int or n < 0 for n in shape)
    ):
        raise operations.error("the file is damaged: an array without shape or content")
    count = dtype.itemsize
    for n in shape:
        count *= n  # Python integers: no overflow
    if count != len(data):
        raise operations.error(
            f"the file is damaged: an array of shape {shape} with {len(data):,} bytes"
        )
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _build(target, state, operations: _Operations) -> None:
    """BUILD: gives an array or a dtype its content."""
    if not isinstance(target, _Unfinished) or type(state) is not tuple:
        raise operations.error("refused: it sets the state of something that is no NumPy array")
    if target.kind == "dtype":
        # (version, byte order, subarray, names, fields, itemsize, alignment, flags[, metadata]):
        # plain numbers have only the order.
        plain = len(state) in (8, 9) and all(s is None for s in (*state[2:5], *state[8:]))
        order = _string(state[1]) if plain else ""
        if order not in ("<", ">", "|", "="):
            raise operations.error("refused: an array of records or of an unusual dtype")
        target.value = np.dtype(order + target.code)
        return
    if target.value is not None or len(state) != 5:
        raise operations.error("the file is damaged: an array gets its content twice")
    if type(state[4]) is list:
        raise operations.error("refused: an array of Python objects")
    target.value = _array(
        state[4], _dtype(state[2], operations), state[1], bool(state[3]), operations
    )
