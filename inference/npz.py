"""Reading npz files that nobody vouches for: no code runs, no claim of size is believed.

``numpy.load(..., allow_pickle=True)`` runs whatever an object array's pickle asks for and allocates
whatever an npy header claims. Both keys of the challenge that hold prompts are object arrays, so
refusing pickles is no way out; here they may hold plain data (plain_pickle.py), and nothing else.
"""

from __future__ import annotations

import errno
import io
import math
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.plain_pickle import load_plain_pickle

MAX_ARRAY_BYTES = 4 << 30
"""Largest array read: 2^30 float32 voxels, four times a whole-body CT of 1000x512x512."""

MAX_PICKLE_BYTES = 4 << 20
"""Largest object array read: a hundred clicks for each of 255 classes take 1.6 MB."""

_MAX_HEADER_BYTES = 10_000  # numpy's own limit: literal_eval on longer text may crash
_MAX_DEFLATE_RATIO = 1032  # of the format itself (two bits may stand for 258 bytes)
_CHUNK_BYTES = 1 << 20
_ACCEPTED = "an npz file as numpy.savez or numpy.savez_compressed write it"


class NpzError(ValueError):
    """The file cannot be read; one line with its name, what was received, what is accepted."""


def one_line(source: str, received: str, accepted: str) -> str:
    """The text of an error about input, fit for a log: one printable line of bounded length."""
    text = f"{source}: received {received[:300]}; accepted: {accepted}"
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


class NpzFile(Mapping[str, NDArray[Any]]):
    """An open npz file: a mapping of keys to arrays that reads an array when it is asked for.

    Arrays come in the dtype and shape of the file, in native byte order, writable. Keys never asked
    for are never decompressed. Use as a context manager.

    Raises:
        NpzError: on opening what is no npz file, on reading a key that is damaged, too large, or
            an object array that holds more than plain containers, numbers, strings and arrays.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        try:
            kind = self._path.stat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # opening a pipe waits for a writer
                raise OSError(errno.ESPIPE, "it is a pipe or device")
            self._archive = zipfile.ZipFile(self._path)
        except _DAMAGE as error:
            raise self._error(f"a file that {self._why_no_archive(error)}") from None
        self._archive_bytes = self._path.stat().st_size
        self._members = {i.filename.removesuffix(".npy"): i for i in self._archive.infolist()}

    def __getitem__(self, key: str) -> NDArray[Any]:
        member = self._members[key]
        try:
            self._check_size(member)
            with self._archive.open(member) as stream:
                return _read_array(stream, member.file_size)  # type: ignore[arg-type]
        except MemoryError:
            raise self._error(
                f"{key} of {member.file_size} bytes, more than memory holds"
            ) from None
        except _DAMAGE as error:
            raise self._error(f"{key} that cannot be read ({error})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, key: object) -> bool:  # Mapping's own would read the array
        return key in self._members

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; arrays already read stay valid."""
        self._archive.close()

    def _error(self, received: str) -> NpzError:
        return NpzError(one_line(self._path.name, received, _ACCEPTED))

    def _why_no_archive(self, error: Exception) -> str:
        if isinstance(error, OSError) and error.strerror:
            return f"cannot be opened ({error.strerror})"
        with self._path.open("rb") as file:
            start = file.read(8)
        if not start:
            return "is empty"
        if start.startswith(b"\x93NUMPY"):
            return "is a single npy array"
        if start.startswith(b"PK"):
            return f"is a damaged or truncated zip archive ({error})"
        return f"is no zip archive (it starts with {start!r})"

    def _check_size(self, member: zipfile.ZipInfo) -> None:
        """Hold the directory's claims against each other and against the file, before reading."""
        if member.flag_bits & 1:
            raise ValueError("encrypted")
        if member.compress_type == zipfile.ZIP_STORED:
            possible = member.compress_size
        elif member.compress_type == zipfile.ZIP_DEFLATED:
            possible = member.compress_size * _MAX_DEFLATE_RATIO
        else:
            raise ValueError("neither stored nor deflated")
        if member.compress_size > self._archive_bytes or member.file_size > possible:
            raise ValueError(
                f"{member.compress_size} bytes that claim to hold {member.file_size}, "
                f"in a file of {self._archive_bytes}"
            )


# Whatever zipfile, zlib and the code below raise on damaged input; found by fuzzing.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)


def _read_array(stream: io.BufferedIOBase, size: int) -> NDArray[Any]:
    """One npy array from a stream that claims to hold ``size`` bytes."""
    shape, fortran_order, dtype, header_bytes = _read_header(stream)
    body_bytes = size - header_bytes
    if dtype == np.dtype(object):
        if body_bytes > MAX_PICKLE_BYTES:
            raise ValueError(f"an object array of {body_bytes} bytes, over {MAX_PICKLE_BYTES}")
        array = load_plain_pickle(stream.read(body_bytes))
        if not isinstance(array, np.ndarray) or array.shape != shape:
            raise ValueError(f"a pickle that is no array of shape {shape}")
        return array.view(np.ndarray)
    if dtype.hasobject:
        raise ValueError("a record array with objects in it")
    if not dtype.itemsize and 0 not in shape:  # numpy would make room for a character each
        raise ValueError(f"shape {shape} of {dtype}, of no bytes each")
    expected = math.prod(shape) * dtype.itemsize
    if expected != body_bytes:
        raise ValueError(f"shape {shape} of {dtype} takes {expected} bytes, there are {body_bytes}")
    if expected > MAX_ARRAY_BYTES:
        raise ValueError(f"{expected} bytes, over {MAX_ARRAY_BYTES}")

    flat = np.empty(math.prod(shape), dtype)
    view = flat.view(np.uint8).data if expected else memoryview(b"")
    start = 0
    while start < expected:
        count = stream.readinto(view[start : start + _CHUNK_BYTES])
        if not count:
            raise EOFError(f"ends after {start} of {expected} bytes")
        start += count
    stream.read(1)  # at the very end zipfile compares the checksum
    if not dtype.isnative:
        flat = flat.astype(dtype.newbyteorder("="))
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _read_header(stream: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, memory order and dtype an npy header states, and the bytes it took.

    Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\1\0", b"\2\0"):
        raise ValueError(f"starts with {magic!r}, no npy array of version 1.0 or 2.0")
    wide = magic[6] == 2
    length = stream.read(4 if wide else 2)
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"an npy header of {header_bytes} bytes")
    text = length + stream.read(header_bytes)
    reader = np.lib.format.read_array_header_2_0 if wide else np.lib.format.read_array_header_1_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy remarks on Python 2's headers
            shape, fortran_order, dtype = reader(io.BytesIO(text))
    except Exception:  # literal_eval and dtype raise nearly anything
        raise ValueError("an npy header that is none") from None
    if len(shape) > 32 or min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    return tuple(int(n) for n in shape), fortran_order, dtype, len(magic) + len(text)
