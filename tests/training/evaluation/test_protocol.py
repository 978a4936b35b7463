"""The whole protocol against the literal restatement, round by round, prompts and scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from inference.case import modality_of
from inference.npz import NpzFile
from inference.object_prompts import stored_box
from tests.phantoms import challenge_case, objects, write_npz
from tests.training.evaluation import official_restatement as official
from tests.training.evaluation.obedient import by_files, obedient
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.perturbation import VARIANTS
from training.evaluation.predictors import InProcess, Prediction, PredictionError
from training.evaluation.protocol import CaseResult, official_row, run_case

OFFICIAL_COLUMNS = [
    "CaseName",
    "TotalRunningTime",
    *(f"RunningTime_{turn}" for turn in range(1, 7)),
    *("DSC_AUC", "NSD_AUC", "DSC_Final", "NSD_Final"),
    *(f"DSC_{turn}" for turn in range(1, 7)),
    *(f"NSD_{turn}" for turn in range(1, 7)),
    *("num_class", "runtime_upperbound"),
]

# Whether with boxes.
REAL = [
    ("val/PET_IBSI-STS_STS_032.npz", True),
    ("val/US_deepreg_prostate_case000020.npz", True),
    ("val/MR_deepreg_prostate_case000020.npz", False),
    ("val/Microscopy_BBBC050_test_Emb4_t351.npz", True),
    ("val/CT_OpenKBP_pt222.npz", True),
    ("train/MR_totalseg_example_mr.npz", False),
]


def assert_same_as_restatement(path: Path, folder: Path) -> CaseResult:
    expected, clicks, order = official.evaluate(path, folder, by_files)
    result, segs = run_case(load_labelled_case(path), InProcess(obedient))
    row = official_row(result)
    assert list(row) == OFFICIAL_COLUMNS
    for column, value in expected.items():
        assert row[column] == pytest.approx(value, abs=1e-12), column
    for shown, positions, kinds in zip(result.clicks, clicks, order, strict=True):
        for kind in ("fg", "bg"):
            assert [p for _, k, p in shown if k == kind] == [tuple(p) for p in positions[kind]]
        assert [k for _, k, _ in shown] == [k for k in kinds if k is not None]
    with NpzFile(folder / "outputs" / path.name) as file:
        assert (file["segs"] == segs).all()
    return result


@pytest.mark.parametrize("modality", ["CT", "MR", "PET", "US", "Microscopy"])
@pytest.mark.parametrize("boxes", [True, False])
def test_phantoms_agree_with_the_restatement(tmp_path, modality, boxes):
    arrays = challenge_case((14, 40, 36), 3, modality, boxes=boxes, spacing_xyz=(0.8, 1.2, 2.5))
    path = write_npz(tmp_path / f"{modality}_phantom.npz", arrays)
    result = assert_same_as_restatement(path, tmp_path / "run")
    assert result.has_boxes == boxes
    assert (result.rounds[0] is None) == (not boxes)


def test_many_classes_agree_with_the_restatement(tmp_path):
    path = write_npz(tmp_path / "CT_many.npz", challenge_case((24, 50, 50), 40))
    assert len(assert_same_as_restatement(path, tmp_path / "run").labels) == 40


@pytest.mark.parametrize(("name", "boxes"), REAL, ids=[name for name, _ in REAL])
def test_real_cases_agree_with_the_restatement(shared_data, tmp_path, name, boxes):
    path = shared_data / name
    if not boxes:
        with NpzFile(path) as file:
            arrays = {key: file[key] for key in file if key != "boxes"}
        path = write_npz(tmp_path / path.name, arrays)
    result = assert_same_as_restatement(path, tmp_path / "run")
    assert result.has_boxes == boxes


def test_a_real_case_of_many_classes_agrees_with_the_restatement(shared_data, tmp_path):
    """The middle of a CT with most of its 61 organs, renumbered; the restatement is slow."""
    with NpzFile(shared_data / "train" / "CT_TotalSegmentator_example.npz") as file:
        crop = (slice(10, 90), slice(25, 85), slice(25, 95))
        image, gts = file["imgs"][crop], file["gts"][crop]
        spacing = file["spacing"]
    found, numbers = np.unique(gts, return_inverse=True)
    assert len(found) > 30
    labels = numbers.reshape(gts.shape).astype(np.uint8)
    boxes = [stored_box(labels == label, (0, 0)) for label in range(1, len(found))]
    arrays = {"imgs": image, "gts": labels, "spacing": spacing, "boxes": objects(*boxes)}
    path = write_npz(tmp_path / "CT_organs.npz", arrays)
    assert len(assert_same_as_restatement(path, tmp_path / "run").labels) >= 30


def test_a_predictor_sees_what_the_files_hold(tmp_path):
    """Keys, dtypes and values of every round, from memory and from the restatement's files."""
    path = write_npz(tmp_path / "CT_seen.npz", challenge_case((10, 30, 30), 2))
    in_memory, in_files = [], []

    def watch(arrays, name):
        assert name == "CT_seen.npz"
        in_memory.append(dict(arrays))
        return InProcess(obedient)(arrays, name)

    def watch_files(inputs, outputs):
        with np.load(inputs / "CT_seen.npz", allow_pickle=True) as file:
            in_files.append({key: file[key] for key in file.files})
        by_files(inputs, outputs)

    run_case(load_labelled_case(path), watch)
    official.evaluate(path, tmp_path / "run", watch_files)
    assert len(in_memory) == len(in_files) == 6
    for memory, file in zip(in_memory, in_files, strict=True):
        assert memory.keys() == file.keys()
        for key, array in file.items():
            assert memory[key].dtype == array.dtype, key
            assert memory[key].shape == array.shape, key
            assert memory[key].tolist() == array.tolist(), key
    assert "gts" not in in_memory[0]


