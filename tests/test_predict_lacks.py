"""A machine that lacks what a run needs: packages, an interpreter, a log that can be written."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from inference import predict
from inference.output import save_segmentation
from tests.test_predict import CHECKOUT, SHAPE, StandIn, names, write_case
from tests.test_predict_stopped import PROCESS

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


def run(tmp_path: Path) -> int:
    return predict.main(["--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out")])


@pytest.mark.parametrize("package", ["torch", "inference.segmenter", "inference.finishing", "tqdm"])
def test_a_missing_package_is_told_in_one_line(tmp_path, monkeypatch, package):
    write_case(tmp_path / "in", "CT_a.npz")
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    monkeypatch.setattr(sys, "stderr", errors := io.StringIO())
    monkeypatch.setattr(errors, "isatty", lambda: True)  # where tqdm is needed, too
    assert run(tmp_path) == 2
    (line,) = errors.getvalue().splitlines()
    assert line.startswith(f"error: import of {package} ")
    assert line.endswith(f"; {sys.executable} -m pip install -r requirements.txt")
    assert names(tmp_path / "out") == []


def test_a_library_that_torch_lacks_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    write_case(tmp_path / "in", "CT_a.npz")
    (tmp_path / "torch.py").write_text('raise OSError("libcudart.so.13:\\n no such file")')
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(tmp_path) == 2
    assert capsys.readouterr().err == "error: libcudart.so.13: no such file\n"


def test_without_its_picture_a_case_keeps_its_earlier_result(tmp_path, monkeypatch, capsys):
    write_case(tmp_path / "in", "CT_a.npz")
    picture = tmp_path / "pictures" / "CT_a.png"
    picture.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "CT_a.npz").write_bytes(b"of the round before")
    monkeypatch.setattr(predict, "_build_segmenter", lambda _: StandIn())
    folders = ["--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out")]
    assert predict.main([*folders, "--overlay", str(picture.parent)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(picture) in line and ".part" not in line
    assert (tmp_path / "out" / "CT_a.npz").read_bytes() == b"of the round before"
    assert names(picture.parent) == ["CT_a.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """predict.sh with no .venv beside it, and programs/: all that is on PATH."""
    shutil.copy(CHECKOUT / "predict.sh", tmp_path)
    (tmp_path / "programs").mkdir()
    for name in ("sh", "dirname"):
        (tmp_path / "programs" / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def predict_sh(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [folder / "programs" / "sh", folder / "predict.sh"],
        env={"PATH": str(folder / "programs"), **environment},
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
    )


@pytest.mark.parametrize("given", ["", "no-such-program", "./text", "./programs"])
def test_an_interpreter_that_cannot_be_run(folder, given):
    (folder / "text").write_text("no program", encoding="utf-8")
    done = predict_sh(folder, PYTHON=given)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {given or 'python3'} cannot be run; accepted: PYTHON=FILE, ")


@pytest.mark.parametrize("there", [("python3",), ("python", "python3")])
def test_python3_is_taken_where_there_is_no_python(folder, there):
    for name in there:
        program = folder / "programs" / name
        program.write_text(f"#!{shutil.which('sh')}\necho {name} is run\n", encoding="utf-8")
        program.chmod(0o755)
    done = predict_sh(folder)
    assert (done.returncode, done.stdout) == (0, f"{there[0]} is run\n")


#: Goes before the process: what a failed case needs of torch, and a library that prints while a
#: result is being written.
LOUD = """
    import contextlib, os, sys, types
    memory = types.ModuleType("inference.memory")
    memory.release_memory = lambda: None
    sys.modules["inference.memory"] = memory
    flush = os.fsync
    def fsync(descriptor):
        for stream in (1, 2):
            with contextlib.suppress(OSError):
                os.write(stream, b"noise\\n")
        flush(descriptor)
    os.fsync = fsync
"""


@needs_full
@pytest.mark.parametrize(
    "log", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", ">&- 2>&-", "<&- 2>&-"]
)
def test_a_log_that_cannot_be_written_stops_no_case(tmp_path, log):
    """In a process of its own: what it cannot write at its end changes the status, too."""
    for name in ("CT_a.npz", "CT_c.npz"):
        write_case(tmp_path / "in", name)
    (tmp_path / "in" / "CT_b.npz").write_text("not an archive", encoding="utf-8")
    script = textwrap.dedent(LOUD + PROCESS.format(hang=False))
    folders = ["--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out")]
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {log}', sys.executable, "-c", script, *folders],
        cwd=CHECKOUT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 1, done
    expected = tmp_path / "expected.npz"
    label_map = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    save_segmentation(expected, label_map)
    assert names(tmp_path / "out") == ["CT_a.npz", "CT_c.npz"]
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == expected.read_bytes()
    errors = [line for line in done.stderr.splitlines() if line != "noise"]
    assert len(errors) == ("2>" not in log)  # of CT_b.npz


@needs_full
def test_a_full_log_changes_no_status_of_a_start(tmp_path, monkeypatch):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run(tmp_path) == 2  # no inputs folder
