"""Whether all pages of a TIFF file are there: ITK takes those it finds for the volume."""

from __future__ import annotations

import struct
from pathlib import Path

#: By the number after the order of bytes: where the first page's place stands, the format of
#: places, and the format of a page's number of entries and the length of one (TIFF 6.0, section 2,
#: and https://www.awaresystems.be/imaging/tiff/bigtiff.html).
_KINDS = {42: (4, "I", "H", 12), 43: (8, "Q", "Q", 20)}


def check_pages(path: Path) -> None:
    """Refuse a TIFF file that says of a page that it lies beyond the file's end.

    Args:
        path: any file; what does not begin as a TIFF file does is left to the reader.

    Raises:
        ValueError: the file is not whole, or its pages follow each other in a circle.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:

        def read(form: str, at: int) -> int:
            length = struct.calcsize(form)
            if at + length > size:
                raise ValueError(
                    f"{path}: received {size} bytes, fewer than its pages take; accepted: a whole "
                    "file"
                )
            file.seek(at)
            return int(struct.unpack(form, file.read(length))[0])

        order = {b"II": "<", b"MM": ">"}.get(file.read(2))
        if order is None:
            return
        kind = _KINDS.get(read(order + "H", 2))
        if kind is None:
            return
        first, place, entries, length = kind
        seen: set[int] = set()
        page = read(order + place, first)
        while page:
            if page in seen:
                raise ValueError(f"{path}: its pages follow each other in a circle")
            seen.add(page)
            count = read(order + entries, page)
            page = read(order + place, page + struct.calcsize(order + entries) + count * length)
