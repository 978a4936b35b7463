"""Every kind of input that is refused, each with its message."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference import case as case_module
from inference.case import CaseError, load_case, parse_case
from tests.npz_bytes import archive, npy, npy_header
from tests.phantoms import objects, small_case, write_npz

IMAGE = "a 3D array (D, H, W) of integers or floats"
SIZED = IMAGE + ", none of its sizes 0"
BOX_LIST = (
    "a list of dicts with z_min, z_max, z_mid_y_min, z_mid_y_max, z_mid_x_min, z_mid_x_max and "
    "z_mid, one a class"
)
CLICK_LIST = "a list of dicts with fg and bg, lists of (z, y, x), one a class"
PROMPTS = f"boxes, {BOX_LIST}, or clicks, {CLICK_LIST}"
SOMETHING = "at least one box or click"


BOX = {"z_min": 1, "z_max": 3, "z_mid": 2, "z_mid_y_min": 4, "z_mid_y_max": 9}
BOX |= {"z_mid_x_min": 5, "z_mid_x_max": 8}


def no_prompt(**changes: Any) -> dict[str, Any]:
    return small_case(boxes=None, clicks=None, clicks_order=None, prev_pred=None) | changes


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no imgs": (
        small_case(imgs=None, prev_pred=None, gts=None),
        "no imgs among its keys (spacing, boxes, clicks, clicks_order)",
        f"imgs, {IMAGE}",
    ),
    "no keys": ({}, "no imgs among its keys (nothing)", f"imgs, {IMAGE}"),
    "imgs of bool": (small_case(imgs=np.zeros((2, 3, 4), bool)), "imgs of type bool", IMAGE),
    "imgs complex": (
        small_case(imgs=np.zeros((2, 3, 4), complex)),
        "imgs of type complex128",
        IMAGE,
    ),
    "imgs text": (small_case(imgs=np.full((2, 3, 4), "a")), "imgs of type <U1", IMAGE),
    "imgs times": (
        small_case(imgs=np.zeros((2, 3, 4), "M8[s]")),
        "imgs of type datetime64[s]",
        IMAGE,
    ),
    "imgs objects": (small_case(imgs=np.zeros((2, 3, 4), object)), "imgs of type object", IMAGE),
    "imgs records": (
        small_case(imgs=np.zeros((2, 3, 4), [("a", "u1")])),
        "imgs of type [('a', 'u1')]",
        IMAGE,
    ),
    "imgs None": (small_case(imgs=np.array(None)), "imgs of type object", IMAGE),
    "imgs 2D": (small_case(imgs=np.zeros((3, 4))), "imgs of shape (3, 4)", SIZED),
    "imgs 4D": (small_case(imgs=np.zeros((1, 2, 3, 4))), "imgs of shape (1, 2, 3, 4)", SIZED),
    "imgs a number": (small_case(imgs=np.array(3)), "imgs of shape ()", SIZED),
    "imgs empty": (small_case(imgs=np.zeros((0, 3, 4))), "imgs of shape (0, 3, 4)", SIZED),
    "no prompts": (no_prompt(), "neither boxes nor clicks", PROMPTS),
    "empty prompts": (
        no_prompt(boxes=np.array([]), clicks=np.array([])),
        "neither boxes nor clicks",
        PROMPTS,
    ),
    "256 classes": (
        no_prompt(boxes=np.array([BOX] * 256)),
        "boxes for 256 classes",
        "at most 255",
    ),
    "a million classes": (
        no_prompt(clicks=np.zeros(1_000_000, np.uint8)),
        "clicks for 1000000 classes",
        "at most 255",
    ),
    "fewer clicks than boxes": (
        small_case(clicks=objects({})),
        "2 boxes, but clicks for 1 classes",
        "one of each a class",
    ),
    "more clicks than boxes": (
        small_case(clicks=objects({}, {}, {}, {})),
        "2 boxes, but clicks for 4 classes",
        "one of each a class",
    ),
    "boxes text": (small_case(boxes=np.array("1 2 3")), "boxes of type '1 2 3'", BOX_LIST),
    "boxes a number": (small_case(boxes=np.array(5)), "boxes of type 5", BOX_LIST),
    "clicks text": (small_case(clicks=np.array("fg")), "clicks of type 'fg'", CLICK_LIST),
    "boxes of numbers": (
        no_prompt(boxes=np.zeros((1, 6))),
        "1 classes without a usable box or click (class 1: no box (array of float64 (6,)).)",
        SOMETHING,
    ),
    "every box None": (
        no_prompt(boxes=objects(None, None)),
        "2 classes without a usable box or click (class 1: no box (None). class 2: no box (None).)",
        SOMETHING,
    ),
    "every click outside": (
        no_prompt(clicks=objects({"fg": [[99, 0, 0]]})),
        "1 classes without a usable box or click "
        "(class 1: 1 clicks outside the volume were left out, [99, 0, 0] first.)",
        SOMETHING,
    ),
    "every list of clicks empty": (
        no_prompt(clicks=objects({"fg": [], "bg": []})),
        "1 classes without a usable box or click ()",
        SOMETHING,
    ),
    "too many clicks": (
        small_case(clicks=objects({"fg": [[0, 0, 0]] * 10_001}, {})),
        "10001 clicks",
        "at most 10000",
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.parametrize("from_file", [False, True])
def test_bad_arrays_are_refused(tmp_path: Path, name: str, from_file: bool) -> None:
    arrays, received, accepted = BAD_ARRAYS[name]
    with pytest.raises(CaseError) as caught:
        if from_file:
            load_case(write_npz(tmp_path / "CT_7.npz", arrays))
        else:
            parse_case(arrays, "CT_7.npz")
    assert str(caught.value) == f"CT_7.npz: received {received}; accepted: {accepted}"


def test_an_image_of_too_many_voxels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_module, "MAX_VOXELS", 1000)
    with pytest.raises(CaseError, match="received imgs of 1920 voxels; accepted: at most 1000"):
        parse_case(small_case(), "a")


def pickled(payload: bytes, shape: tuple[int, ...] = (1,)) -> bytes:
    return archive(imgs=IMGS, boxes=npy_header(shape, "|O", payload))


def patched(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    result = bytearray(data)
    for position, content in changes:
        result[position : position + len(content)] = content
    return bytes(result)


def claimed_sizes(data: bytes, size: int) -> bytes:
    """The archive with another uncompressed size in its one directory entry."""
    directory = data.rindex(b"PK\1\2")
    return patched(data, (directory + 24, struct.pack("<I", size)))


def with_flag(data: bytes, flag: int) -> bytes:
    return patched(data, (6, struct.pack("<H", flag)), (data.rindex(b"PK\1\2") + 8, bytes([flag])))


class Evil:
    """Pickles to a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def evil(function: Callable[..., Any], *arguments: Any) -> bytes:
    return pickled(pickle.dumps(objects(Evil(function, *arguments))))


