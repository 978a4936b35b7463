"""The archive that is handed in: what it is called, that it is whole, that it loads and runs."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import IO

import pytest

from tests.container.conftest import check_results, run_image

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[2]
MOST_BYTES = 450_000_000


@pytest.fixture(scope="module")
def archive(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "team.tar.gz"
    command = ["make", "--no-print-directory", "archive", f"IMAGE={image}", f"ARCHIVE={path}"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{digest}  {path}" in done.stdout.splitlines()
    assert f"{path.stat().st_size / 1e6:.0f} MB" in done.stdout
    recorded = path.with_name("team.tar.gz.sha256").read_text(encoding="utf-8")
    assert recorded == f"{digest}  team.tar.gz\n"
    return path


def test_the_archive_is_what_the_challenge_will_load(image: str, archive: Path) -> None:
    capability = None
    with gzip.open(archive) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            # Engines link what an image has twice, such as its name's and its layers' files.
            held = tar.extractfile(member) if member.isreg() else None
            if member.name == "manifest.json":
                assert held is not None
                (manifest,) = json.load(held)
            elif held is not None and tarfile.BLOCKSIZE < member.size < 1 << 20:
                capability = capability or _capability_in(held)
    (tag,) = manifest["RepoTags"]
    assert tag in (image, f"docker.io/{image}", f"docker.io/library/{image}")
    assert capability  # what opens folders of somebody else's travels with the file


def _capability_in(layer: IO[bytes]) -> str | None:
    """The capability of the helper in a small layer, or None where this is not its layer."""
    try:
        with tarfile.open(fileobj=layer, mode="r|") as tar:
            for member in tar:
                if member.name.endswith("bin/open-mounts"):
                    return member.pax_headers["SCHILY.xattr.security.capability"]
    except tarfile.ReadError:  # no layer
        pass
    return None


def test_the_archive_loads_and_runs(archive: Path, inputs: Path, outputs: Path) -> None:
    pipe = subprocess.PIPE
    with (
        gzip.open(archive) as file,
        subprocess.Popen(["docker", "load"], stdin=pipe, stdout=pipe) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        shutil.copyfileobj(file, process.stdin, 1 << 22)
        process.stdin.close()
        output = process.stdout.read().decode()
    assert process.returncode == 0
    loaded = output.split()[-1]  # Loaded image: NAME
    done = run_image(loaded, inputs, outputs, "--read-only", "--tmpfs", "/tmp")
    assert (done.returncode, done.stderr) == (0, "")
    check_results(inputs, outputs)


def test_a_cpu_archive_is_small(archive: Path, cpu_only: None) -> None:
    assert archive.stat().st_size <= MOST_BYTES
