"""The label map that comes out: its labels counted, and saved whole or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from inference.whole_file import replacing

_CHUNK_BYTES = 1 << 20
_TOO_LARGE = 1 << 31  # bytes; larger members need zip's 64-bit extension


def label_voxels(label_map: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(256,) how many voxels of a (D, H, W) label map each label has, 0 among them."""
    voxels = np.zeros(256, np.int64)
    for plane in label_map:  # plane by plane: bincount widens its input to 8 bytes a voxel
        voxels += np.bincount(plane.reshape(-1), minlength=256)
    return voxels


def save_segmentation(
    path: Path | str,
    label_map: NDArray[np.uint8],
    more: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write a label map as the challenge's output: an npz file with the key ``segs``.

    The file appears whole or not at all: it is written under a hidden temporary name in the same
    folder, flushed to disk and renamed; after an error a file already there is as it was. The same
    label map gives the same bytes.

    Args:
        path: the file, usually of the input's name in the output folder, which must exist.
        label_map: (D, H, W) uint8.
        more: further keys of the file and their arrays, of any numeric type.

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
    with replacing(path) as file:
        _write_npz(file, {"segs": label_map, **(more or {})})


def _write_npz(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    """What ``numpy.savez_compressed(file, **arrays)`` writes, at zlib's level 1.

    Numpy's level 6 takes more than twice the time to halve a small file
    (tests/benchmarks/bench_io.py).
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for key, array in arrays.items():
            array = np.ascontiguousarray(array)
            body = array.reshape(-1).view(np.uint8)
            # Opened so the member is dated 1980 and bytes depend on values only.
            with archive.open(f"{key}.npy", "w") as member:
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(member, header)
                for start in range(0, body.size, _CHUNK_BYTES):
                    member.write(body[start : start + _CHUNK_BYTES].data)
