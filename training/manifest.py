"""Folders of labelled cases: their files, and what ``manifest.json`` calls their structures."""

from __future__ import annotations

import json
from pathlib import Path

_ACCEPTED = (
    'a list of objects with "file" and, where they are known, "structures": names by label, such '
    'as {"1": "liver"}'
)


def case_files(folder: Path) -> list[Path]:
    """The npz files of a folder, by name; hidden ones, as macOS leaves them, are none."""
    return sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))


def read_structures(folder: Path) -> dict[str, dict[str, str]]:
    """Names of structures by file name and label; none where a folder has no manifest.

    Raises:
        ValueError: the manifest is of another shape.
        OSError: it cannot be read.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); accepted: {_ACCEPTED}") from None
    if not isinstance(entries, list):
        raise _refusal(path, entries)
    names: dict[str, dict[str, str]] = {}
    for entry in entries:
        file = entry.get("file") if isinstance(entry, dict) else None
        structures = (entry.get("structures") or {}) if file else None
        if not isinstance(file, str) or not isinstance(structures, dict):
            raise _refusal(path, entry)
        names[file] = {label: str(name) for label, name in structures.items()}
    return names


def _refusal(path: Path, received: object) -> ValueError:
    text = json.dumps(received, ensure_ascii=False)[:100]
    return ValueError(f"{path}: received {text}; accepted: {_ACCEPTED}")
