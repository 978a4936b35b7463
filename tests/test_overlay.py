"""The picture shows what is there: proportions, slices, outlines; and the PNG is a PNG."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from inference.overlay import GAP_PIXELS, PANEL_PIXELS, draw_overlay, save_png

SHAPE = (20, 30, 40)
SPACING_MM = (3.0, 2.0, 1.0)


def phantom() -> tuple[np.ndarray, np.ndarray]:
    image = np.linspace(0, 255, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    label_map = np.zeros(SHAPE, np.uint8)
    label_map[4:9, 5:12, 20:36] = 1
    label_map[15, 20, 3] = 2
    return image, label_map


def is_coloured(picture: np.ndarray) -> np.ndarray:
    return picture.max(axis=2) != picture.min(axis=2)


def test_slices_keep_their_physical_proportions():
    picture = draw_overlay(*phantom(), SPACING_MM)
    # 60 x 60 x 40 mm at 6.4 pixels a mm: axial (y, x), coronal (z, x), sagittal (z, y).
    assert picture.dtype == np.uint8
    assert picture.shape == (PANEL_PIXELS, 256 + 256 + 384 + 2 * GAP_PIXELS, 3)


def test_outline_is_where_the_largest_object_is():
    image, label_map = phantom()
    axial = draw_overlay(image, label_map, SPACING_MM)[:, :256]
    rows, columns = np.nonzero(is_coloured(axial))
    pixels_a_voxel = 384 / 60 * np.array([2.0, 1.0])
    assert np.allclose([rows.min(), columns.min()], pixels_a_voxel * (5, 20), atol=1)
    assert np.allclose([rows.max() + 1, columns.max() + 1], pixels_a_voxel * (12, 36), atol=1)
    inside = axial[
        int(pixels_a_voxel[0] * 8) : int(pixels_a_voxel[0] * 9),
        int(pixels_a_voxel[1] * 25) : int(pixels_a_voxel[1] * 30),
    ]
    assert not is_coloured(inside).any(), "an outline leaves the image visible inside"


def test_upper_slices_are_drawn_on_top():
    image, label_map = phantom()
    coronal = draw_overlay(image, label_map, SPACING_MM)[:, 256 + GAP_PIXELS : 512 + GAP_PIXELS]
    rows = np.nonzero(is_coloured(coronal))[0]
    assert rows.min() > PANEL_PIXELS / 2, "slices 4..8 of 20 lie in the lower half"


@pytest.mark.parametrize("shape", [(1, 7, 5), (5, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("label", [0, 1])
def test_thin_constant_and_empty_volumes_are_drawn(shape, label):
    picture = draw_overlay(np.full(shape, 7), np.full(shape, label, np.uint8), (5.0, 1.0, 1.0))
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert not is_coloured(picture).any(), "no border between labels, no outline"


def test_png_decodes_to_the_picture(tmp_path: Path):
    picture = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    save_png(path, picture)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">2I5B", chunks[b"IHDR"]) == (23, 17, 8, 2, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(17, 1 + 23 * 3)
    assert not rows[:, 0].any()
    assert np.array_equal(rows[:, 1:].reshape(picture.shape), picture)


def test_failed_write_keeps_the_earlier_picture(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.png"
    picture = np.zeros((2, 2, 3), np.uint8)
    save_png(path, picture)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_png(path, picture + 255)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
