"""Recording what post-processing is given, making it worse, and comparing variants on it."""

from __future__ import annotations

import os
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from inference.finishing import Finisher
from inference.refinement import SURE, ObjectLogits, honour_clicks, merge
from tests import literal_postprocessing as literal
from tests.phantoms import challenge_case, write_npz
from tests.test_finishing import case_of
from tests.test_postprocessing import blobs, speckled
from training.evaluation import ablation, recording
from training.evaluation.ablation import PAPER, VARIANTS, apply_paper_steps
from training.evaluation.ablation_table import (
    ALL_ROUNDS,
    ablation_tables,
    digest,
    is_earned,
    summarise_ablation,
)
from training.evaluation.degradation import degrade
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.perturbation import PromptVariant
from training.evaluation.predictors import InProcess
from training.evaluation.protocol import run_case
from training.evaluation.recording import (
    choose_cases,
    choose_labels,
    load_record,
    record_case,
    restrict,
    save_record,
)
from training.evaluation.summary import MEAN_OF_MODALITIES


class StandIn:
    """A segmenter that takes what is bright in the box, or about the clicks, for the object."""

    def segment_case(self, case, finish):
        return finish(self._objects(case), case)

    def _objects(self, case):
        for prompts in case.objects:
            if prompts.is_empty:
                continue
            box = prompts.box
            low = box.start if box else tuple(max(p - 6, 0) for p in prompts.clicks[0].position)
            high = box.stop if box else tuple(p + 7 for p in prompts.clicks[0].position)
            cut = case.image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
            logits = (cut.astype(np.float32) - 120) / 40
            yield honour_clicks(ObjectLogits(prompts.label, low, logits), prompts.clicks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    for modality, classes in (("CT", 3), ("PET", 1)):
        case = challenge_case((12, 30, 28), classes, modality, seed=classes)
        write_npz(folder / f"{modality}_set_{classes}.npz", case)
    return folder


@pytest.mark.parametrize("boxes", [True, False])
def test_a_record_gives_the_label_maps_of_the_protocol(folder, tmp_path, boxes):
    case = load_labelled_case(folder / "CT_set_3.npz", boxes=boxes)
    segmenter = StandIn()

    def segment(given):
        return segmenter.segment_case(given, lambda all, case: merge(all, case.image.shape))

    variant = PromptVariant("short", click_rounds=2)
    record = record_case(case, segmenter, variant)
    expected, last = run_case(case, InProcess(segment), variant)
    assert sorted(record.rounds) == ([0, 1, 2] if boxes else [1, 2])
    save_record(tmp_path / "CT_set_3.npz", record)
    loaded = load_record(tmp_path / "CT_set_3.npz")
    assert (loaded.name, loaded.labels) == ("CT_set_3.npz", (1, 2, 3))
    results = [result for _, result in loaded.rounds[2]]
    assert np.array_equal(merge(results, case.reference.voxels.shape), last)
    for prompts, result in loaded.rounds[2]:
        shown = [(position, kind) for _, kind, position in expected.clicks[prompts.label - 1]]
        assert shown == [(c.position, "fg" if c.positive else "bg") for c in prompts.clicks]
        assert (prompts.box is not None) == boxes
        assert prompts.label == result.label
    kept = record.rounds[2][0][0].box
    assert loaded.rounds[2][0][0].box == kept


def test_restricted_cases_are_numbered_anew(folder):
    case = load_labelled_case(folder / "CT_set_3.npz")
    assert choose_labels(case, 5) == [1, 2, 3]
    assert choose_labels(case, 2) == [1, 3]
    small = restrict(case, [1, 3])
    assert small.reference.labels == [1, 2]
    assert np.array_equal(small.reference.voxels == 2, case.reference.voxels == 3)
    assert not (small.reference.voxels[case.reference.voxels == 2]).any()
    assert list(small.arrays["boxes"]) == [case.arrays["boxes"][0], case.arrays["boxes"][2]]


def test_sources_take_turns():
    names = ["CT_a_1", "CT_a_2", "CT_a_3", "CT_b_1", "MR_c_1"]
    chosen = choose_cases([Path(f"{name}.npz") for name in names], 2)
    assert [path.stem for path in chosen] == ["CT_a_1", "CT_b_1", "MR_c_1"]


def test_noise_grows_with_its_level_and_spares_clicks():
    logits = np.where(blobs((20, 22, 24), 1, seed=3) > 0, 3, -3).astype(np.float32)
    logits[5, 5, 5], logits[6, 6, 6] = SURE + 1, -SURE - 1
    result = ObjectLogits(2, (1, 10, 0), logits)
    volume = (40, 34, 24)
    assert degrade(result, volume, 0, "a") is result
    shares = []
    for level in (1.0, 2.0, 4.0):
        noisy = degrade(result, volume, level, "a")
        # A quarter of each edge more on every side, as far as the volume reaches.
        assert (noisy.label, noisy.start) == (2, (0, 4, 0))
        assert noisy.logits.shape == (1 + 20 + 5, 6 + 22 + 2, 24)
        assert noisy.logits.dtype == np.float32
        inner = noisy.logits[1:21, 6:28]
        assert inner[5, 5, 5] == SURE + 1
        assert inner[6, 6, 6] == -SURE - 1
        shares.append(np.mean((inner > 0) != (logits > 0)))
        assert np.array_equal(degrade(result, volume, level, "a").logits, noisy.logits)
        assert not np.array_equal(degrade(result, volume, level, "b").logits, noisy.logits)
    assert 0 < shares[0] < shares[1] < shares[2] < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_papers_steps_one_by_one(seed):
    shape = (20, 22, 24)
    masks = [speckled(blobs(shape, 1, seed * 7 + i), 0.05, i) > 0 for i in (1, 2, 3)]
    results = [
        ObjectLogits(i, (0, 0, 0), np.where(mask, i, -1).astype(np.float32))
        for i, mask in enumerate(masks, 1)
    ]
    assert np.array_equal(
        apply_paper_steps(results, shape, PAPER), Finisher("paper")(results, case_of(shape))
    )
    assert np.array_equal(apply_paper_steps(results, shape, ()), merge(results, shape))
    # Higher labels have higher logits here, so that they win what they had before a step.
    for name, step in (
        ("small", literal.remove_small_components),
        ("holes", literal.fill_holes),
        ("closing", literal.close_gaps),
        ("smoothing", literal.smooth),
    ):
        expected = np.zeros(shape, np.uint8)
        changed = [step(mask) for mask in masks]
        for label, (before, after) in enumerate(zip(masks, changed, strict=True), 1):
            added = after & ~before & (expected == 0)
            expected[added] = label
        for label, (before, after) in enumerate(zip(masks, changed, strict=True), 1):
            expected[after & before] = label
        assert np.array_equal(apply_paper_steps(results, shape, (name,)), expected), name
    lowest = np.select(masks, [1, 2, 3], 0)
    assert np.array_equal(apply_paper_steps(results, shape, ("priority",)), lowest)


def row(case: str, variant: str, dsc: float, turn: int = 0, noise: float = 0.0) -> dict:
    scores = {"dsc": dsc, "nsd": dsc / 2}
    return {"case": case, "noise": noise, "round": turn, "variant": variant, **scores}


def table(gains: dict[str, float]) -> list[dict]:
    """Two cases of each modality; ``auto`` gains as told, everything else nothing."""
    rows = []
    for modality, gain in gains.items():
        for number in (1, 2):
            for turn in (0, 5):
                for variant in VARIANTS:
                    dsc = 0.5 + number / 10 + (gain if variant == "auto" else 0)
                    rows.append(row(f"{modality}_x_{number}.npz", variant, dsc, turn))
    return summarise_ablation(rows)


def test_differences_are_paired_by_case():
    found = table({"CT": 0.01, "PET": 0.03})
    chosen = {
        (r["modality"], r["round"]): r
        for r in found
        if (r["variant"], r["metric"]) == ("auto", "DSC")
    }
    assert set(chosen) == {
        (m, turn)
        for m in ("CT", "PET", MEAN_OF_MODALITIES)
        for turn in ("box", "click 5", ALL_ROUNDS)
    }
    for modality, gain in (("CT", 0.01), ("PET", 0.03), (MEAN_OF_MODALITIES, 0.02)):
        one = chosen[modality, ALL_ROUNDS]
        # The same gain in each case: no width, however different the cases are.
        assert [one[k] for k in ("gain", "ci95_low", "ci95_high")] == pytest.approx([gain] * 3)
        assert one["mean"] == pytest.approx(0.65 + gain)
    assert chosen["CT", "box"]["cases"] == 2
    as_read = [{key: str(value) for key, value in one.items()} for one in found]
    assert ablation_tables(as_read) == ablation_tables(found)
    by_modality, by_round, *_ = (each.markdown() for each in ablation_tables(found))
    assert "|  | CT (2) | PET (2) | mean of modalities (4) |" in by_modality
    assert "| off | 0.6500 | 0.6500 | 0.6500 |" in by_modality
    gains = ["+1.00 [+1.00, +1.00]", "+3.00 [+3.00, +3.00]", "+2.00 [+2.00, +2.00]"]
    assert f"| auto | {' | '.join(gains)} |" in by_modality
    assert "|  | box (4) | click 5 (4) | all rounds (4) |" in by_round
    assert f"| auto | {' | '.join([gains[2]] * 3)} |" in by_round
    short = digest(found)
    assert "The network as it is: DSC | CT (2) | PET (2) | mean | mean NSD |" in short
    assert "| only small | +0.00 | +0.00 | +0.00 | +0.00 |" in short
    bold = ["**+1.00** [+1.00, +1.00]", "**+3.00** [+3.00, +3.00]", "**+2.00** [+2.00, +2.00]"]
    assert f"| auto | {' | '.join(bold)} | **+1.00** [+1.00, +1.00] |" in short


def test_rules_have_to_earn_their_place():
    assert is_earned(table({"CT": 0.01, "PET": -0.001}))
    assert not is_earned(table({"CT": 0.01, "PET": -0.003})), "a modality loses too much"
    assert not is_earned(table({"CT": 0.0, "PET": 0.0})), "nothing is gained"


def test_a_single_case_has_no_interval():
    found = summarise_ablation(
        [row("CT_x.npz", name, 0.6 if name == "auto" else 0.5) for name in VARIANTS]
    )
    by_modality, *_ = (each.markdown() for each in ablation_tables(found))
    assert "| auto | +10.00 | +10.00 |" in by_modality
    assert "| auto | +10.00 | +10.00 |" in digest(found)
    assert not is_earned(found), "one case cannot tell that the rules do no harm"


def test_the_command_writes_its_tables_and_reuses_its_records(
    folder, tmp_path, monkeypatch, capsys
):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"stand-in")
    monkeypatch.setattr(recording.Segmenter, "from_files", lambda _: StandIn())
    arguments = ["--cases", str(folder), "--cache", str(tmp_path / "cache")]
    arguments += ["--out", str(tmp_path / "out"), "--weights", str(weights)]
    arguments += ["--rounds", "0", "1", "--noise", "0", "3", "--objects", "2"]
    readme = tmp_path / "README.md"
    readme.write_text(f"Before\n{ablation.BEGIN}\nold\n{ablation.END}\nafter\n", encoding="utf-8")
    arguments += ["--document", str(readme)]
    assert ablation.main(arguments) == 0
    first = capsys.readouterr().out
    assert "1/2 CT_set_3.npz: 2 objects" in first
    scores = (tmp_path / "out" / "ablation_scores.csv").read_text(encoding="utf-8").splitlines()
    assert len(scores) == 1 + 2 * 2 * 2 * len(VARIANTS)
    text = (tmp_path / "out" / "ablation.md").read_text(encoding="utf-8")
    assert text.count("| paper without holes |") == 2 * 2 * 2  # noise, metric, across
    document = readme.read_text(encoding="utf-8")
    assert document.startswith("Before\n<!-- ablation: begin")
    assert document.endswith("<!-- ablation: end -->\nafter\n")
    assert "old" not in document
    assert "2 cases with up to 2 objects each" in document
    assert document.count("| paper without holes |") == 2
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<td>paper without holes</td>") == 2 * 2 * 2

    def refuse(_: Path) -> None:
        raise AssertionError("recorded anew")

    monkeypatch.setattr(recording.Segmenter, "from_files", refuse)
    assert ablation.main(arguments) == 0
    again = (tmp_path / "out" / "ablation_scores.csv").read_text(encoding="utf-8").splitlines()
    assert again == scores
    # A case that was written again is another one, and so is one of its name elsewhere.
    moved = shutil.copytree(folder, tmp_path / "moved" / folder.name)
    for path in (folder, moved):
        os.utime(path / "CT_set_3.npz")
        arguments[1] = str(path)
        with pytest.raises(AssertionError, match="recorded anew"):
            ablation.main(arguments)


