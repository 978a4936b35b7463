"""Plain data comes out of a pickle; nothing a pickle can ask for happens."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.plain_pickle import load_plain_pickle
from tests.phantoms import challenge_case, objects

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

PLAIN: list[Any] = [
    None,
    True,
    -(1 << 63),
    1.5,
    "naïve ☃",
    b"\x00\xff",
    [],
    [1, [2, (3, ("x",))]],
    {"fg": [[1, 2, 3]], "bg": []},
    (1, 2, 3, 4, 5),
    np.int64(7),
    np.float32(0.1),
    np.bool_(True),
    np.uint8(255),
    np.str_("fg"),
    np.float64(np.inf),
    np.arange(6, dtype=">i2").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(3),
    np.zeros((0, 3)),
    np.array(["fg", "bg"]),
    np.array([b"fg"]),
    objects({"a": np.int64(1)}, None, [1.5]),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("thing", PLAIN, ids=repr)
def test_plain_data_comes_back(thing: Any, protocol: int) -> None:
    data = pickle.dumps(thing, protocol)
    found, expected = load_plain_pickle(data), pickle.loads(data)
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert repr(found.tolist()) == repr(expected.tolist())
    else:
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_challenges_prompts_come_back(protocol: int) -> None:
    case = challenge_case(n_classes=5, clicks=4)
    for key in ("boxes", "clicks"):
        found = load_plain_pickle(pickle.dumps(case[key], protocol))
        assert isinstance(found, np.ndarray)
        assert found.tolist() == case[key].tolist()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tuples_are_values_anywhere(protocol: int) -> None:
    shared = (1, (2, 3))
    for thing in ({"a": shared, "b": [shared, shared]}, {1: {"x": ()}, 2.5: (shared, {})}):
        assert load_plain_pickle(pickle.dumps(thing, protocol)) == thing


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("empty", [np.str_(""), np.bytes_(b"")])
def test_empty_texts_come_back(empty: np.generic, protocol: int) -> None:
    found = load_plain_pickle(pickle.dumps(objects([empty, empty]), protocol))
    assert isinstance(found, np.ndarray) and found.tolist() == [[empty, empty]]


def test_what_numpy_1_wrote_is_read() -> None:
    data = pickle.dumps(objects({"a": np.int64(1)}), 2)
    assert b"numpy._core.multiarray" in data
    found = load_plain_pickle(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert isinstance(found, np.ndarray) and found.tolist() == [{"a": 1}]


class Call:
    """Pickles to a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