IMGS = npy(np.zeros((2, 3, 4), np.uint8))
GOOD = archive(imgs=IMGS)
GOOD_BYTES = int.from_bytes(GOOD[18:22], "little")  # compressed
ZEROS = archive(imgs=npy(np.zeros((2, 300, 400), np.uint8)))
NO_NPZ = "a file that "
CANNOT = "imgs that cannot be read "
NO_BOXES = "boxes that cannot be read "

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", NO_NPZ + "is empty"),
    "text": (b"<html>not found", NO_NPZ + "is no zip archive (it starts with b'<html>no')"),
    "a single array": (IMGS, NO_NPZ + "is a single npy array"),
    "truncated": (GOOD[:-40], NO_NPZ + "is a damaged or truncated zip archive"),
    "cut in half": (ZEROS[: len(ZEROS) // 2], NO_NPZ + "is a damaged or truncated zip archive"),
    "a pickle": (pickle.dumps({"imgs": 1}), NO_NPZ + "is no zip archive (it starts with "),
    "wrong checksum": (
        patched(GOOD, (GOOD.rindex(b"PK\1\2") + 16, b"abcd"), (14, b"abcd")),
        CANNOT + "(Bad CRC-32 for file 'imgs.npy')",
    ),
    "damaged data": (
        patched(GOOD, (60, b"\xff" * 20)),
        CANNOT + "(Error -3 while decompressing data",
    ),
    "directory and member disagree": (
        patched(GOOD, (30, b"IMGS")),
        CANNOT + "(File name in directory 'imgs.npy' and header",
    ),
    "encrypted": (with_flag(GOOD, 1), CANNOT + "(encrypted)"),
    "bzip2": (archive(zipfile.ZIP_BZIP2, imgs=IMGS), CANNOT + "(neither stored nor deflated)"),
    "lzma": (archive(zipfile.ZIP_LZMA, imgs=IMGS), CANNOT + "(neither stored nor deflated)"),
    "a directory that claims 4 GB": (
        claimed_sizes(GOOD, 0xFFFFFF00),
        CANNOT + f"({GOOD_BYTES} bytes that claim to hold 4294967040, in a file of {len(GOOD)})",
    ),
    "a stored member that claims more than the file": (
        patched(
            stored := archive(zipfile.ZIP_STORED, imgs=IMGS),
            (stored.rindex(b"PK\1\2") + 20, struct.pack("<II", 1 << 31, 1 << 31)),
        ),
        CANNOT + "(2147483648 bytes that claim to hold 2147483648, in a file of ",
    ),
    "no npy": (archive(imgs=b"hello world"), CANNOT + "(starts with b'hello wo', no npy array"),
    "empty member": (archive(imgs=b""), CANNOT + "(starts with b'', no npy array"),
    "npy version 9": (
        archive(imgs=patched(IMGS, (6, b"\x09"))),
        CANNOT + r"(starts with b'\x93NUMPY\t\x00', no npy array of version 1.0 or 2.0)",
    ),
    "a header that is none": (
        archive(imgs=patched(IMGS, (10, b"(((((((("))),
        CANNOT + "(an npy header that is none)",
    ),
    "a header that computes": (
        archive(imgs=IMGS[:8] + struct.pack("<H", 30) + b"{'shape': __import__('os')}   "),
        CANNOT + "(an npy header that is none)",
    ),
    "an enormous header": (
        archive(imgs=IMGS[:6] + b"\2\0" + struct.pack("<I", 1 << 31) + b" " * 100),
        CANNOT + "(an npy header of 2147483648 bytes)",
    ),
    "a header that claims 10 GB": (
        archive(imgs=npy_header((10_000, 1000, 1000), body=bytes(24))),
        CANNOT + "(shape (10000, 1000, 1000) of uint8 takes 10000000000 bytes, there are 24)",
    ),
    "a header that claims less": (
        archive(imgs=npy_header((1, 1, 1), body=bytes(24))),
        CANNOT + "(shape (1, 1, 1) of uint8 takes 1 bytes, there are 24)",
    ),
    "a negative size": (archive(imgs=npy_header((-1, 3, 4))), CANNOT + "(shape (-1, 3, 4))"),
    "a hundred axes": (archive(imgs=npy_header((1,) * 100)), CANNOT + "(shape (1, 1, 1,"),
    "sizes that overflow": (
        archive(imgs=npy_header((1 << 40, 1 << 40, 1))),
        CANNOT + "(shape (1099511627776, 1099511627776, 1) of uint8 takes 12089258196146",
    ),
    "records with objects": (
        archive(imgs=npy_header((1,), [("a", "|O")])),
        CANNOT + "(a record array with objects in it)",
    ),
    "an unknown dtype": (
        archive(imgs=npy_header((1,), "q9")),
        CANNOT + "(an npy header that is none)",
    ),
    "a pickle larger than allowed": (
        pickled(bytes(5 << 20)),
        NO_BOXES + "(an object array of 5242880 bytes, over 4194304)",
    ),
    "an empty pickle": (pickled(b""), NO_BOXES + "("),
    "a pickle of another shape": (
        pickled(pickle.dumps(objects(1, 2))),
        NO_BOXES + "(a pickle that is no array of shape (1,))",
    ),
    "a pickle of no array": (
        pickled(pickle.dumps([1])),
        NO_BOXES + "(a pickle that is no array of shape (1,))",
    ),
    "a pickle that calls eval": (
        evil(eval, "1"),
        NO_BOXES + "(a pickle that asks for builtins.eval)",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, name: str) -> None:
    data, received = BAD_FILES[name]
    path = tmp_path / "MR_3.npz"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CaseError) as caught:
            load_case(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # whatever sizes the file claims
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"MR_3.npz: received {received}")
    assert message.endswith(
        "; accepted: an npz file as numpy.savez or numpy.savez_compressed write it"
    )
    assert message.isprintable() and len(message) < 500


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"^no\.npz: received a file that cannot be opened \(No su"):
        load_case(tmp_path / "no.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(CaseError, match=r"^folder\.npz: received .* cannot be opened \(Is a dir"):
        load_case(tmp_path / "folder.npz")


def test_what_would_be_waited_for_is_refused(tmp_path: Path) -> None:
    """Opening a pipe waits for somebody to write into it."""
    (tmp_path / "device.npz").symlink_to(os.devnull)
    os.mkfifo(tmp_path / "pipe.npz")
    writer = os.open(tmp_path / "pipe.npz", os.O_RDWR)  # or a failing test would wait, too
    try:
        for name in ("device", "pipe"):
            with pytest.raises(CaseError, match=rf"^{name}\.npz: received .* \(it is a pipe or"):
                load_case(tmp_path / f"{name}.npz")
    finally:
        os.close(writer)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "link.npz").symlink_to(write_npz(tmp_path / "a.npz", small_case()))
    assert load_case(tmp_path / "link.npz").name == "link.npz"


def test_a_file_name_cannot_break_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.npz"
    path.write_bytes(b"no")
    with pytest.raises(CaseError) as caught:
        load_case(path)
    assert str(caught.value).isprintable()


def test_names_of_members_name_no_files(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", small_case())
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("../../outside.npy", IMGS)
        file.writestr("/etc/outside.npy", IMGS)
    assert load_case(path).notes == ()
    assert sorted(tmp_path.rglob("*")) == [path]