def test_a_folder_without_cases_is_refused(tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"stand-in")
    arguments = ["--cases", str(tmp_path), "--cache", str(tmp_path), "--out", str(tmp_path)]
    assert ablation.main([*arguments, "--weights", str(weights)]) == 2
    assert "no .npz file" in capsys.readouterr().err


def no_engine(_: Path) -> None:
    raise AssertionError("work was begun")


@pytest.fixture
def arguments(folder, tmp_path, monkeypatch) -> list[str]:
    """Of all commands that record, for an engine that must not be needed."""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"stand-in")
    monkeypatch.setattr(recording.Segmenter, "from_files", no_engine)
    return ["--cases", str(folder), "--out", str(tmp_path / "out"), "--weights", str(weights)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rounds", "1", "7"], "--rounds 7; accepted: 0 (the box round) to 5"),
        (["--rounds", "-1"], "--rounds -1; accepted: 0"),
        (["--objects", "0"], "--objects 0; accepted: 1 to 255"),
        (["--document", "nowhere.md"], "No such file or directory: 'nowhere.md'"),
        (["--document", __file__], "test_ablation.py: accepted: one line '<!-- ablation: begin"),
        (["--out", __file__], "File exists"),
    ],
)
def test_an_ablation_that_cannot_end_does_not_begin(arguments, tmp_path, capsys, more, message):
    cache = tmp_path / "cache"
    assert ablation.main([*arguments, "--cache", str(cache), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not cache.exists() and not list(tmp_path.glob("out/*"))


def test_box_rounds_of_cases_without_boxes_make_no_tables(tmp_path, arguments, monkeypatch, capsys):
    cases = tmp_path / "boxless"
    cases.mkdir()
    write_npz(cases / "CT_set_1.npz", challenge_case((12, 30, 28), 1, boxes=False))
    monkeypatch.setattr(recording.Segmenter, "from_files", lambda _: StandIn())
    words = [*arguments, "--cases", str(cases), "--cache", str(tmp_path / "cache")]
    assert ablation.main([*words, "--rounds", "0"]) == 2
    assert "--rounds 0: no case has boxes; accepted: also 1 to 5" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_process_that_dies_is_told_in_a_line(tmp_path, arguments, monkeypatch, capsys):
    def die(*_: object) -> None:
        raise BrokenProcessPool("A process in the process pool was terminated abruptly.")

    monkeypatch.setattr(recording.Segmenter, "from_files", lambda _: StandIn())
    monkeypatch.setattr(ablation, "run_tasks", die)
    assert ablation.main([*arguments, "--cache", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err.startswith("error: A process in the process pool")


@pytest.mark.parametrize(
    ("option", "number", "accepted"),
    [
        ("--objects", 0, "1 to 255"),
        ("--objects", 256, "1 to 255"),
        ("--click-rounds", 9, "0 to 5"),
        ("--click-rounds", -1, "0 to 5"),
        ("--per-modality", 0, "at least 1"),
        ("--without-boxes-every", 0, "at least 1"),
    ],
)
def test_numbers_out_of_range_record_nothing(arguments, tmp_path, capsys, option, number, accepted):
    assert recording.main([*arguments, option, str(number)]) == 2
    assert capsys.readouterr().err == f"error: {option} {number}; accepted: {accepted}\n"
    assert not (tmp_path / "out").exists()


def test_recording_needs_a_thread(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        recording.main([*arguments, "--threads", "0"])
    assert "--threads 0; accepted: at least 1" in capsys.readouterr().err


def test_records_are_plain(folder, tmp_path):
    record = recording.RecordedCase("CT_set_3.npz", (1,), {})
    save_record(tmp_path / "CT_set_3.npz", record)
    assert load_record(tmp_path / "CT_set_3.npz") == record
