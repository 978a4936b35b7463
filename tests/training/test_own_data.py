"""The README's five commands, as they stand there, from NIfTIs to an image with new weights."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from inference.model.refiner import with_all_channels
from inference.model.weights import read_weights, sha256_of, split_prefix
from tests.conftest import CHECKOUT
from training.evaluation.results import read_csv

#: Appended for the test only: a run of seconds instead of half an hour.
SHORTER = {
    "training.train": "--max-steps 2 --set batch=2 tensorboard=false --device cpu --threads 1",
    "training.evaluation.evaluate": "--device cpu --no-report",
}

#: Stands in for the container engine: puts together what the Dockerfile copies.
DOCKER = """#!/bin/sh
test "$1" = build && test -f Dockerfile || exit 2
mkdir "$IMAGE_FOLDER"
sed -n 's/^COPY //p' Dockerfile | while read -r source target; do
    cp -R "$source" "$IMAGE_FOLDER/$target"
done
"""


def commands() -> list[str]:
    """The lines of the section's code block, continued lines joined."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Train on your own data\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return block.replace("\\\n", " ").splitlines()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the user's images and labels in it, and an interpreter in ``.venv``."""
    folder = tmp_path_factory.mktemp("clone") / "checkout"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("inference", "training"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=ignore)
    for name in ("Dockerfile", "Makefile", "predict.sh", "requirements.txt"):
        shutil.copy(CHECKOUT / name, folder / name)
    (folder / "weights").mkdir()
    for name in ("default.safetensors", "SHA256SUMS"):
        shutil.copy(CHECKOUT / "weights" / name, folder / "weights" / name)

    for name, content in {
        ".venv/bin/python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
        "stand-in/docker": DOCKER,
    }.items():
        script = folder / name
        script.parent.mkdir(parents=True)
        script.write_text(content, encoding="utf-8")
        script.chmod(0o755)

    rng = np.random.default_rng(0)
    z, y, x = np.indices((12, 28, 24))
    for i in range(3):
        organ = ((z - 6) / 4) ** 2 + ((y - 13 - i) / 8) ** 2 + ((x - 12) / 6) ** 2 < 1
        values = np.where(organ, 110, -40) + rng.normal(0, 20, organ.shape)
        image = sitk.GetImageFromArray(values.astype(np.int16))
        image.SetSpacing((0.8, 0.8, 2.5))
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # as NIfTI files mostly lie: RAS
        labels = sitk.GetImageFromArray(organ.astype(np.uint8))
        labels.CopyInformation(image)
        for kind, volume in (("images", image), ("labels", labels)):
            (folder / "my" / kind).mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(volume, str(folder / "my" / kind / f"patient{i}.nii.gz"))
    return folder


def run(clone: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{clone / 'stand-in'}:{os.environ['PATH']}",
        "IMAGE_FOLDER": str(clone.parent / "image"),
        "PYTHONPATH": "",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }
    return subprocess.run(
        words, cwd=clone, env=environment, capture_output=True, encoding="utf-8", check=False
    )


def test_five_commands_make_an_image_with_new_weights(clone: Path) -> None:
    lines = commands()
    assert len(lines) == 5
    before = sha256_of(clone / "weights" / "default.safetensors")
    for line in lines:
        words = shlex.split(line)
        shorter = next((more for name, more in SHORTER.items() if name in words), "")
        done = run(clone, [*words, *shorter.split()])
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

    cases = {part: sorted((clone / "my/data" / part).glob("*.npz")) for part in ("train", "val")}
    assert [len(paths) for paths in cases.values()] == [2, 1]
    with np.load(cases["val"][0]) as file:
        assert file["spacing"].tolist() == pytest.approx([0.8, 0.8, 2.5])

    shipped = clone.parent / "image" / "weights" / "default.safetensors"
    assert sha256_of(shipped) == sha256_of(clone / "weights" / "default.safetensors") != before
    tensors, metadata = read_weights(shipped)  # as SHA256SUMS, which is in the image, lists it
    assert '"steps": 2' in metadata["refiner_training"]
    held, _ = read_weights(CHECKOUT / "weights" / "default.safetensors")
    original = with_all_channels(split_prefix(held, "refiner."))
    others = {name for name in tensors if name.startswith("unboxed.")}
    assert {f"refiner.{name}" for name in original} == set(tensors) - others
    assert others and all(np.array_equal(tensors[name], held[name]) for name in others)
    tensors = split_prefix(tensors, "refiner.")
    assert any((tensors[name] != original[name]).any() for name in tensors), "it was trained"
    largest = max(float((tensors[n].float() - original[n].float()).abs().max()) for n in tensors)
    assert largest < 0.1, "and not from nothing"

    rows = read_csv(clone / "runs/mine/evaluation/segmenter_metrics.csv")
    assert [row["CaseName"] for row in rows] == [cases["val"][0].name]
    summary = "runs/mine/evaluation/summary.csv"
    card = ["-m", "training.model_card", "--weights", "default", "--figures", summary]
    done = run(clone, [".venv/bin/python", *card, "--card", "my/CARD.md"])
    assert done.returncode == 0, done.stderr
    assert f"{float(rows[0]['DSC_1']):.3f}" in (clone / "my/CARD.md").read_text(encoding="utf-8")

    # What the image holds segments the case that was held out, with the new weights.
    outputs = clone.parent / "outputs"
    image = clone.parent / "image"
    words = ["sh", str(image / "predict.sh"), "--inputs", str(clone / "my/data/val")]
    done = run(image, [*words, "--outputs", str(outputs), "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    with np.load(outputs / cases["val"][0].name) as file, np.load(cases["val"][0]) as truth:
        both = (file["segs"] > 0) & (truth["gts"] > 0)
        dice = 2 * both.sum() / ((file["segs"] > 0).sum() + (truth["gts"] > 0).sum())
    assert dice == pytest.approx(float(rows[0]["DSC_1"]), abs=1e-6)
    assert dice > 0.5


def test_make_setup_installs_what_training_needs() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "setup"],
        cwd=CHECKOUT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert "-r requirements.txt -r training/requirements.txt" in done.stdout
