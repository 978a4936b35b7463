"""Choices of cases: deterministic, fair or diverse, explained, and readable by training."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from inference.model.sam_med3d import SamMed3D
from inference.model.weights import save_weights
from tests.phantoms import challenge_case, write_npz
from tests.training.test_initial_weights import SAM, noisy
from training.case_statistics import (
    FEATURES,
    DescribedCase,
    DescribedObject,
    describe_folder,
    statistics,
)
from training.coreset import (
    CasePool,
    Coverage,
    choose_diverse,
    choose_random,
    main,
    read_case_list,
)
from training.coverage import ROWS, coverage_table, measure


def described(name: str, *features: tuple[float, ...], voxels: int = 100) -> DescribedCase:
    objects = (
        DescribedObject(i, f"thing {i}", voxels, np.array(values, float))
        for i, values in enumerate(features, start=1)
    )
    return DescribedCase(name, tuple(objects))


@pytest.fixture
def clusters() -> CasePool:
    """Three places in CT, two in MR; forty cases crowd at one of them."""
    rng = np.random.default_rng(0)
    cases = []
    for i in range(40):
        x, y = rng.normal(0, 0.05, 2)
        cases.append(described(f"CT_crowd_{i:02}", (x, y)))
    for i in range(2):
        cases.append(described(f"CT_far_{i}", (5 + 0.1 * i, 0)))
        cases.append(described(f"CT_high_{i}", (0, 5 + 0.1 * i)))
        cases.append(described(f"MR_crowd_{i}", (0, 0.1 * i)))
        cases.append(described(f"MR_far_{i}", (5, 0.1 * i)))
    return CasePool(cases)


def test_diverse_takes_one_of_each_before_two_of_any(clusters: CasePool) -> None:
    chosen = [choice.name for choice in choose_diverse(clusters, 5, 0)]
    assert sorted("_".join(name.split("_")[:2]) for name in chosen) == [
        "CT_crowd",
        "CT_far",
        "CT_high",
        "MR_crowd",
        "MR_far",
    ]
    assert [c.name for c in choose_diverse(clusters, 3, 0)] == chosen[:3], "greedy: one by one"
    assert [c.name for c in choose_diverse(clusters, 48, 0)][:5] == chosen
    assert len({c.name for c in choose_diverse(clusters, 48, 0)}) == 48


def test_the_lazy_choice_is_the_greedy_one() -> None:
    """Against all gains worked out anew for every choice, and against the best possible pair."""
    rng = np.random.default_rng(1)
    cases = [
        described(f"{m}_d{i % 3}_{i:02}", *rng.normal(size=(rng.integers(1, 4), 4)))
        for m, i in itertools.product(("CT", "PET"), range(9))
    ]
    pool = CasePool(cases)
    coverage = Coverage(pool)
    best, expected, value = np.zeros(len(coverage.clients)), [], 0.0
    for _ in range(6):
        gains = [coverage.gain(i, best) for i in range(len(cases))]
        i = int(np.argmax(gains))
        expected.append(pool.cases[i].name)
        best = np.maximum(best, coverage.similarity(i))
        assert coverage.value(best) == pytest.approx(value + gains[i])
        value = coverage.value(best)
    assert [choice.name for choice in choose_diverse(pool, 6, 0)] == expected
    pairs = itertools.combinations(range(len(cases)), 2)
    similar = [coverage.similarity(i) for i in range(len(cases))]
    most = max(coverage.value(np.maximum(similar[i], similar[j])) for i, j in pairs)
    two = [int(np.flatnonzero([c.name == name for c in pool.cases])[0]) for name in expected[:2]]
    greedy = coverage.value(np.maximum(similar[two[0]], similar[two[1]]))
    assert greedy >= (1 - 1 / np.e) * most, "Nemhauser et al. 1978"


def test_modalities_do_not_stand_for_each_other(clusters: CasePool) -> None:
    coverage = Coverage(clusters)
    similarity = coverage.similarity(0)
    ct = clusters.modality[coverage.clients] == "CT"
    assert (similarity[~ct] == 0).all() and (similarity[ct] > 0).all()
    assert similarity.max() == pytest.approx(1)


def test_random_is_fair_and_keeps_the_strata_s_shares() -> None:
    cases = [described(f"CT_a_{i:02}", (0.0,)) for i in range(20)]
    cases += [described(f"MR_b_{i:02}", (0.0,)) for i in range(10)]
    cases += [described(f"US_c_{i:02}", (0.0,)) for i in range(3)]
    pool = CasePool(cases)
    counts = dict.fromkeys((case.name for case in cases), 0)
    draws = 600
    for seed in range(draws):
        names = [choice.name for choice in choose_random(pool, 11, seed)]
        assert len(set(names)) == 11
        for prefix, exact in (("CT", 20 / 3), ("MR", 10 / 3), ("US", 1)):
            assert abs(sum(name.startswith(prefix) for name in names) - exact) < 1
        for name in names:
            counts[name] += 1
    # Each is in a third of the draws; six standard deviations of a fair draw.
    spread = 6 * np.sqrt(draws * 1 / 3 * 2 / 3)
    assert all(abs(count - draws / 3) < spread for count in counts.values())
    first, again, other = (choose_random(pool, 11, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_sizes_are_thirds_of_the_modality() -> None:
    cases = [described(f"CT_a_{i}", (0.0,), voxels=10 * (i + 1)) for i in range(9)]
    cases += [described(f"MR_a_{i}", (0.0,), voxels=10_000 * (i + 1)) for i in range(3)]
    strata = CasePool(cases).strata()
    assert [s.split()[-1] for s in strata] == [
        *["small"] * 3,
        *["medium"] * 3,
        *["large"] * 3,
        "small",
        "medium",
        "large",
    ]


def test_statistics_of_a_known_object() -> None:
    """A brick of 4 x 6 x 8 voxels of (3, 2, 1) mm: 12 x 12 x 8 mm."""
    labels = np.zeros((20, 20, 20), np.int32)
    labels[5:9, 6:12, 7:15] = 4
    image = np.where(labels == 4, 200, 40).astype(np.uint8)
    (place,) = [p for p in ndimage.find_objects(labels) if p]
    found = dict(
        zip(FEATURES, statistics(image, labels, 4, place, (3.0, 2.0, 1.0)).tolist(), strict=True)
    )
    assert found["log voxels"] == pytest.approx(np.log(192))
    assert found["log share of the volume"] == pytest.approx(np.log(192 / 8000))
    assert found["share of its bounding box"] == 1
    assert found["log elongation"] == pytest.approx(0)
    assert found["log flatness"] == pytest.approx(np.log(12 / 8))
    faces = 2 * (4 * 6 + 6 * 8 + 4 * 8)
    assert found["log surface of a unit volume"] == pytest.approx(np.log(faces / 192 ** (2 / 3)))
    assert found["log ratio of spacings"] == pytest.approx(np.log(3))
    assert (found["mean intensity"], found["mean intensity around"]) == (200, 40)
    assert (found["spread of intensities"], found["spread around"]) == (0, 0)
    assert found["overlap of the histograms"] == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve phantoms of two modalities, with names of structures."""
    path = tmp_path_factory.mktemp("cases")
    entries = []
    for i in range(12):
        modality = ("CT", "MR")[i % 2]
        name = f"{modality}_site{i % 3}_{i:02}.npz"
        shape = (6 + i % 3, 16 + i, 14)
        write_npz(path / name, challenge_case(shape, 1 + i % 3, modality, seed=i))
        entries.append({"file": name, "structures": {"1": f"organ {i % 4}"}})
    (path / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("method", ["diverse", "random"])
def test_the_command_writes_a_list_that_training_reads(
    tmp_path: Path, folder: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "list.json"
    words = ["--data", folder, "--out", out, "--cases", 4, "--method", method, "--seed", 3]
    assert run(*words) == 0
    names = read_case_list(out)
    assert len(names) == 4 and all((folder / f"{name}.npz").is_file() for name in names)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert (content["case_list"], content["method"], content["seed"]) == (1, method, 3)
    assert content["pool"]["cases"] == 12 and content["told_apart_by"] == "statistics"
    for case in content["cases"]:
        modality, dataset, size = case["stratum"].split()
        assert case["name"].startswith(f"{modality}_{dataset}_")
        assert size in ("small", "medium", "large") and len(case["reason"]) > 20
    table = capsys.readouterr().out
    assert f"| {method} |" in table and all(f"| {row} |" in table for row in ROWS)

    first = out.read_bytes()
    assert run(*words, "--jobs", 1 + (method == "diverse")) == 0
    assert out.read_bytes() == first
    assert run("--data", folder, "--out", out, "--share", 0.26) == 0
    assert len(read_case_list(out)) == 3


def test_the_table_counts_what_is_there(folder: Path) -> None:
    pool = CasePool(describe_folder(folder))
    every = [case.name for case in pool.cases]
    figures = dict(zip(ROWS, measure(pool, Coverage(pool), every), strict=True))
    assert figures["cases"] == 12 and figures["objects"] == 4 * (1 + 2 + 3)
    assert (figures["modalities"], figures["datasets"], figures["named structures"]) == (2, 6, 4)
    assert figures["coverage, 0..1"] == pytest.approx(1, abs=1e-6)
    assert figures["distance to the nearest, mean"] == pytest.approx(0, abs=1e-5)
    some = dict(zip(ROWS, measure(pool, Coverage(pool), every[:1]), strict=True))
    assert (some["cases"], some["modalities"], some["datasets"]) == (1, 1, 1)
    table = coverage_table(pool, {"mine": every[:5]}, draws=5)
    assert table.splitlines()[0].endswith("| most objects | mine |")
    assert len(table.splitlines()) == 2 + len(ROWS)


def test_embeddings_tell_objects_apart_too(tmp_path: Path, folder: Path) -> None:
    save_weights(
        tmp_path / "sam.safetensors", noisy(SamMed3D(SAM)).state_dict(), {"sam": SAM.to_json()}
    )
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(folder.glob("*.npz"))[:4]:
        shutil.copy(path, few)
    cases = describe_folder(few, embeddings=tmp_path / "sam.safetensors")
    features = np.array([o.features for case in cases for o in case.objects])
    assert features.shape == (6, SAM.prompt_width) and np.isfinite(features).all()
    assert len(np.unique(features.round(6), axis=0)) == 6
    out = tmp_path / "list.json"
    words = ["--data", few, "--out", out, "--embeddings", tmp_path / "sam.safetensors"]
    assert run(*words, "--cases", 2) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["told_apart_by"].startswith("embeddings ")


def test_a_list_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# the good ones\nMR_b_2.npz\n\nCT_a_1  # clear\n", encoding="utf-8")
    assert read_case_list(path) == ["CT_a_1", "MR_b_2"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "no case list"),
        ("a.json", "[]", "no case list"),
        ("a.json", '{"case_list": 2, "cases": []}', "of version 2; accepted: 1"),
        ("a.json", '{"case_list": 1, "cases": []}', "received no case"),
        ("a.txt", "a\nb\na.npz\n", "received a twice"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_case_list(tmp_path / name)


def test_errors_are_one_line(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bare", "flat"):
        (tmp_path / name).mkdir()
    write_npz(tmp_path / "bare" / "CT_a_1.npz", challenge_case(gts=False))
    write_npz(tmp_path / "flat" / "CT_a_1.npz", challenge_case() | {"spacing": np.ones(2)})
    out = tmp_path / "list.json"
    for words, message in (
        (["--data", tmp_path, "--out", out], "no .npz file; accepted: a folder of labelled"),
        (["--data", tmp_path / "bare", "--out", out], "accepted: npz with imgs, gts and spacing"),
        (["--data", tmp_path / "flat", "--out", out], "accepted: three positive numbers"),
        (["--data", folder, "--out", out, "--cases", 13], "received 13 cases of 12"),
        *(
            (["--data", folder, "--out", out, "--share", share], "accepted: over 0, up to 1")
            for share in ("2", "0", "-0.5", "inf", "nan")
        ),
        (["--data", folder, "--out", out, "--cases", 0], "received 0 cases of 12"),
        (["--data", folder, "--out", out, "--embeddings", "no"], "no weights 'no'"),
    ):
        assert run(*words) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_a_gpu_that_is_not_there_is_told_in_a_line(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sam, out = tmp_path / "sam.safetensors", tmp_path / "list.json"
    save_weights(sam, noisy(SamMed3D(SAM)).state_dict(), {"sam": SAM.to_json()})
    words = ["--data", folder, "--out", out, "--embeddings", sam, "--device"]
    assert run(*words, "cuda") == 1
    error = capsys.readouterr().err
    assert "cuda: torch finds no CUDA device here" in error and error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        run(*words, "gpu")
    assert "invalid choice: 'gpu'" in capsys.readouterr().err
    assert not out.exists()


def test_the_real_pool_is_covered_better_than_by_chance(tmp_path: Path, shared_data: Path) -> None:
    """A tenth of the PET and ultrasound cases, by the command's default method."""
    paths = [*shared_data.glob("train/PET_*.npz"), *shared_data.glob("train/US_*.npz")]
    few = tmp_path / "cases"
    few.mkdir()
    for path in paths:
        (few / path.name).symlink_to(path)
    pool = CasePool(describe_folder(few))
    coverage = Coverage(pool)
    names = [choice.name for choice in choose_diverse(pool, 4, 0)]
    value = ROWS.index("coverage, 0..1")
    chance = [
        measure(pool, coverage, [c.name for c in choose_random(pool, 4, seed)])[value]
        for seed in range(20)
    ]
    assert measure(pool, coverage, names)[value] > max(chance)