def test_a_perfect_class_gets_no_click_and_none_in_its_order(tmp_path):
    arrays = challenge_case((10, 30, 30), 2)
    path = write_npz(tmp_path / "CT_perfect.npz", arrays)
    seen = []

    def half_perfect(given, name):
        seen.append(given)
        segs = arrays["gts"].copy()
        segs[:, :, :2] = 2  # wrong for class 2 alone
        return Prediction(segs, 0.0, None)

    result, _ = run_case(load_labelled_case(path), half_perfect)
    assert seen[-1]["clicks_order"].tolist() == [[None] * 5, ["bg"] * 5]
    assert [len(shown) for shown in result.clicks] == [0, 5]
    assert result.class_scores("dsc", 0) == [1.0] * 6


def test_a_failure_leaves_the_last_prediction_in_force(tmp_path):
    arrays = challenge_case((10, 30, 30), 1)
    path = write_npz(tmp_path / "CT_failing.npz", arrays)
    calls = []

    def fails_later(given, name):
        calls.append(name)
        if len(calls) != 2:
            raise PredictionError("no luck", 2.0)
        return Prediction(arrays["gts"], 1.0, None)

    result, segs = run_case(load_labelled_case(path), fails_later)
    assert result.case_scores("dsc") == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [held.error for held in result.rounds] == ["no luck", None, *["no luck"] * 4]
    assert (segs == arrays["gts"]).all()
    assert result.seconds == 1 + 5 * 2


def test_json_gives_the_result_back_exactly(tmp_path):
    path = write_npz(tmp_path / "CT_json.npz", challenge_case((10, 30, 30), 2, boxes=False))
    result, _ = run_case(load_labelled_case(path), InProcess(obedient))
    assert CaseResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize("labels", [(1, 3), (2, 300)])
def test_classes_are_numbered_by_the_boxes_whatever_the_labels(tmp_path, labels):
    arrays = challenge_case((10, 30, 30), 2)
    expected, _ = run_case(
        load_labelled_case(write_npz(tmp_path / "CT_a.npz", arrays)), InProcess(obedient)
    )
    arrays["gts"] = np.array([0, *labels], np.uint16)[arrays["gts"]]
    path = write_npz(tmp_path / "CT_a.npz", arrays)
    entry = {"file": path.name, "structures": {str(labels[1]): "liver"}}
    (tmp_path / "manifest.json").write_text(json.dumps([entry]))
    case = load_labelled_case(path)
    assert case.structures == ("", "liver")
    found, _ = run_case(case, InProcess(obedient))
    assert found.case_scores("dsc") == expected.case_scores("dsc")
    assert (found.labels, found.voxels) == ((1, 2), expected.voxels)


def test_time_is_summed_and_limited_by_class(tmp_path):
    path = write_npz(tmp_path / "CT_slow.npz", challenge_case((10, 30, 30), 2))

    def slow(given, name):
        return Prediction(np.zeros((10, 30, 30), np.uint8), 31.0, None)

    row = official_row(run_case(load_labelled_case(path), slow)[0])
    assert row["TotalRunningTime"] == 6 * 31
    assert row["runtime_upperbound"] == 180


def test_references_from_another_folder(tmp_path):
    arrays = challenge_case((10, 30, 30), 2)
    gts = arrays.pop("gts")
    path = write_npz(tmp_path / "CT_apart.npz", arrays)
    with pytest.raises(ValueError, match="no gts"):
        load_labelled_case(path)
    (tmp_path / "references").mkdir()
    write_npz(tmp_path / "references" / "CT_apart.npz", {"gts": gts})
    case = load_labelled_case(path, tmp_path / "references")
    assert (case.reference.voxels == gts).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gts": np.zeros((10, 30, 30), np.uint8)}, "no labelled voxel"),
        ({"gts": np.ones((10, 30, 31), np.uint8)}, "gts of shape"),
        ({"gts": np.arange(9000).reshape(10, 30, 30) % 257}, "256 labels; accepted: at most 255"),
        ({"boxes": np.array([{}], object)}, r"boxes of shape \(1,\), 2 classes"),
        ({"spacing": np.zeros(3)}, "three positive numbers"),
    ],
)
def test_cases_that_cannot_be_scored(tmp_path, changes, message):
    path = write_npz(tmp_path / "CT_bad.npz", challenge_case((10, 30, 30), 2) | changes)
    with pytest.raises(ValueError, match=message):
        load_labelled_case(path)


