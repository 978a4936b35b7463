"""How large the container image is, and its fifteen largest packages, beside the whole.

    python -m tests.benchmarks.bench_image [--image sammed3d:latest] [--archive sammed3d.tar.gz]

Needs an engine and an image (``make image``); says so where there is none. ``make export`` makes
the archive, whose size is told where it is there.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
from collections import Counter
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

#: Prints bytes and paths of what pip installed, of our own, and of the base system.
SCRIPT = r"""
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
du -sb "$site"/* /workspace/inference /workspace/weights
du -sxb / | sed 's#/$#/everything#'
"""


def package_of(path: str) -> str:
    """The package a file or folder of site-packages belongs to, or our own folder."""
    name = Path(path).name
    if path.startswith("/workspace"):
        return f"{name}/ (ours)"
    name = re.sub(r"[-.](\d|cpython).*|\.(libs|py|so|pth)$", "", name)
    return {"isympy": "sympy", "_distutils_hack": "setuptools", "pkg_resources": "setuptools"}.get(
        name, name.lower().removesuffix(".libs").replace("connected_components_3d", "cc3d")
    )


def main() -> None:
    """Measure, print a table, write CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", default="sammed3d:latest")
    parser.add_argument("--archive", type=Path, default=CHECKOUT / "sammed3d.tar.gz")
    options = parser.parse_args()
    command = ["docker", "run", "--rm", "--network", "none", "--user", "0", options.image, "sh"]
    try:
        done = subprocess.run(
            [*command, "-c", SCRIPT], capture_output=True, encoding="utf-8", check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", "") or str(error)).split())
        print(f"no image {options.image} to measure: {reason}")
        return
    sizes: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        size, path = line.split("\t")
        sizes[package_of(path)] += int(size)
    whole = sizes.pop("everything")
    rows = sizes.most_common(15)
    rest = sum(sizes.values()) - sum(size for _, size in rows)
    rows += [("other packages", rest), ("base system", whole - sum(sizes.values()))]
    rows += [("the image", whole)]
    if options.archive.is_file():
        rows.append(("as tar.gz", options.archive.stat().st_size))
    results = CHECKOUT / "tests" / "benchmarks" / "results" / "image.csv"
    with results.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "bytes", "share_of_image"])
        print(f"{'part':28s} {'MB':>7s} {'share':>6s}")
        for name, size in rows:
            print(f"{name:28s} {size / 1e6:7.1f} {size / whole:6.1%}")
            writer.writerow([name, size, f"{size / whole:.4f}"])
    print(f"written to {results}")


if __name__ == "__main__":
    main()
