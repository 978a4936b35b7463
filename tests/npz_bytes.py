"""npz files as bytes, right or wrong, for tests of the readers."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray


def archive(compression: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    """A zip archive of ``KEY.npy`` members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for key, content in members.items():
            file.writestr(f"{key}.npy", content)
    return stream.getvalue()


def npy(array: NDArray[Any], protocol: int = 4) -> bytes:
    """An array as npy; objects by a pickle of the protocol."""
    if array.dtype == object:
        return npy_header(array.shape, "|O", pickle.dumps(array, protocol))
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npy_header(shape: tuple[int, ...], descr: Any = "|u1", body: bytes = b"") -> bytes:
    """An npy header that claims what it is told to, and a body."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body
