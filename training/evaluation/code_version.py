"""Which code scores and records come from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import inference

_SCORING = (
    *("clicks", "label_map", "labelled_case", "metrics", "perturbation", "protocol"),
    "surface_dice",
)


def code_of(kind: str) -> str:
    """Hash of the modules a predictor and its scores come from; a command's is not known.

    Args:
        kind: of the predictor, as in ``PredictorChoice``.
    """
    here = Path(__file__).parent
    modules = [here / f"{name}.py" for name in _SCORING]
    if kind not in ("command", "image"):
        package = Path(inference.__file__).parent
        modules += sorted([*package.rglob("*.py"), *package.rglob("*.toml")])  # rules are code, too
    if kind not in ("command", "image", "segmenter"):
        modules.append(here / "baselines.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()
