"""Saving a label map so that whoever reads the file finds a whole one, or the one before."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_MEMBER = b"segs.npy"
_CHUNK_BYTES = 1 << 20
_DATE_1980 = 0x21  # the zip format's earliest: the same label map gives the same bytes
_VERSION, _DEFLATED = 20, 8
_TOO_LARGE = 1 << 31  # bytes; with 4 GiB zip's 64-bit extension would begin


def save_segmentation(path: Path | str, label_map: NDArray[np.uint8]) -> None:
    """Write a label map as the challenge's output: an npz file with the key ``segs``.

    The file appears whole or not at all: it is written under a hidden temporary name in the same
    folder, flushed to disk and renamed; after an error a file already there is as it was. The same
    label map gives the same bytes.

    Args:
        path: the file, usually of the input's name in the output folder, which must exist.
        label_map: (D, H, W) uint8.

    Raises:
        ValueError: if the label map is none.
        OSError: if it cannot be written.
    """
    path = Path(path)
    if label_map.dtype != np.uint8 or label_map.ndim != 3 or label_map.nbytes >= _TOO_LARGE:
        raise ValueError(
            f"{path.name}: received a label map of {label_map.dtype} and shape {label_map.shape}; "
            f"accepted: uint8 of shape (D, H, W), under 2 GiB"
        )
    with _replacing(path) as file:
        _write_npz(file, np.ascontiguousarray(label_map))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` on leaving, or vanishes after an error."""
    # Not tempfile's: its files can be read by their owner only, and in a container the owner is
    # not the user who waits for the result. Opened anew where a crash left one behind.
    temporary = path.parent / f".{os.getpid()}-{threading.get_ident()}.npz.part"
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(temporary, flags | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_npz(file: BinaryIO, label_map: NDArray[np.uint8]) -> None:
    """A zip archive of one deflated member.

    ``zipfile`` offers zlib's levels but not its run-length strategy, which suits label maps: on a
    300x512x512 map of 100 classes it is faster than any level and leaves less than level 1 does
    (tests/benchmarks/bench_io.py). Format: PKWARE's APPNOTE.TXT, sections 4.3.7, 4.3.12, 4.3.16.
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, np.lib.format.header_data_from_array_1_0(label_map)
    )
    local = struct.Struct("<4s5H3I2H")
    file.write(bytes(local.size) + _MEMBER)

    compressor = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    checksum = size = 0
    body = label_map.reshape(-1)
    chunks = (body[i : i + _CHUNK_BYTES].data for i in range(0, body.size, _CHUNK_BYTES))
    for chunk in (header.getbuffer(), *chunks):
        checksum = zlib.crc32(chunk, checksum)
        size += len(chunk)
        file.write(compressor.compress(chunk))
    file.write(compressor.flush())

    end = file.tell()
    compressed = end - local.size - len(_MEMBER)
    entry = (0, _DEFLATED, 0, _DATE_1980, checksum, compressed, size, len(_MEMBER), 0)
    directory = struct.pack("<4s6H3I5H2I", b"PK\1\2", _VERSION, _VERSION, *entry, 0, 0, 0, 0, 0)
    file.write(directory + _MEMBER)
    length = len(directory) + len(_MEMBER)
    file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, length, end, 0))
    file.seek(0)
    file.write(local.pack(b"PK\3\4", _VERSION, *entry))