# By their names in Python 3 and, protocols 0 to 2, in Python 2.
CALLS: dict[str, Call] = {
    "posix.system": Call(os.system, "touch ran"),
    r"(subprocess|commands).Popen": Call(subprocess.Popen, ["touch", "ran"]),
    r"(builtins\.)?eval": Call(eval, "open('ran', 'w')"),
    r"(builtins\.)?exec": Call(exec, "open('ran', 'w')"),
    r"(builtins\.)?getattr": Call(getattr, "a", "upper"),
    r"(builtins\.)?print": Call(print, "ran"),
    r"(builtins\.)?bytearray": Call(bytearray, 1 << 40),
    r"(builtins\.)?range": Call(range, 1 << 40),
    "io.open": Call(open, "ran", "w"),
    "numpy.load": Call(np.load, "ran", None, True),
    "numpy.ones": Call(np.ones, 1 << 40),
    "numpy.fromregex": Call(np.fromregex, "ran", "x", "u1"),
    "collections.OrderedDict": Call(collections.OrderedDict),
    "tests.test_plain_pickle.Call": Call(Call),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_refused(
    name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"a pickle that asks for (__builtin__\.x?)?{name}$"):
        load_plain_pickle(pickle.dumps(objects(CALLS[name]), protocol))
    assert list(tmp_path.iterdir()) == []


def test_the_same_calls_run_where_a_pickle_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test above tests something."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(CALLS["posix.system"]))
    assert [path.name for path in tmp_path.iterdir()] == ["ran"]


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def get(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


RECONSTRUCT = get("numpy._core.multiarray", "_reconstruct")
NDARRAY = get("numpy", "ndarray")
EMPTY_ARRAY = RECONSTRUCT + b"(" + NDARRAY + b"K\x00\x85C\x01bt" + b"R"
DTYPE = get("numpy", "dtype")
U1 = DTYPE + text("u1") + b"\x89\x88\x87R"
OBJECT = DTYPE + text("O8") + b"\x89\x88\x87R"


def array_state(shape: bytes, dtype: bytes, data: bytes) -> bytes:
    return b"\x80\x04" + EMPTY_ARRAY + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb."


def doubled(before: bytes, after: bytes) -> bytes:
    """Sixty things, each of the last one twice; the first one is there."""
    pairs = (b"h" + bytes([i]) + b"h" + bytes([i]) for i in range(60))
    return b"".join(before + pair + after + b"\x94" for pair in pairs)


def test_the_pieces_below_make_a_good_pickle() -> None:
    found = load_plain_pickle(array_state(b"K\x03\x85", U1, b"C\x03abc"))
    assert isinstance(found, np.ndarray) and found.tolist() == [97, 98, 99]


HUGE = b"\x8a\x06" + (1 << 45).to_bytes(6, "little")

CRAFTED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "pickle exhausted before seeing STOP"),
    "not a pickle": (b"hello", "."),
    "cut off": (pickle.dumps(PLAIN[8])[:-4], "."),
    "stack underflow": (b"\x80\x04R.", "cannot be read"),
    "an instance": (b"(i__main__\nX\n.", "instruction INST"),
    "an object": (b"(" + NDARRAY + b"o.", "instruction OBJ"),
    "a new object": (b"\x80\x04" + NDARRAY + b")\x81.", "instruction NEWOBJ"),
    "a new object with keywords": (b"\x80\x04" + NDARRAY + b")}\x92.", "instruction NEWOBJ_EX"),
    "an extension": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "a persistent name": (b"Px\n.", "instruction PERSID"),
    "a set": (b"\x80\x04\x8f.", "instruction EMPTY_SET"),
    "an outside buffer": (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
    "a long memo": (b"\x80\x04Nr\xff\xff\xff\xff.", "LONG_BINPUT of 32 bits"),
    "a long memo in text": (b"Np999999999999\n.", "PUT of 40 bits"),
    "a long integer": (b"\x8a\x09" + b"\1" * 9 + b".", "LONG1 of 65 bits"),
    "a long integer in text": (b"L" + b"9" * 5000 + b"L\n.", "."),
    "bytes that are not there": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\0.", "."),
    "a bytearray that is not there": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 45) + b".", "."),
    "text that is not there": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 45) + b".", "."),
    "an unhashable key": (b"}]Ns.", "cannot be read"),
    # To hash the last of these tuples would take 2^60 steps, to write the last list 2^60 words.
    "a key of tuples": (b"\x80\x04})\x94" + doubled(b"", b"\x86") + b"Ns.", "key is a tuple"),
    "a tuple as a key in protocol 0": (b"(d(I1\ntp0\nI2\nsg0\nI3\ns.", "key is a tuple"),
    "a tuple among keys": (b"}(K\x01K\x02K\x01\x85K\x02u.", "key is a tuple"),
    "a dtype of lists": (
        b"\x80\x04]\x94" + doubled(b"](", b"e") + DTYPE + b"h\x3c\x85R.",
        "with the dtype a list",
    ),
    "an encoding of lists": (
        b"\x80\x04]\x94"
        + doubled(b"](", b"e")
        + get("_codecs", "encode")
        + text("x")
        + b"h\x3c\x86R.",
        "encoded as a list",
    ),
    "a text encoded often": (
        b"\x80\x04"
        + (b"X" + struct.pack("<I", 10_000) + b"x" * 10_000 + b"\x94")
        + (get("_codecs", "encode") + b"\x94" + text("latin1") + b"\x94")
        + b"h\x01h\x00h\x02\x86R" * 5000
        + b".",
        "grows to over 10 times its size",
    ),
    "bytes of many arrays": (
        b"\x80\x04(K\x01M\x10\x27\x85"
        + (U1 + b"\x89B" + struct.pack("<I", 10_000) + b"x" * 10_000 + b"t\x94")
        + (EMPTY_ARRAY + b"h\x00b") * 1000
        + b".",
        "grows to over 10 times its size",
    ),
    "a call of ndarray": (b"\x80\x04" + NDARRAY + b"(" + HUGE + b"tR.", "calls numpy.ndarray"),
    "an array too large": (
        array_state(HUGE + b"\x85", U1, b"C\x03abc"),
        r"shape \(35184372088832,\) made of 3 bytes",
    ),
    "an array too small": (array_state(b"K\x02\x85", U1, b"C\x03abc"), "made of 3 bytes"),
    "a negative shape": (
        array_state(b"J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86", U1, b"C\x03abc"),
        "made of 3 bytes",
    ),
    "a shape of text": (array_state(text("x") + b"\x85", U1, b"C\x03abc"), "without shape"),
    "objects made of bytes": (array_state(b"K\x01\x85", OBJECT, b"C\x08aaaaaaaa"), "made of bytes"),
    "bytes made of objects": (array_state(b"K\x01\x85", U1, b"]"), "made of list"),
    "an array without dtype": (array_state(b"K\x01\x85", b"N", b"C\x01a"), "without dtype"),
    "a short state": (b"\x80\x04" + EMPTY_ARRAY + b"K\x01\x85b.", "not enough values"),
    "an array of nothing": (
        array_state(HUGE + b"\x85", DTYPE + text("S0") + b"\x89\x88\x87R", b"C\x00"),
        "without dtype",
    ),
    "floats whose hashes collide": (b"\x80\x04" + DTYPE + text("f16") + b"\x85R.", "dtype 'f16'"),
    "a void dtype": (b"\x80\x04" + DTYPE + text("V99") + b"\x85R.", "the dtype 'V99'"),
    "a dtype of a dtype": (b"\x80\x04" + DTYPE + U1 + b"\x85R.", "the dtype"),
    "a structured dtype": (
        b"\x80\x04" + U1 + b"(K\x03" + text("|") + b"N" + text("a") + b"\x85}NNNtb.",
        "structured dtype",
    ),
    "a scalar of an object": (
        b"\x80\x04" + get("numpy._core.multiarray", "scalar") + OBJECT + b"C\x08aaaaaaaa\x86R.",
        "made of bytes",
    ),
    "a scalar too short": (
        b"\x80\x04"
        + get("numpy._core.multiarray", "scalar")
        + DTYPE
        + text("f8")
        + b"\x85RC\x01a\x86R.",
        "made of 1 bytes",
    ),
    "another encoding": (
        b"\x80\x04" + get("_codecs", "encode") + text("x") + text("rot13") + b"\x86R.",
        "encoded as 'rot13'",
    ),
    "a name with dots": (b"\x80\x04" + get("numpy", "ndarray.__init__") + b".", "asks for numpy"),
    "a change of a function": (b"\x80\x04" + RECONSTRUCT + b"}b.", "changes a function"),
    "a change of its defaults": (
        b"\x80\x04" + RECONSTRUCT + b"N}" + text("__defaults__") + b"K\x01\x85s\x86b.",
        "changes a function",
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles_are_refused(name: str) -> None:
    data, message = CRAFTED[name]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            load_plain_pickle(data)
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


def test_loops_and_depth_are_survived() -> None:
    loop: list[Any] = []
    loop.append(loop)
    found = load_plain_pickle(pickle.dumps(loop))
    assert isinstance(found, list) and found[0] is found
    deep = load_plain_pickle(b"\x80\x04" + b"]" * 20_000 + b"a" * 19_999 + b".")
    assert isinstance(deep, list)


def test_doubling_references_take_no_memory() -> None:
    """Sixty lists, each of the last one twice: 2^60 leaves for whoever walks them."""
    data = b"\x80\x04]\x94" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(60)
    )
    found = load_plain_pickle(data + b".")
    assert isinstance(found, list) and len(found) == 2


def test_no_instruction_makes_other_objects() -> None:
    """Every instruction of pickle is either known here or refused, those to come as well."""
    from inference.plain_pickle import _OPCODES

    known = {opcode.name for opcode in pickletools.opcodes}
    assert known >= _OPCODES
    makers = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
    assert not makers & _OPCODES
