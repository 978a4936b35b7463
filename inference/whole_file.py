"""Files that appear whole or not at all, and beside which nothing is left."""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` on leaving, or vanishes after an error.

    Until then it has a hidden name in the same folder; on leaving it is flushed to disk.

    Args:
        path: its folder must exist; after an error a file already there is as it was.

    Raises:
        OSError: it cannot be written.
    """
    # Not tempfile's: its files can be read by their owner only, and in a container the owner is
    # not the user who waits for the result. Opened anew where a crash left one behind. The name
    # counts too: on other machines, and in every container, processes have the same numbers.
    case = zlib.crc32(os.fsencode(path.name))
    temporary = path.parent / f".{case:08x}-{os.getpid()}-{threading.get_ident()}.part"
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(temporary, flags | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        error.filename = os.fspath(path)  # nobody asked for the temporary name
        raise
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == os.fspath(temporary):
            error.filename, error.filename2 = os.fspath(path), None
        if isinstance(error.__context__, SystemExit | KeyboardInterrupt):
            # Stopped with a member of the archive just opened, which then cannot be closed.
            raise error.__context__ from None
        raise
    with contextlib.suppress(OSError):  # not every file system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
