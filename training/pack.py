"""Labelled cases in one archive of a given size, to be sent where the accelerator is.

    python -m training.pack --out data.tar.xz train label_maps val
    tar xf data.tar.xz        # there: the same folders again

All cases are compressed together, which takes a sixth less than the files themselves. Where that
is still too much, intensities lose their lowest bits, in all cases alike, until it is not;
what is 0, as beside a brain, stays 0.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inference.npz import NpzFile
from training.manifest import case_files
from training.volumes import checked, to_bytes

_FEWEST_BITS = 5


def pack(folders: Sequence[Path], out: Path, largest: int) -> int:
    """Write an archive of the folders' npz files and manifests.

    Args:
        folders: of labelled cases and label maps; each is found under its own name in the archive.
        out: ends in ``.tar.xz``; appears whole or not at all.
        largest: bytes it may have.

    Returns:
        Bits that the intensities have in it.

    Raises:
        ValueError: another suffix, a folder has no case, two folders have one name, a file cannot
            be read or trained on, or five bits are still too many.
    """
    if not out.name.endswith(".tar.xz"):
        raise ValueError(f"{out}; accepted: a file named *.tar.xz")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"received folders called {names}; accepted: names that differ")
    paths = []
    for folder in folders:
        found = case_files(folder)
        if not found:
            raise ValueError(f"{folder}: no .npz file; accepted: a folder of cases or label maps")
        paths += found
        manifest = folder / "manifest.json"
        paths += [manifest] if manifest.is_file() else []
    temporary = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        for bits in range(8, _FEWEST_BITS - 1, -1):
            size = _write(paths, temporary, bits)
            if size <= largest:
                temporary.replace(out)
                return bits
    finally:
        temporary.unlink(missing_ok=True)
    raise ValueError(
        f"{len(paths)} cases of {size} bytes at {_FEWEST_BITS} bits a voxel; accepted: {largest}"
    )


def _write(paths: Sequence[Path], out: Path, bits: int) -> int:
    """Write the archive; its size."""
    with tarfile.open(out, "w:xz", preset=6) as archive:
        for path in paths:
            content = path.read_bytes()
            if path.suffix == ".npz":
                content = _with_fewer_bits(path, bits)
            entry = tarfile.TarInfo(f"{path.parent.resolve().name}/{path.name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.stat().st_size


def _with_fewer_bits(path: Path, bits: int) -> bytes:
    """The npz file, not compressed, its image as bytes of which the highest ``bits`` count."""
    with NpzFile(path) as file:
        arrays = dict(file)
    checked(path.stem, arrays)  # now, not where the archive is unpacked
    if "imgs" in arrays:
        image = to_bytes(arrays["imgs"])
        lost = 8 - bits
        fewer = (image >> lost << lost) + np.uint8(1 << lost >> 1)
        arrays["imgs"] = np.where(image > 0, fewer, 0).astype(np.uint8)
    content = io.BytesIO()
    np.savez(content, allow_pickle=True, **arrays)
    return content.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 after an error (one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m training.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", help="of npz files")
    parser.add_argument("--out", type=Path, required=True, help="NAME.tar.xz")
    parser.add_argument("--mib", type=float, default=50.0, help="largest size (default: 50)")
    options = parser.parse_args(arguments)
    if not 0 < options.mib < math.inf:
        parser.error(f"--mib {options.mib}; accepted: a finite number above 0")
    try:
        bits = pack(options.folders, options.out, int(options.mib * (1 << 20)))
        size = options.out.stat().st_size / (1 << 20)
        print(f"{options.out}: {size:.1f} MiB, intensities of {bits} bits")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
