"""What NIfTI headers say, where ITK does not listen.

ITK reads a truncated ``.nii`` or ``.nii.gz`` without an error and fills what is missing with
zeros, and it does not look at gzip's checksum. A half-copied file must not become half a volume.
And of the two transforms from voxels to the scanner that a header has (qform, sform) it goes by
one and writes that one twice, while other programs may go by the other.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 20
#: Offset and format of dim, bitpix and vox_offset by the header's size: NIfTI-1 and NIfTI-2
#: (https://nifti.nimh.nih.gov/nifti-1, https://nifti.nimh.nih.gov/nifti-2).
_FIELDS = {
    348: ((40, "8h"), (72, "h"), (108, "f")),
    540: ((16, "8q"), (14, "h"), (168, "q")),
}
#: Likewise of pixdim, xyzt_units, the codes of qform and sform, quaternion with offset, and srow;
#: NIfTI-1 alone, since ITK reads and writes no other.
_TRANSFORMS = {348: ((76, "8f"), (123, "b"), (252, "2h"), (256, "6f"), (280, "12f"))}
_ENDINGS = (".nii", ".nii.gz")
_PAIR = (".hdr", ".img", ".hdr.gz", ".img.gz")
_LARGEST_HEADER = max(_FIELDS)


def check_whole(path: Path) -> None:
    """Refuse a file with fewer bytes than its header promises, or damaged compression.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file, or one of a pair ``.hdr`` and ``.img``, compressed or
            not; other names and files without a NIfTI or Analyze header are left to the reader.

    Raises:
        ValueError: the file is not whole.
        OSError: it cannot be opened.
    """
    if path.name.lower().endswith(_ENDINGS):
        header, size = _header_and_size(path)
    elif path.name.lower().endswith(_PAIR):
        one = path.with_suffix("") if path.suffix.lower() == ".gz" else path
        sides = [[one.with_suffix(side + end) for end in ("", ".gz")] for side in (".hdr", ".img")]
        pair = [part for side in sides for part in side if part.is_file()]
        if len(pair) != 2:
            return
        (header, _), path = _header_and_size(pair[0]), pair[1]
        _, size = _header_and_size(path)
    else:
        return
    expected = _bytes_promised(header)
    if size < expected:
        raise ValueError(
            f"{path}: received {size} bytes where the header promises {expected:.0f}; accepted: a "
            "whole file"
        )


def copy_transforms(source: Path, written: Path) -> None:
    """Give a NIfTI file that ITK wrote both transforms of the one that its grid comes from.

    Args:
        source: another NIfTI file, whose grid of voxels is the same; anything else is left alone.
        written: ``.nii`` or ``.nii.gz``, changed in place; anything else is left alone.

    Raises:
        OSError: a file cannot be read or written.
    """
    if not all(path.name.lower().endswith(_ENDINGS) for path in (source, written)):
        return
    with _opened(source) as stream:
        fields = _unpacked(stream.read(_LARGEST_HEADER), _TRANSFORMS)
    content = written.read_bytes()
    compressed = content[:2] == b"\x1f\x8b"
    changed = bytearray(gzip.decompress(content) if compressed else content)
    if fields is None or _unpacked(bytes(changed[:348]), _TRANSFORMS) is None:
        return
    order = "<" if struct.unpack_from("<i", changed)[0] == 348 else ">"
    for (at, form), values in zip(_TRANSFORMS[348], fields, strict=True):
        struct.pack_into(order + form, changed, at, *values)
    written.write_bytes(gzip.compress(changed, 6, mtime=0) if compressed else changed)


def _opened(path: Path) -> BinaryIO | gzip.GzipFile:
    """A file that may be compressed, whatever its name."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")


def _header_and_size(path: Path) -> tuple[bytes, int]:
    """The first bytes of a file and how many there are in all, once decompressed."""
    try:
        with _opened(path) as stream:
            header = stream.read(_LARGEST_HEADER)
            if not isinstance(stream, gzip.GzipFile):
                return header, path.stat().st_size
            size = len(header)
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
            return header, size
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: received damaged gzip data ({error}); accepted: a whole file"
        ) from None


def _unpacked(header: bytes, fields: dict[int, Any]) -> list[tuple[Any, ...]] | None:
    """Values of some fields; None where this is no NIfTI header."""
    for order in "<>":
        kind = struct.unpack_from(f"{order}i", header)[0] if len(header) >= 4 else 0
        if kind in fields and len(header) >= kind:
            return [struct.unpack_from(order + form, header, at) for at, form in fields[kind]]
    return None


def _bytes_promised(header: bytes) -> float:
    """Header, extensions and voxels; 0 where this is no NIfTI header."""
    fields = _unpacked(header, _FIELDS)
    if fields is None:
        return 0.0
    dim, bits, offset = fields
    sizes = dim[1 : 1 + min(max(dim[0], 0), 7)]
    promised: float = offset[0] + math.prod(max(n, 1) for n in sizes) * bits[0] / 8
    return promised
