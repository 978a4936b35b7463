"""The saved file: whole or not there, readable by everybody, the same bytes every time."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.extra import numpy as hnp

from inference import output
from inference.npz import NpzFile
from inference.output import save_segmentation
from tests.phantoms import challenge_case

LABELS = challenge_case((12, 40, 30), 5)["gts"]


def load(path: Path) -> np.ndarray[Any, Any]:
    with np.load(path) as arrays:  # allow_pickle=False
        assert arrays.files == ["segs"]
        return arrays["segs"]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_it_is_read_back_by_numpy_and_by_us(tmp_path: Path) -> None:
    save_segmentation(tmp_path / "a.npz", LABELS)
    found = load(tmp_path / "a.npz")
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, LABELS)
    with NpzFile(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["segs"], LABELS)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=9)))
def test_any_label_map_is_read_back(tmp_path: Path, labels: np.ndarray[Any, Any]) -> None:
    save_segmentation(tmp_path / "a.npz", labels)
    np.testing.assert_array_equal(load(tmp_path / "a.npz"), labels)


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) - 128, (1 << 20) + 1, 3 << 20])
def test_sizes_around_a_chunk(tmp_path: Path, size: int) -> None:
    labels = (np.arange(size) // 1000 % 256).astype(np.uint8).reshape(1, 1, -1)
    save_segmentation(tmp_path / "a.npz", labels)
    np.testing.assert_array_equal(load(tmp_path / "a.npz"), labels)


def test_views_in_other_memory_orders(tmp_path: Path) -> None:
    for view in (np.asfortranarray(LABELS), LABELS[::2, ::-1, 3:], LABELS.transpose(2, 0, 1)):
        save_segmentation(tmp_path / "a.npz", view)
        np.testing.assert_array_equal(load(tmp_path / "a.npz"), view)


def test_the_archive_is_sound(tmp_path: Path) -> None:
    save_segmentation(tmp_path / "a.npz", LABELS)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
        (member,) = archive.infolist()
    assert member.date_time == (1980, 1, 1, 0, 0, 0)
    assert member.compress_type == zipfile.ZIP_DEFLATED
    assert member.compress_size < LABELS.nbytes / 5


@pytest.mark.skipif(shutil.which("unzip") is None, reason="no unzip here")
def test_unzip_finds_nothing_wrong(tmp_path: Path) -> None:
    save_segmentation(tmp_path / "a.npz", LABELS)
    result = subprocess.run(
        ["unzip", "-t", "a.npz"], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0 and "No errors detected" in result.stdout, result


def test_the_same_label_map_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, labels in (("a.npz", LABELS), ("b.npz", np.asfortranarray(LABELS))):
        save_segmentation(tmp_path / name, labels)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_older_result_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    save_segmentation(tmp_path / "a.npz", LABELS)
    save_segmentation(tmp_path / "a.npz", LABELS[:3])
    np.testing.assert_array_equal(load(tmp_path / "a.npz"), LABELS[:3])
    assert names(tmp_path) == ["a.npz"]


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("step", ["_write_npz", "fsync", "replace"])
def test_a_failure_leaves_the_older_result_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    save_segmentation(tmp_path / "a.npz", LABELS)
    before = (tmp_path / "a.npz").read_bytes()

    def fail(*_: Any) -> None:
        raise BrokenError

    owner: Any = {"_write_npz": output, "fsync": os, "replace": Path}[step]
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(BrokenError):
        save_segmentation(tmp_path / "a.npz", LABELS[:3])
    assert (tmp_path / "a.npz").read_bytes() == before
    assert names(tmp_path) == ["a.npz"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save_segmentation(path, LABELS)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            save_segmentation(path, LABELS)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(30):
            np.testing.assert_array_equal(load(path), LABELS)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert names(tmp_path) == ["a.npz"]


def test_the_file_has_the_rights_the_user_asks_for(tmp_path: Path) -> None:
    """Whoever started the container is somebody else, and reads the file."""
    old = os.umask(0o022)
    try:
        save_segmentation(tmp_path / "a.npz", LABELS)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.npz").stat().st_mode) == 0o644


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can be two users")
def test_a_folder_and_an_older_result_of_somebody_else() -> None:
    """As in the challenge: the folder is the host user's (mode 777), we are another user."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders cannot be entered by others
    try:
        save_segmentation(folder / "a.npz", LABELS[:3])
        for path, mode in ((folder, 0o777), (folder / "a.npz", 0o644)):
            os.chown(path, 12345, 12345)
            path.chmod(mode)
        child = os.fork()
        if child == 0:
            try:
                os.setgid(23456)
                os.setuid(23456)
                save_segmentation(folder / "a.npz", LABELS)
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        np.testing.assert_array_equal(load(folder / "a.npz"), LABELS)
        assert (folder / "a.npz").stat().st_uid == 23456
        assert names(folder) == ["a.npz"]
    finally:
        shutil.rmtree(folder)


def temporary_name(name: str) -> str:
    return f".{zlib.crc32(name.encode()):08x}-{os.getpid()}-{threading.get_ident()}.part"


def test_a_left_over_temporary_file_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / temporary_name("a.npz")
    left.write_bytes(b"x" * 100_000)
    save_segmentation(tmp_path / "a.npz", LABELS)
    np.testing.assert_array_equal(load(tmp_path / "a.npz"), LABELS)
    assert names(tmp_path) == ["a.npz"]


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs O_NOFOLLOW")
def test_a_link_of_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / temporary_name("a.npz")).symlink_to(target)
    with pytest.raises(OSError):
        save_segmentation(tmp_path / "a.npz", LABELS)
    assert target.read_text(encoding="utf-8") == "precious"


def test_a_long_file_name(tmp_path: Path) -> None:
    name = "a" * 251 + ".npz"  # 255 bytes: no room for a temporary name made by lengthening
    save_segmentation(tmp_path / name, LABELS)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.astype(np.int16),
        LABELS > 0,
        LABELS[0],
        LABELS[None],
        np.broadcast_to(np.uint8(1), (1 << 11, 1 << 10, 1 << 10)),
    ],
    ids=["int16", "bool", "2D", "4D", "2 GiB"],
)
def test_what_is_no_label_map_is_refused(tmp_path: Path, labels: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"^a\.npz: received a label map of .*; accepted: ui"):
        save_segmentation(tmp_path / "a.npz", labels)
    assert names(tmp_path) == []


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "no" / "a.npz"
    with pytest.raises(FileNotFoundError) as caught:
        save_segmentation(path, LABELS)
    assert caught.value.filename == str(path)  # and no hidden one that nobody knows


@pytest.mark.parametrize("stop", [SystemExit(143), KeyboardInterrupt()])
def test_a_stop_while_a_member_is_opened_is_no_fault_of_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    """Then zipfile complains that the member is still open, and the stop must not be lost."""
    opened = zipfile.ZipFile.open

    def stopped(*arguments: Any, **more: Any) -> None:
        left_open.append(opened(*arguments, **more))
        raise stop

    left_open: list[Any] = []
    monkeypatch.setattr(zipfile.ZipFile, "open", stopped)
    with pytest.raises(type(stop)) as caught:
        save_segmentation(tmp_path / "a.npz", np.zeros((2, 3, 4), np.uint8))
    assert caught.value is stop
    assert not list(tmp_path.iterdir())
