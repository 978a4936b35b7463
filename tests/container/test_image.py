"""What is in the image, and that it runs: shut off, as another user, on anybody's folders."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.conftest import Start, check_results, inside

CHECKOUT = Path(__file__).resolve().parents[2]
#: As little as an engine can grant.
SHUT_OFF = ("--read-only", "--tmpfs", "/tmp", "-m", "8g", "--cap-drop", "ALL")
SHUT_OFF += ("--security-opt", "no-new-privileges")
STRANGER = 23456
#: The first user of most desktops, and so what `--user "$(id -u):$(id -g)"` passes there.
DESKTOP_USER = "1000:1000"
MOST_BYTES = 1_300_000_000
#: As the challenge starts it.
OFFICIAL = ("/bin/bash", "-c", "sh predict.sh")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")


@pytest.fixture
def foreign(inputs: Path, outputs: Path) -> Iterator[None]:
    """Folders of a stranger's, closed to everybody else."""
    for path in (*inputs.iterdir(), inputs, outputs):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.chown(path, STRANGER, STRANGER)
    yield
    for path in (inputs, outputs):
        os.chown(path, os.geteuid(), os.getegid())


def _git(*arguments: str) -> list[str] | None:
    """Lines that git says of the checkout; None where it is no repository."""
    command = ["git", "-c", "safe.directory=*", *arguments]
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, capture_output=True, encoding="utf-8", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()


def test_configuration(image: str) -> None:
    done = subprocess.run(
        ["docker", "image", "inspect", image], capture_output=True, encoding="utf-8", check=True
    )
    config = json.loads(done.stdout)[0]["Config"]
    assert config["User"] == "segmenter"
    assert config["WorkingDir"] == "/workspace"
    assert not config.get("Entrypoint")
    assert config["Cmd"] == ["sh", "predict.sh"]
    assert not config.get("Healthcheck") or config["Healthcheck"]["Test"] == ["NONE"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels["licenses"] == "Apache-2.0"
    assert {"title", "description", "source", "version"} <= set(labels)
    if _git("rev-parse", "HEAD") is not None:
        assert labels["version"] not in ("", "unknown")
        assert len(labels["revision"]) == 40


def test_only_what_runs_is_in_it(image: str) -> None:
    found = inside(image, "cd /workspace && find . -type f ! -name '*.pyc' | sort")
    tracked = _git("ls-files", "-co", "--exclude-standard")
    if tracked is None:
        pytest.skip("no repository here: what belongs to it is not known")
    ships = ("inference/", "weights/", "predict.sh", "requirements.txt")
    # Weights that were fetched belong to no repository, and yet they ship.
    fetched = (str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "weights").iterdir())
    expected = {f"./{name}" for name in (*tracked, *fetched) if name.startswith(ships)}
    assert set(found) <= expected
    assert not [name for name in found if "nifti" in name or "tiff" in name]
    assert {"./inference/predict.py", "./weights/default.safetensors"} <= set(found)


def test_nothing_that_only_builds_or_tests_packages_is_in_it(image: str) -> None:
    site = "$(python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')"
    assert inside(image, "ls -A /root/.cache /tmp 2>/dev/null | grep -v ':$' || true") == []
    unwanted = r"\( -name '*.a' -o -name '*.h' -o -path '*/tests/*' -o -path '*/torch/test/*' \)"
    assert inside(image, f"find {site} -type f {unwanted}") == []
    assert inside(image, f"ls {site} | grep -i -e simpleitk -e pytest -e matplotlib || true") == []


def test_a_cpu_image_is_small(image: str, cpu_only: None) -> None:
    command = ["docker", "image", "inspect", "--format", "{{.Size}}", image]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert int(done.stdout) <= MOST_BYTES


def test_bytecode_is_compiled(image: str) -> None:
    modules = inside(image, "find /workspace/inference -name '*.py'")
    compiled = inside(image, "find /workspace/inference -name '*.cpython-311.pyc'")
    assert len(compiled) == len(modules) > 20
    # Not compiled again at each start: Python takes the files that are there.
    script = (
        "python -v -c 'import inference.segmenter' 2>&1 | grep -c 'code object from .*/inf.*pyc'"
    )
    assert int(inside(image, f"cd /workspace && {script}")[0]) > 10


@pytest.mark.parametrize("user", [None, f"{STRANGER}:{STRANGER}"])
def test_shut_off_it_segments_every_kind_of_case(
    start: Start, inputs: Path, outputs: Path, user: str | None
) -> None:
    done = start(*SHUT_OFF, *(("--user", user) if user else ()))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1 + 3
    check_results(inputs, outputs)


def test_one_broken_case_stops_no_other(start: Start, inputs: Path, outputs: Path) -> None:
    broken = inputs / "CT_broken.npz"
    broken.write_bytes((inputs / "PET_no_boxes.npz").read_bytes()[:2000])
    broken.chmod(0o644)
    done = start(*SHUT_OFF, command=OFFICIAL)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: CT_broken.npz: received a file that is a damaged or truncated")
    check_results(inputs, outputs, missing=("CT_broken.npz",))


@needs_root
@pytest.mark.usefixtures("foreign")
def test_closed_folders_of_somebody_elses_are_opened(
    start: Start, inputs: Path, outputs: Path
) -> None:
    done = start("-m", "8g", command=OFFICIAL)
    assert (done.returncode, done.stderr) == (0, "")
    check_results(inputs, outputs)
    for result in outputs.iterdir():
        assert result.stat().st_uid not in (0, STRANGER)  # not root's work
        assert result.stat().st_mode & 0o444 == 0o444  # for whoever waits for it


@needs_root
@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize(
    "options",
    [("--user", f"{STRANGER + 1}"), ("--user", DESKTOP_USER), ("--cap-drop", "ALL")],
    ids=["user", "desktop user", "capability"],
)
def test_closed_folders_stay_closed_where_that_is_asked_for(
    start: Start, outputs: Path, options: tuple[str, ...]
) -> None:
    done = start(*options, command=OFFICIAL)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "Permission denied" in line
    assert not list(outputs.iterdir())


@needs_root
@pytest.mark.usefixtures("foreign")
def test_the_owner_of_closed_folders_can_be_the_user(
    start: Start, inputs: Path, outputs: Path
) -> None:
    done = start(*SHUT_OFF, "--user", f"{STRANGER}:{STRANGER}")
    assert (done.returncode, done.stderr) == (0, "")
    check_results(inputs, outputs)
    assert {result.stat().st_uid for result in outputs.iterdir()} == {STRANGER}


def test_options_and_overlay(start: Start, outputs: Path) -> None:
    command = ("sh", "predict.sh", "--shard", "1/3", "--overlay", "/workspace/outputs")
    done = start(*SHUT_OFF, command=command)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in outputs.iterdir()) == [
        "CT_TPTBox_lumbar.npz",
        "CT_TPTBox_lumbar.png",
    ]
