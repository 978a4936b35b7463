"""Whether a NIfTI file is whole.

ITK reads a truncated ``.nii`` or ``.nii.gz`` without an error and fills what is missing with
zeros, and it does not look at gzip's checksum. A half-copied file must not become half a volume.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

_CHUNK_BYTES = 1 << 20
#: Offset and format of dim, bitpix and vox_offset by the header's size: NIfTI-1 and NIfTI-2
#: (https://nifti.nimh.nih.gov/nifti-1, https://nifti.nimh.nih.gov/nifti-2).
_FIELDS = {
    348: ((40, "8h"), (72, "h"), (108, "f")),
    540: ((16, "8q"), (14, "h"), (168, "q")),
}


def check_whole(path: Path) -> None:
    """Refuse a file with fewer bytes than its header promises, or damaged compression.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file; other names and files without a NIfTI header are
            left to the reader.

    Raises:
        ValueError: the file is not whole.
        OSError: it cannot be opened.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        return
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        if not compressed:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(540)
        else:
            with gzip.open(path) as stream:
                header = stream.read(540)
                size = len(header)
                while chunk := stream.read(_CHUNK_BYTES):
                    size += len(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: received damaged gzip data ({error}); accepted: a whole file"
        ) from None
    expected = _bytes_promised(header)
    if size < expected:
        raise ValueError(
            f"{path}: received {size} bytes where the header promises {expected:.0f}; accepted: a "
            "whole file"
        )


def _bytes_promised(header: bytes) -> float:
    """Header, extensions and voxels; 0 where this is no NIfTI header."""
    for order in "<>":
        kind = struct.unpack_from(f"{order}i", header)[0] if len(header) >= 4 else 0
        if kind in _FIELDS and len(header) >= kind:
            dim, bits, offset = (
                struct.unpack_from(order + form, header, at) for at, form in _FIELDS[kind]
            )
            sizes = dim[1 : 1 + min(max(dim[0], 0), 7)]
            promised: float = offset[0] + math.prod(max(n, 1) for n in sizes) * bits[0] / 8
            return promised
    return 0.0
