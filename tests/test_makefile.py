"""What the Makefile's targets run, with stand-ins for docker and for Python."""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def start_make(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Make in the checkout, where programs of the folder go first."""
    return subprocess.Popen(
        ["make", "--no-print-directory", *words],
        cwd=CHECKOUT,
        env=os.environ | {"PATH": f"{folder / 'programs'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        # Where tests run in a shell's background Ctrl-C is ignored, and would be here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def make(folder: Path, *words: str) -> tuple[int, str, str]:
    process = start_make(folder, *words)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_every_benchmark_runs_and_those_that_fail_are_named(tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    program(environment / "bin" / "python", 'echo "$2"; case $2 in *_io | *_start) exit 1 ;; esac')
    for stamp in (".runtime", ".training", ".tests"):
        (environment / stamp).touch()
    status, out, err = make(tmp_path, "bench", f"VENV={environment}")
    scripts = sorted(path.stem for path in (CHECKOUT / "tests" / "benchmarks").glob("bench_*.py"))
    assert out.split() == [f"tests.benchmarks.{name}" for name in scripts]
    assert status == 2  # make's own for a command that failed
    assert err.splitlines()[0] == "failed: bench_io bench_start"


@pytest.mark.parametrize(
    ("image", "full"),
    [
        ("team:latest", "docker.io/library/team:latest"),
        ("te.am:1.0", "docker.io/library/te.am:1.0"),
        ("me/sammed3d:latest", "docker.io/me/sammed3d:latest"),
        ("me/more/a.b:1", "docker.io/me/more/a.b:1"),
        ("docker.io/me/x", "docker.io/me/x"),
        ("registry.example.org/me/x", "registry.example.org/me/x"),
        ("registry:5000/x", "registry:5000/x"),
        ("localhost/x", "localhost/x"),
    ],
)
def test_an_archive_holds_the_image_under_its_full_name(
    tmp_path: Path, image: str, full: str
) -> None:
    program(tmp_path / "programs" / "docker", 'echo "$@"')
    path = tmp_path / "team.tar.gz"
    status, out, err = make(tmp_path, "archive", f"IMAGE={image}", f"ARCHIVE={path}")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"tag {image} {full}"
    assert gzip.decompress(path.read_bytes()).decode() == f"save {full}\n"
    assert not path.with_name("team.tar.gz.part").exists()


def test_an_archive_that_cannot_be_saved_leaves_the_one_before(tmp_path: Path) -> None:
    program(tmp_path / "programs" / "docker", '[ "$1" = tag ] || { echo half; exit 1; }')
    path = tmp_path / "team.tar.gz"
    path.write_bytes(b"before")
    assert make(tmp_path, "archive", "IMAGE=team", f"ARCHIVE={path}")[0] == 2
    assert path.read_bytes() == b"before"
    assert not path.with_name("team.tar.gz.part").exists()


def test_an_export_that_is_stopped_leaves_nothing_half_written(tmp_path: Path) -> None:
    program(tmp_path / "programs" / "docker", '[ "$1" = tag ] || { echo half; exec sleep 60; }')
    part = tmp_path / "team.tar.gz.part"
    process = start_make(tmp_path, "archive", "IMAGE=team", f"ARCHIVE={tmp_path}/team.tar.gz")
    deadline = time.monotonic() + 30
    while not part.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not part.exists()