def test_structures_come_from_the_manifest(tmp_path):
    path = write_npz(tmp_path / "MRI_named.npz", challenge_case((10, 30, 30), 2))
    entry = {"file": path.name, "structures": {"1": "liver"}}
    (tmp_path / "manifest.json").write_text(json.dumps([entry]))
    assert load_labelled_case(path).structures == ("liver", "")
    assert modality_of(path.name) == "MR"


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_prompts(tmp_path, name):
    arrays = challenge_case((10, 30, 30), 2, padding=(2, 2))
    path = write_npz(tmp_path / "CT_sloppy.npz", arrays)
    case = load_labelled_case(path)
    variant = VARIANTS[name]
    seen = []

    def watch(given, file_name):
        seen.append(given)
        return InProcess(obedient)(given, file_name)

    result, _ = run_case(case, watch, variant)
    exact, _ = run_case(case, InProcess(obedient))
    assert len(result.rounds) == 6
    assert len(seen) == variant.click_rounds + variant.with_boxes
    assert all(("boxes" in given) == variant.with_boxes for given in seen)
    if name == "exact":
        assert result.clicks == exact.clicks
    for given in seen[: variant.with_boxes]:
        for drawn, true in zip(given["boxes"], arrays["boxes"], strict=True):
            assert drawn["z_min"] <= drawn["z_mid"] <= drawn["z_max"]
            for key, value in true.items():
                edge = {"z": 10, "x": 30, "y": 30}[key.removeprefix("z_mid_")[0]]
                assert 0 <= drawn[key] < edge
                if variant.box_jitter == 0:
                    assert drawn[key] == value
                elif key != "z_mid":
                    assert abs(drawn[key] - value) <= variant.box_jitter * edge + 1
    if variant.click_shift:
        first = run_case(case, InProcess(obedient), VARIANTS["exact"])[0].clicks[0][0][2]
        moved = result.clicks[0][0][2]
        assert max(abs(a - b) for a, b in zip(first, moved, strict=True)) <= variant.click_shift
        assert any(a != b for a, b in zip(result.clicks, exact.clicks, strict=True))
    assert run_case(case, InProcess(obedient), variant)[0].clicks == result.clicks


def test_a_round_that_is_carried_on_fails_no_second_time(tmp_path):
    case = load_labelled_case(write_npz(tmp_path / "CT_a.npz", challenge_case((10, 30, 30), 2)))

    def fail_at_the_click(given, name):
        if "clicks" in given:
            raise PredictionError("out of luck", 2.0)
        return InProcess(obedient)(given, name)

    result, _ = run_case(case, fail_at_the_click, VARIANTS["one-click"])
    assert [held.error for held in result.rounds] == [None, "out of luck", *[None] * 4]
    assert [held.seconds for held in result.rounds[2:]] == [0.0] * 4
    assert all(held.dsc == result.rounds[0].dsc for held in result.rounds)


def test_what_a_file_knows_of_later_rounds_is_not_told(tmp_path):
    arrays = challenge_case((10, 30, 30), 2)
    given = challenge_case((10, 30, 30), 2, clicks=1)
    arrays |= {key: given[key] for key in ("clicks", "clicks_order")}
    arrays["prev_pred"] = arrays["gts"]
    case = load_labelled_case(write_npz(tmp_path / "CT_a.npz", arrays))
    seen = []

    def watch(given, name):
        seen.append(set(given))
        return InProcess(obedient)(given, name)

    run_case(case, watch)
    assert seen[0] == {"imgs", "spacing", "boxes"}


def test_restatement_reads_stale_outputs(tmp_path):
    """What our rule for failures stands for: the evaluator never clears its outputs."""
    path = write_npz(tmp_path / "CT_stale.npz", challenge_case((10, 30, 30), 1))
    calls = []

    def once(inputs, outputs):
        calls.append(1)
        if len(calls) == 2:
            by_files(inputs, outputs)

    expected, _, _ = official.evaluate(path, tmp_path / "run", once)
    shutil.rmtree(tmp_path / "run")
    calls.clear()

    def once_in_memory(given, name):
        calls.append(1)
        if len(calls) == 2:
            return InProcess(obedient)(given, name)
        raise PredictionError("silence")

    row = official_row(run_case(load_labelled_case(path), once_in_memory)[0])
    assert {column: row[column] for column in expected} == pytest.approx(expected, abs=1e-12)
