"""What a start may import: each of the challenge's six a case pays for it again."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
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
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.split() == []


def test_help_and_wrong_arguments_load_nothing_heavy() -> None:
    code = """
        import sys
        from inference.predict import main
        for arguments in (["--help"], ["--threads", "0"]):
            try:
                main(arguments)
            except SystemExit:
                pass
        print(*sorted({"numpy", "scipy", "torch", "cc3d"} & set(sys.modules)), file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=CHECKOUT,
        capture_output=True,
        encoding="utf-8",
    )
    assert "--inputs" in done.stdout
    assert done.stderr.splitlines()[-1] == ""
