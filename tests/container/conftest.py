"""The image under test, and how to start it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from tests.phantoms import challenge_case, write_npz

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "CT_TPTBox_lumbar.npz"


class Start(Protocol):
    """Starts a container and waits for its end."""

    def __call__(
        self, *options: str, command: tuple[str, ...] = ...
    ) -> subprocess.CompletedProcess[str]:
        """Start it with further options of ``docker run``, and a command or the image's own."""


@pytest.fixture(scope="session")
def image() -> str:
    name = os.environ.get("IMAGE")
    if not name:
        pytest.skip("no image named in IMAGE: `make image-test` builds one and tests it")
    if shutil.which("docker") is None:
        pytest.fail(f"IMAGE={name}, but there is no docker here")
    return name


def inside(image: str, script: str) -> list[str]:
    """Lines that a shell script prints in the image, as root."""
    command = ["docker", "run", "--rm", "--network", "none", "--user", "0", image, "sh", "-c"]
    done = subprocess.run([*command, script], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="session")
def cpu_only(image: str) -> None:
    """Skips where the image's torch is for CUDA as well."""
    cuda = inside(image, "python -c 'import torch; print(torch.version.cuda)'")
    if cuda != ["None"]:
        pytest.skip(f"the image's torch is for CUDA {cuda[0]}: limits are for `TORCH=cpu`")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """The sample case, one without boxes and one later round, for anybody to read."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    shutil.copy(SAMPLE, folder)
    shape = (16, 40, 36)
    cases = {
        "PET_no_boxes.npz": challenge_case(shape, 2, "PET", boxes=False, clicks=1, gts=False),
        "MR_round_3.npz": challenge_case(shape, 2, "MR", clicks=3, previous=True, gts=False),
    }
    for name, case in cases.items():
        write_npz(folder / name, case)
    for path in (folder, *folder.iterdir()):  # whatever the umask
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """An empty folder that anybody may write."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def run_image(
    image: str, inputs: Path, outputs: Path, *options: str, command: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Start an image on two folders, with further options of ``docker run``."""
    mounts = ("-v", f"{inputs}:/workspace/inputs:ro", "-v", f"{outputs}:/workspace/outputs")
    return subprocess.run(
        ["docker", "run", "--rm", "--network", "none", *mounts, *options, image, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture
def start(image: str, inputs: Path, outputs: Path) -> Start:
    return functools.partial(run_image, image, inputs, outputs)


def check_results(inputs: Path, outputs: Path, missing: tuple[str, ...] = ()) -> None:
    """Every case has its label map: its shape, uint8, every class found."""
    expected = sorted(path.name for path in inputs.iterdir() if path.name not in missing)
    assert sorted(path.name for path in outputs.iterdir()) == expected
    for name in expected:
        with np.load(inputs / name, allow_pickle=True) as case, np.load(outputs / name) as result:
            assert result.files == ["segs"]
            labels = result["segs"]
            classes = len(case["boxes"] if "boxes" in case.files else case["clicks"])
            assert labels.shape == case["imgs"].shape
            assert labels.dtype == np.uint8
            assert set(np.unique(labels)) == set(range(classes + 1)), name
