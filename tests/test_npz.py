"""The npz reader as a mapping: lazy, exact, and no more memory than the arrays take."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference import npz
from inference.npz import NpzError, NpzFile, one_line
from tests.npz_bytes import archive, npy, npy_header
from tests.phantoms import objects

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "uint8": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "big_endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "text": np.array(["fg", "bg"]),
    "big_endian_text": np.array(["fg", "bg"]).astype(">U2"),
    "bytes": np.array([b"fg"]),
    "no_text": np.array([""]),
    "time": np.array(["2025-01-01"], "M8[D]"),
    "records": np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 3)),
    "objects": objects({"a": 1}, None),
    "object": np.array({"a": 1}),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("compressed", [True, False])
def test_arrays_come_back_as_numpy_reads_them(tmp_path: Path, name: str, compressed: bool) -> None:
    path = tmp_path / "a.npz"
    (np.savez_compressed if compressed else np.savez)(path, **{name: ARRAYS[name]})
    with np.load(path, allow_pickle=True) as arrays:
        expected = arrays[name]
    with NpzFile(path) as found:
        array = found[name]
    assert type(array) is np.ndarray
    assert array.dtype == expected.dtype.newbyteorder("=") and array.dtype.isnative
    assert array.shape == expected.shape
    assert array.tolist() == expected.tolist()
    assert array.flags.writeable and array.flags.f_contiguous == expected.flags.f_contiguous


def test_it_is_a_mapping(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **ARRAYS)
    with NpzFile(tmp_path / "a.npz") as found:
        assert list(found) == list(ARRAYS) and len(found) == len(ARRAYS)
        assert "uint8" in found and "uint8.npy" not in found and 3 not in found
        assert found.get("no") is None
        with pytest.raises(KeyError):
            found["no"]


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(archive(bad=b"no array", good=npy(np.arange(3))))
    with NpzFile(path) as found:
        assert "bad" in found and set(found) == {"bad", "good"}
        assert found["good"].tolist() == [0, 1, 2]
        with pytest.raises(NpzError, match=r"^a\.npz: received bad that cannot be read"):
            found["bad"]


def test_members_without_an_ending_and_the_last_of_two_names(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("plain", npy(np.array(1)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("twice.npy", npy(np.array(1)))
            file.writestr("twice.npy", npy(np.array(2)))
    with NpzFile(path) as found, np.load(path) as arrays:
        assert found["plain"] == 1
        assert found["twice"] == arrays["twice"] == 2


def test_npy_version_2_is_read(tmp_path: Path) -> None:
    content = npy_header((3,), "|u1", b"abc")
    length = struct.unpack("<H", content[8:10])[0]
    content = content[:6] + b"\2\0" + struct.pack("<I", length) + content[10:]
    (tmp_path / "a.npz").write_bytes(archive(a=content))
    with NpzFile(tmp_path / "a.npz") as found:
        assert found["a"].tolist() == [97, 98, 99]


def test_python_2_headers_are_read_without_a_warning(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (3L,), }"
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"abc"
    (tmp_path / "a.npz").write_bytes(archive(a=content))
    with NpzFile(tmp_path / "a.npz") as found:
        assert found["a"].tolist() == [97, 98, 99]


def test_an_array_takes_its_own_memory_and_little_more(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (32, 512, 512), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", a=array)
    tracemalloc.start()
    with NpzFile(tmp_path / "a.npz") as found:
        result = found["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(result, array)
    assert peak < array.nbytes + (5 << 20)


def test_an_honest_file_may_be_compressed_as_far_as_zip_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros((64, 512, 512), np.uint8))
    assert (64 << 18) / path.stat().st_size > 900
    with NpzFile(path) as found:
        assert not found["a"].any()


def test_arrays_over_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1001, np.uint8))
    monkeypatch.setattr(npz, "MAX_ARRAY_BYTES", 1000)
    with NpzFile(tmp_path / "a.npz") as found, pytest.raises(NpzError, match="1001 bytes, over 10"):
        found["a"]


def test_too_little_memory_is_an_error_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1000, np.uint8))

    def none_left(*_: Any) -> None:
        raise MemoryError

    with NpzFile(tmp_path / "a.npz") as found:
        monkeypatch.setattr(np, "empty", none_left)
        with pytest.raises(NpzError, match="received a of 1128 bytes, more than memory holds"):
            found["a"]


def test_files_are_closed(tmp_path: Path) -> None:
    """An unclosed one would warn, and warnings are errors here."""
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with NpzFile(tmp_path / "a.npz") as found:
        array = found["a"]
    with pytest.raises(NpzError):
        found["a"]
    assert array.tolist() == [0, 0, 0]


def test_one_line_is_one_printable_line_of_bounded_length() -> None:
    text = one_line("a\n\tb\x1b[0m", "x" * 10_000 + "\n", "what \udc80 fits")
    assert text.startswith("a b?[0m: received xxx") and text.endswith("; accepted: what ? fits")
    assert text.isprintable() and len(text) < 400
