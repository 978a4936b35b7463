"""What lies in a folder of results: left half done, damaged, or made from cases changed since."""

from __future__ import annotations

import argparse
import gc
import html
import weakref
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from tests.phantoms import challenge_case, write_npz
from training.evaluation import evaluate
from training.evaluation.baselines import BASELINES
from training.evaluation.evaluate import main
from training.evaluation.perturbation import EXACT
from training.evaluation.predictors import PredictorChoice
from training.evaluation.results import read_csv


@pytest.fixture
def cases(tmp_path) -> Path:
    folder = tmp_path / "cases"
    folder.mkdir()
    write_npz(folder / "CT_a.npz", challenge_case((8, 24, 28), 2))
    return folder


def run(cases: Path, predictor: str, *more: str) -> int:
    out = str(cases.parent / "out")
    return main(["--cases", str(cases), "--out", out, "--predictor", predictor, *more])


def test_an_interrupted_force_leaves_no_table_of_cases_that_are_gone(cases, monkeypatch):
    def interrupted(*_):
        raise OSError("no space left")

    table = cases.parent / "out" / "box_metrics.csv"
    assert run(cases, "box", "--no-report") == 0
    before = table.read_bytes()
    monkeypatch.setattr(evaluate, "_evaluate", interrupted)
    assert run(cases, "box", "--no-report", "--force") == 2
    assert not table.exists()
    monkeypatch.undo()
    table.write_bytes(before)  # as older versions left it
    assert run(cases, "ellipsoid") == 0
    assert {row["run"] for row in read_csv(table.with_name("summary.csv"))} == {"ellipsoid"}


@pytest.mark.parametrize("shape", [(8, 24, 28), (4, 24, 28)])
def test_cases_changed_since_are_not_drawn(cases, shape):
    """A label less, or another shape, between two runs."""
    assert run(cases, "box", "--no-report") == 0
    write_npz(cases / "CT_a.npz", challenge_case(shape, 1 if shape[0] == 8 else 2))
    assert run(cases, "ellipsoid") == 0
    page = (cases.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert "Worst: CT_a.npz, not shown: the case has other labels" in page
    assert page.count("data:image/png") == 3


def test_a_label_map_that_is_damaged_is_not_drawn(cases):
    assert run(cases, "box", "--no-report") == 0
    segs = cases.parent / "out" / "box" / "CT_a.npz"
    segs.write_bytes(segs.read_bytes()[:40])
    assert run(cases, "ellipsoid") == 0
    page = (cases.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert f"not shown: {segs}: damaged" in page
    np.savez(segs, segs=np.zeros((8, 24, 27), np.uint8))
    assert run(cases, "ellipsoid") == 0
    page = (cases.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert "not shown: a label map of shape (8, 24, 27)" in page


@pytest.mark.parametrize("name", ["CT_a.json", "settings.json"])
@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_damaged_is_told_by_its_name(cases, capsys, name, text):
    out = cases.parent / "out"
    assert run(cases, "box", "--no-report") == 0
    (out / "box" / name).write_text(text, encoding="utf-8")
    capsys.readouterr()
    assert run(cases, "box", "--no-report") == 2
    said = capsys.readouterr().err
    assert str(out / "box" / name) in said and said.count("\n") == 1


@pytest.mark.parametrize("boxes", [np.zeros((2, 6), int), np.array([{"z_min": 1}] * 2, object)])
def test_boxes_that_cannot_be_moved_stop_no_other_case(cases, capsys, boxes):
    write_npz(cases / "CT_odd.npz", challenge_case((8, 24, 28), 2) | {"boxes": boxes})
    assert run(cases, "box", "--no-report", "--prompts", "box-jitter-5") == 1
    said = capsys.readouterr().err
    assert "error: CT_odd.npz: box 1: received " in said and said.count("\n") == 1
    table = read_csv(cases.parent / "out" / "box@box-jitter-5_metrics.csv")
    assert [row["CaseName"] for row in table] == ["CT_a.npz"]


def test_label_maps_are_let_go_once_they_are_consumed(monkeypatch):
    """Those of a day's cases would not fit the memory."""
    alive = []

    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def shutdown(self, **_):
            pass

        def submit(self, *_):
            segs, done = np.zeros(3).view(Watched), Future()
            alive.append(weakref.ref(segs))
            done.set_result(("result", segs))
            return done

    class Watched(np.ndarray):
        pass

    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", Pool)
    options = argparse.Namespace(jobs=2, references=None, no_boxes=False)
    outcomes = evaluate._run_all([Path("a")] * 9, PredictorChoice("box"), options, EXACT)
    for left in range(8, -1, -1):
        outcome = next(outcomes)
        del outcome
        gc.collect()
        assert sum(segs() is not None for segs in alive) <= left + 1


def test_a_case_is_not_called_as_the_settings_are(cases, capsys):
    (cases / "CT_a.npz").rename(cases / "settings.npz")
    assert run(cases, "box") == 2
    said = capsys.readouterr().err
    assert "settings.npz: its result would replace" in said and said.count("\n") == 1


def test_sloppy_prompts_alone_are_told_in_full(cases):
    assert run(cases, "box", "--prompts", "one-click") == 0
    page = (cases.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert "All runs" in page and "<h2>box@one-click</h2>" in page


def test_help_names_every_baseline(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = "".join(capsys.readouterr().out.split())
    assert ",".join(BASELINES) in said


def test_names_in_the_page_are_neither_formulas_nor_html(cases):
    name = "<b>&$\\q$_a.npz"
    (cases / "CT_a.npz").rename(cases / name)
    assert run(cases, "box", "--name", "<i>$q^$") == 0
    compared = str(cases.parent / "out" / "<i>$q^$_metrics.csv")
    assert run(cases, "ellipsoid", "--name", "$r^$", "--compare", compared) == 0
    page = (cases.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert html.escape(name) in page and "<td>&lt;i&gt;$q^$</td>" in page
    assert "<b>&" not in page and "<i>" not in page
