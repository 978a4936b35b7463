"""Measured figures in a Markdown file: what lies between two marker comments is written anew."""

from __future__ import annotations

from pathlib import Path

from inference.whole_file import replacing


def split_marked(path: Path, begin: str, end: str) -> tuple[str, str]:
    """What a file holds before and after two markers.

    Raises:
        ValueError: the file has not exactly one pair of markers.
        OSError: it cannot be read.
    """
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended or begin in after or end in after or end in before:
        raise ValueError(f"{path}: accepted: one line '{begin}' and after it one line '{end}'")
    return before, after


def replace_marked(path: Path, begin: str, end: str, markdown: str) -> None:
    """Put Markdown between two markers; the rest of the file stays as it is.

    Raises:
        ValueError: the file has not exactly one pair of markers.
        OSError: it cannot be read or written.
    """
    before, after = split_marked(path, begin, end)
    with replacing(path) as file:
        file.write(f"{before}{begin}\n\n{markdown}\n\n{end}{after}".encode())
