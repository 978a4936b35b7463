"""Reading pickles that nobody vouches for: plain containers, numbers, strings, numpy arrays.

A pickle is a program. The unpickler's documented hook, ``find_class``, keeps it from naming other
functions, but not from altering those it may name, from making the unpickler's memo as long as it
likes, or from handing states of its choice to numpy's C code; so here the instructions are looked
at first, and stand-ins take the place of everything of numpy's.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What pickle writes for plain containers, numbers, strings and numpy arrays, protocols 0 to 5.
# Left out: everything that makes other objects (INST, OBJ, NEWOBJ, EXT, PERSID, sets, buffers).
_OPCODES = frozenset(
    """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE
    INT LONG LONG1 BININT BININT1 BININT2 FLOAT BINFLOAT
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
    PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET""".split()  # noqa: SIM905
)

#: Bytes that the pickle being read may still make, and how many in all by its own.
_left: ContextVar[int] = ContextVar("_left")
_GROWTH, _ROOM = 10, 1 << 16


def load_plain_pickle(data: bytes) -> object:
    """The object of a pickle that may hold only plain data.

    That is: dict (of keys other than tuples), list, tuple, int (of at most 64 bits), float, str,
    bytes, bool, None, and numpy arrays and scalars of bool, integer, float, string and object
    dtype. Its arrays and bytes may take ten times the pickle's size: one text can be named often.

    Raises:
        ValueError: if it holds anything else, or is damaged.
    """
    try:
        tuples = _Tuples()
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                raise ValueError(f"a pickle with the instruction {opcode.name}")
            # The unpickler makes its memo as long as the largest index asks, and integers over
            # 64 bits can be chosen to collide as keys of a dict.
            if isinstance(argument, int) and (
                ("PUT" in opcode.name and argument > len(data)) or argument.bit_length() > 64
            ):
                raise ValueError(f"a pickle with {opcode.name} of {argument.bit_length()} bits")
            tuples.follow(opcode, argument)
        _left.set(_GROWTH * len(data) + _ROOM)
        return _PlainUnpickler(io.BytesIO(data)).load()
    except MemoryError:
        raise
    except ValueError as error:
        raise ValueError(str(error) or "a damaged pickle") from None
    except Exception as error:  # a damaged pickle may raise anything (documentation of pickle)
        raise ValueError(f"a pickle that cannot be read: {error}") from None


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[bool, int, int]:
    """Whether all above a mark is taken, how many things besides, and how many come instead."""
    before = [one.name for one in opcode.stack_before]
    marked = "mark" in before
    return marked, before.index("mark") if marked else len(before), len(opcode.stack_after)


_EFFECTS = {one.name: _effect(one) for one in pickletools.opcodes if one.name in _OPCODES}
#: Which of the things that an instruction takes are keys.
_KEYS = {"SETITEM": slice(1, 2), "SETITEMS": slice(1, None, 2), "DICT": slice(0, None, 2)}


class _Tuples:
    """Follows which things on an unpickler's stack are tuples: none may be the key of a dict.

    Their hashes can be made to collide, or to take for ever where each holds the one before twice.
    """

    def __init__(self) -> None:
        self._stack: list[bool] = []
        self._marks: list[int] = []
        self._memo: dict[int, bool] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """What one instruction does to the stack."""
        name, stack = opcode.name, self._stack
        place = argument if isinstance(argument, int) else len(self._memo)
        if name == "MARK":
            self._marks.append(len(stack))
        elif name == "MEMOIZE" or "PUT" in name:
            self._memo[place] = stack[-1]
        elif "GET" in name:
            stack.append(self._memo[place])
        else:
            marked, count, results = _EFFECTS[name]
            first = (self._marks.pop() if marked else len(stack)) - count
            if first < 0:
                raise ValueError("a pickle that cannot be read: it takes what is not there")
            if name in _KEYS and any(stack[first:][_KEYS[name]]):
                raise ValueError("a pickle of a dict whose key is a tuple")
            del stack[first:]
            stack += ["TUPLE" in name] * results


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        module = re.sub(r"^numpy\.core\b", "numpy._core", module)  # its name before numpy 2
        function = _GLOBALS.get((module, name))
        if function is None:
            raise ValueError(f"a pickle that asks for {module}.{name}")
        return _Global(function)


class _Global:
    """A function a pickle may call. It is made anew each time and cannot be changed by a pickle."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise ValueError("a pickle that changes a function")


