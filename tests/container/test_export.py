"""The archive that is handed in: what it is called, that it is whole, that it loads and runs."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.container.conftest import Start, check_results

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[2]
MOST_BYTES = 450_000_000


@pytest.fixture(scope="module")
def archive(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "team.tar.gz"
    command = ["make", "--no-print-directory", "archive", f"IMAGE={image}", f"ARCHIVE={path}"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{digest}  {path}" in done.stdout.splitlines()
    assert f"{path.stat().st_size / 1e6:.0f} MB" in done.stdout
    recorded = path.with_name("team.tar.gz.sha256").read_text(encoding="utf-8")
    assert recorded == f"{digest}  team.tar.gz\n"
    return path


def test_the_archive_names_the_image_as_the_challenge_will(image: str, archive: Path) -> None:
    with gzip.open(archive) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            if member.name == "manifest.json":
                held = tar.extractfile(member)
                assert held is not None
                (manifest,) = json.load(held)
    (tag,) = manifest["RepoTags"]
    assert tag.removeprefix("docker.io/library/") == image


def test_the_archive_loads_and_runs(
    archive: Path, start: Start, inputs: Path, outputs: Path
) -> None:
    with gzip.open(archive) as file:
        process = subprocess.Popen(["docker", "load"], stdin=subprocess.PIPE)
        assert process.stdin is not None
        while chunk := file.read(1 << 22):
            process.stdin.write(chunk)
        process.stdin.close()
        assert process.wait() == 0
    done = start("--read-only", "--tmpfs", "/tmp")
    assert (done.returncode, done.stderr) == (0, "")
    check_results(inputs, outputs)


def test_a_cpu_archive_is_small(archive: Path, cpu_only: None) -> None:
    assert archive.stat().st_size <= MOST_BYTES
