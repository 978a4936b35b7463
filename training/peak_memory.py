"""The largest resident memory of this process."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path


def start_peak() -> bool:
    """Begin a new peak; False where the system goes on with the one since the process began."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return True
    return False


def peak_bytes() -> int:
    """The largest resident memory since :func:`start_peak`, or since the process began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    import resource  # which not every system has

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest << 10
