"""What a start may import: each of the challenge's six a case pays for it again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]

#: Each takes 0.1 to 1 s.
DEAR = (
    "scipy.special",
    "scipy.ndimage",
    "scipy.sparse",
    "SimpleITK",
    "sympy",
    "matplotlib",
    "tqdm",
)


def test_a_start_imports_nothing_dear_but_torch() -> None:
    script = f"""
import sys
import torch
before = set(sys.modules)
from inference import predict
import inference.case, inference.finishing, inference.output
predict.load(predict.make_parser().parse_args(["--device", "cpu"]))
print(*sorted(set({DEAR}) & (set(sys.modules) - before)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []
