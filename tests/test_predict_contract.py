"""``sh predict.sh`` as the challenge runs it, with the default weights, on every kind of input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from inference.model.weights import WEIGHTS_DIR
from inference.predict import make_parser
from tests.phantoms import challenge_case, write_npz

CHECKOUT = Path(__file__).resolve().parents[1]
NOBODY = 65534

Arrays = dict[str, np.ndarray]


def without(case: Arrays, *keys: str) -> Arrays:
    return {key: value for key, value in case.items() if key not in keys}


def uneven_order(case: Arrays) -> Arrays:
    """Class 1 was perfect after its first click: None, and fewer clicks than class 2."""
    first = case["clicks"][0]
    clicks = np.array([{"fg": first["fg"][:1], "bg": []}, case["clicks"][1]], dtype=object)
    order = np.empty(2, object)
    order[:] = [None, ["fg", "bg", "fg"]]
    return case | {"clicks": clicks, "clicks_order": order}


def ragged_order(case: Arrays) -> Arrays:
    order = np.empty(2, object)
    order[:] = [["fg", "bg", "fg"], ["fg", "bg", "fg"]]
    return case | {"clicks_order": order}


def zeros_before(case: Arrays) -> Arrays:
    return case | {"prev_pred": np.zeros_like(case["imgs"])}


def typed(dtype: type) -> Callable[[Arrays], Arrays]:
    return lambda case: case | {"imgs": case["imgs"].astype(dtype)}


# Name -> how challenge_case is asked, and what is done to its arrays afterwards.
VARIANTS: dict[str, tuple[dict[str, object], Callable[[Arrays], Arrays] | None]] = {
    "CT_round0": ({}, None),
    "MR_round1_boxes": ({"clicks": 1, "previous": True}, None),
    "PET_round5_boxes": ({"clicks": 5, "previous": True}, None),
    "MRI_round1_no_boxes": ({"clicks": 1, "boxes": False}, zeros_before),
    "US_round3_no_boxes": ({"clicks": 3, "boxes": False, "previous": True}, None),
    "Ultrasound_no_previous": ({"clicks": 2, "boxes": False}, None),
    "CT_no_order": ({"clicks": 3, "order": False, "previous": True}, None),
    "CT_order_none": ({"clicks": 3, "previous": True}, uneven_order),
    "CT_order_objects": ({"clicks": 3, "previous": True}, ragged_order),
    "CT_no_gts": ({"gts": False}, None),
    "CT_padded_box": ({"padding": (2, 2)}, None),
    "CT_float32": ({}, typed(np.float32)),
    "CT_float64": ({}, typed(np.float64)),
    "CT_int16": ({}, typed(np.int16)),
    "CT_uint16": ({}, typed(np.uint16)),
    "CT_no_spacing": ({}, lambda case: without(case, "spacing")),
    "Microscopy_20_classes": ({"n_classes": 20, "shape": (24, 60, 60), "clicks": 1}, None),
    "Microscopy_long": ({"shape": (9, 150, 12), "clicks": 2, "previous": True}, None),
    "MR_flat": ({"shape": (2, 40, 30), "n_classes": 1, "spacing_xyz": (0.5, 0.5, 9.0)}, None),
}


def make_case(name: str) -> Arrays:
    asked, change = VARIANTS[name]
    modality = {"MRI": "MR", "Ultrasound": "US"}.get(name.split("_")[0], name.split("_")[0])
    case = challenge_case(modality=modality, **asked)  # type: ignore[arg-type]
    return change(case) if change else case


def without_privileges() -> list[str]:
    """What goes before a command so that permissions bind it even where the tests run as root."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("runs as root, and there is no setpriv to take its privileges away")
    return [setpriv, "--bounding-set=-all", "--inh-caps=-all"]


def predict_sh(*arguments: object, cwd: Path, command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command, "sh", CHECKOUT / "predict.sh", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        encoding="utf-8",
    )


@dataclass(frozen=True)
class Run:
    done: subprocess.CompletedProcess
    outputs: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """One run over all variants: read-only inputs, outputs of another user, a foreign folder."""
    if not (WEIGHTS_DIR / "default.safetensors").is_file():
        pytest.skip(f"no default weights in {WEIGHTS_DIR}")
    command = without_privileges()
    folder = tmp_path_factory.mktemp("contract")
    inputs, outputs = folder / "inputs", folder / "outputs"
    inputs.mkdir()
    outputs.mkdir()
    for name in VARIANTS:
        write_npz(inputs / f"{name}.npz", make_case(name)).chmod(0o444)
    # A file the caller happens to have must not be taken for one of ours.
    (folder / "inference.py").write_text("raise SystemExit('the wrong module was imported')")
    inputs.chmod(0o555)
    outputs.chmod(0o777)
    if os.geteuid() == 0:
        os.chown(outputs, NOBODY, NOBODY)
    arguments = ("--inputs", "inputs", "--outputs", "outputs", "--device", "cpu")
    done = predict_sh(*arguments, cwd=folder, command=command)
    inputs.chmod(0o755)
    return Run(done, outputs)