class _Dtype:
    """Stands for ``numpy.dtype``, whose own ``__setstate__`` trusts what it gets."""

    __slots__ = ("dtype",)

    def __init__(self, code: object, *_: object) -> None:
        # No longer floats: beyond a double's range all of them have one hash.
        if not isinstance(code, str) or not re.fullmatch(r"[?biuOSU]\d{0,6}|f[248]", code):
            raise ValueError(f"a pickle with the dtype {_brief(code)}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, byte_order, subarray, names, fields, *_ = state
        if (subarray, names, fields) != (None, None, None) or byte_order not in (
            "<",
            ">",
            "|",
            "=",
        ):
            raise ValueError("a pickle with a structured dtype")
        self.dtype = self.dtype.newbyteorder(byte_order)


class _PickledArray(np.ndarray[Any, np.dtype[Any]]):
    """An array that checks the state a pickle gives it before numpy sees it."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, data = state
        _check_array(shape, dtype, data)
        _spend(math.prod(shape) * dtype.dtype.itemsize)
        super().__setstate__((1, shape, dtype.dtype, bool(fortran_order), data))  # type: ignore[arg-type]


def _spend(count: int) -> None:
    """Take from the bytes that the pickle may still make."""
    _left.set(_left.get() - count)
    if _left.get() < 0:
        raise ValueError(f"a pickle that grows to over {_GROWTH} times its size")


def _brief(value: object) -> str:
    """Text as it is, of anything else its type: it may hold more than can be written."""
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"


def _check_array(shape: object, dtype: object, data: object) -> None:
    if not isinstance(dtype, _Dtype) or dtype.dtype.itemsize == 0:
        raise ValueError("a pickle with an array without dtype")
    if not (isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int for n in shape)):
        raise ValueError("a pickle with an array without shape")
    is_object = dtype.dtype == np.dtype(object)
    if not isinstance(data, list if is_object else bytes | bytearray):
        raise ValueError(f"a pickle with an array made of {type(data).__name__}")
    size = len(data) if is_object else len(data) / dtype.dtype.itemsize
    if min(shape, default=0) < 0 or math.prod(shape) != size:
        raise ValueError(f"a pickle with an array of shape {shape} made of {len(data)} bytes")


def _new_array(subtype: object, shape: object, code: object) -> _PickledArray:
    """``numpy.core.multiarray._reconstruct``: an empty array whose state comes next."""
    return np.empty(0, np.uint8).view(_PickledArray)


def _array_from_buffer(data: bytes, dtype: _Dtype, shape: Any, order: str) -> NDArray[Any]:
    """``numpy.core.numeric._frombuffer``: how protocol 5 writes an array."""
    _check_array(shape, dtype, data)
    return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _Dtype, data: bytes) -> object:
    """``numpy.core.multiarray.scalar``."""
    if isinstance(dtype, _Dtype) and dtype.dtype.itemsize == 0 and data == b"":
        return dtype.dtype.type()  # an empty text, as a round without a click has
    _check_array((), dtype, data)
    _spend(len(data))
    return np.frombuffer(data, dtype.dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode``: how protocols 0 to 2 write bytes."""
    if encoding != "latin1":
        raise ValueError(f"a pickle with bytes encoded as {_brief(encoding)}")
    _spend(len(text))
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """``bytes()``: how protocols 0 to 2 write bytes where there are none."""
    return b""


def _not_callable(*_: object) -> object:
    raise ValueError("a pickle that calls numpy.ndarray")


_GLOBALS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _not_callable,  # an argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _array_from_buffer,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}