def test_every_variant_is_segmented_in_silence(run: Run):
    assert run.done.stderr == ""
    assert run.done.returncode == 0
    assert sorted(path.name for path in run.outputs.iterdir()) == [
        f"{name}.npz" for name in sorted(VARIANTS)
    ]
    lines = run.done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"{n}.npz" for n in sorted(VARIANTS)]
    assert lines[-1].startswith(f"{len(VARIANTS)} of {len(VARIANTS)} cases in ")


@pytest.mark.parametrize("name", VARIANTS)
def test_output_answers_the_input(run: Run, name: str):
    case = make_case(name)
    path = run.outputs / f"{name}.npz"
    assert path.stat().st_mode & 0o444 == 0o444, "whoever mounted the folder can read it"
    with np.load(path) as file:
        assert file.files == ["segs"]
        segs = file["segs"]
    assert segs.dtype == np.uint8
    assert segs.shape == case["imgs"].shape
    prompts = case["boxes"] if "boxes" in case else case["clicks"]
    found = np.unique(segs)
    assert set(found) <= set(range(len(prompts) + 1))
    assert len(found) > 1, "something was segmented"
    for label, sides in enumerate(case.get("clicks", ()), start=1):
        for z, y, x in sides["fg"]:
            assert segs[z, y, x] == label
        for z, y, x in sides["bg"]:
            assert segs[z, y, x] != label


def test_bright_ellipsoids_in_boxes_are_found(run: Run):
    truth = make_case("CT_round0")["gts"]
    with np.load(run.outputs / "CT_round0.npz") as file:
        segs = file["segs"]
    for label in (1, 2):
        ours, theirs = segs == label, truth == label
        assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.7


def test_rules_and_probabilities(tmp_path: Path):
    """Post-processing by the table that ships, with all that may be saved, on real logits."""
    names = ("PET_round5_boxes", "US_round3_no_boxes")
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        write_npz(tmp_path / "in" / f"{name}.npz", make_case(name))
    folders = ("--inputs", tmp_path / "in", "--outputs", tmp_path / "out", "--device", "cpu")
    options = ("--postprocess", "auto", "--label-priority", "--save-probabilities")
    done = predict_sh(*folders, *options, cwd=tmp_path, command=[])
    assert (done.returncode, done.stderr) == (0, "")
    for name in names:
        case = make_case(name)
        with np.load(tmp_path / "out" / f"{name}.npz") as file:
            arrays = dict(file)
        segs, regions = arrays["segs"], arrays["regions"]
        assert regions[:, 0].tolist() == [1, 2]
        together = np.zeros(segs.shape, int)
        for label, sides in enumerate(case["clicks"], start=1):
            low, high = regions[label - 1, 1:4], regions[label - 1, 4:7]
            size = tuple(high - low)
            assert (low >= 0).all() and (high <= segs.shape).all()
            probability, outline = arrays[f"probability_{label}"], arrays[f"outline_{label}"]
            assert probability.shape == outline.shape == size
            assert outline.any()
            together[tuple(map(slice, low, high))] += probability
            assert set(map(tuple, np.argwhere(segs == label))) <= {
                tuple(low + offset) for offset in np.ndindex(size)
            }
            for kind, certain in (("fg", 255), ("bg", 0)):
                for click in sides[kind]:
                    assert (segs[tuple(click)] == label) == (kind == "fg")
                    if (click >= low).all() and (click < high).all():
                        assert probability[tuple(click - low)] == certain
        assert 128 <= together.max() <= 256, "a voxel is of one class or of none; 1 for rounding"


def test_outputs_that_cannot_be_written(tmp_path: Path):
    command = without_privileges()
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    inputs.mkdir()
    write_npz(inputs / "CT_a.npz", challenge_case())
    outputs.mkdir()
    outputs.chmod(0o555)
    folders = ("--inputs", inputs, "--outputs", outputs)
    done = predict_sh(*folders, cwd=tmp_path, command=command)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: cannot write to {outputs}: Permission denied\n"


def test_folders_default_to_those_the_challenge_mounts():
    options = make_parser().parse_args([])
    assert options.inputs == Path("/workspace/inputs")
    assert options.outputs == Path("/workspace/outputs")
