"""The command line: tables, resuming after a kill, settings, comparison, report."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import CHECKOUT
from tests.phantoms import challenge_case, write_npz
from training.evaluation import code_version, evaluate
from training.evaluation.comparison import compare
from training.evaluation.evaluate import main
from training.evaluation.results import read_csv, write_csv


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    for number, (modality, boxes) in enumerate(
        [("CT", True), ("CT", False), ("MR", True), ("US", False)]
    ):
        arrays = challenge_case((8, 24, 28), 2, modality, boxes=boxes, seed=number)
        write_npz(folder / f"{modality}_case{number}.npz", arrays)
    return folder


def run(cases: Path, out: Path, *more: str) -> int:
    return main(["--cases", str(cases), "--out", str(out), "--no-report", *more])


def rows_without_times(path: Path) -> list[dict[str, str]]:
    return [
        {key: value for key, value in row.items() if "RunningTime" not in key}
        for row in read_csv(path)
    ]


def test_writes_the_official_table_and_a_summary(cases, tmp_path, capsys):
    assert run(cases, tmp_path, "--predictor", "ellipsoid") == 0
    rows = read_csv(tmp_path / "ellipsoid_metrics.csv")
    assert [row["CaseName"] for row in rows] == sorted(path.name for path in cases.iterdir())
    boxless = rows[1]
    assert boxless["DSC_1"] == boxless["NSD_1"] == boxless["RunningTime_1"] == "0.0"
    assert boxless["runtime_upperbound"] == "180"
    summary = read_csv(tmp_path / "summary.csv")
    assert {row["grouping"] for row in summary} == {"all", "modality", "structure", "object size"}
    found = {(row["group"], row["metric"], row["round"]): row for row in summary}
    one = found["CT", "DSC", "Final"]
    finals = [float(row["DSC_Final"]) for row in rows[:2]]
    assert float(one["mean"]) == pytest.approx(np.mean(finals))
    low, high = float(one["ci95_low"]), float(one["ci95_high"])
    assert low < min(finals) < max(finals) < high, "two cases tell little"
    assert found["CT", "DSC", "box"]["n"] == "1"  # the other CT has no boxes
    assert found["CT", "DSC", "box"]["ci95_low"] == "nan"
    assert "mean of modalities" in capsys.readouterr().out


def test_done_cases_are_not_redone_unless_forced(cases, tmp_path, monkeypatch, capsys):
    held = []
    real = evaluate.run_case

    def counted(case, *how):
        held.append(case.name)
        return real(case, *how)

    monkeypatch.setattr(evaluate, "run_case", counted)
    assert run(cases, tmp_path, "--predictor", "box", "--limit", "2") == 0
    assert len(held) == 2
    assert run(cases, tmp_path, "--predictor", "box") == 0
    assert len(held) == 4
    table = (tmp_path / "box_metrics.csv").read_bytes()
    assert run(cases, tmp_path, "--predictor", "box") == 0
    assert len(held) == 4
    assert "4 of 4 cases already done" in capsys.readouterr().out
    assert (tmp_path / "box_metrics.csv").read_bytes() == table
    assert run(cases, tmp_path, "--predictor", "box", "--force") == 0
    assert len(held) == 8


def test_cases_written_since_are_done_again(cases, tmp_path, capsys):
    here = tmp_path / "cases"
    shutil.copytree(cases, here)
    assert run(here, tmp_path / "out", "--predictor", "box") == 0
    changed = sorted(here.iterdir())[1]
    os.utime(changed, (time.time() + 60, time.time() + 60))
    assert run(here, tmp_path / "out", "--predictor", "box") == 0
    assert "box: 3 of 4 cases already done" in capsys.readouterr().out


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_case_that_cannot_be_read_stops_no_other(cases, tmp_path, capsys, jobs):
    here = tmp_path / "cases"
    shutil.copytree(cases, here)
    with np.load(here / "CT_case0.npz", allow_pickle=True) as file:
        arrays = dict(file)
    write_npz(here / "CT_bad.npz", {k: v for k, v in arrays.items() if k != "gts"})
    write_npz(here / "CT_dot.npz", arrays | {"boxes": np.array(arrays["boxes"][0], object)})
    assert run(here, tmp_path / "out", "--predictor", "box", "--jobs", jobs) == 1
    said = capsys.readouterr().err
    assert "error: CT_bad.npz: no gts" in said and "error: CT_dot.npz: boxes of shape ()" in said
    assert len(read_csv(tmp_path / "out" / "box_metrics.csv")) == 4


def test_other_settings_need_another_folder(cases, tmp_path, monkeypatch, capsys):
    assert run(cases, tmp_path, "--predictor", "box") == 0
    assert run(cases, tmp_path, "--predictor", "box", "--no-boxes") == 2
    assert "boxes True -> False" in capsys.readouterr().err
    monkeypatch.setattr(code_version, "_SCORING", ("clicks",))  # as if the code had changed
    assert run(cases, tmp_path, "--predictor", "box") == 2
    assert "(code '" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(cases, tmp_path, "--predictor", "box", "--no-boxes", "--name", "box-less") == 0
    assert all(row["DSC_1"] == "0.0" for row in read_csv(tmp_path / "box-less_metrics.csv"))


def test_an_image_built_anew_is_another_one(cases, tmp_path, monkeypatch, capsys):
    """A stand-in for docker that says which image there is and writes nothing."""
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    monkeypatch.setenv("PATH", f"{docker.parent}:/usr/bin:/bin")
    arguments = ["--predictor", "image", "--image", "team:latest", "--limit", "1"]
    for identifier, status in (("sha256:1", 1), ("sha256:1", 1), ("sha256:2", 2)):
        docker.write_text(f'#!/bin/sh\n[ "$2" = inspect ] && echo {identifier}\n')
        docker.chmod(0o755)
        assert run(cases, tmp_path / "out", *arguments) == status
    said = capsys.readouterr()
    assert "1 of 1 cases already done" in said.out
    assert "'team:latest sha256:1' -> 'team:latest sha256:2'" in said.err
    docker.write_text("#!/bin/sh\necho 'No such image: team:latest' >&2\nexit 1\n")
    assert run(cases, tmp_path / "out", *arguments) == 2
    assert "error: image team:latest: No such image" in capsys.readouterr().err


def test_jobs_give_the_same_scores(cases, tmp_path):
    assert run(cases, tmp_path / "one", "--predictor", "ellipsoid") == 0
    assert run(cases, tmp_path / "two", "--predictor", "ellipsoid", "--jobs", "2") == 0
    tables = [rows_without_times(tmp_path / n / "ellipsoid_metrics.csv") for n in ("one", "two")]
    assert tables[0] == tables[1]


def test_killed_and_continued(cases, tmp_path):
    """Kill -9 in the middle, run again: the same table, times aside."""
    out = tmp_path / "killed"
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "from training.evaluation import baselines, evaluate\n"
        "ellipsoid = baselines.BASELINES['ellipsoid']\n"
        "def slow(case):\n"
        "    time.sleep(0.2)\n"
        "    return ellipsoid(case)\n"
        "baselines.BASELINES['ellipsoid'] = slow\n"
        "sys.exit(evaluate.main())\n"
    )
    arguments = ["--cases", cases, "--out", out, "--predictor", "ellipsoid", "--no-report"]
    process = subprocess.Popen(
        [sys.executable, slow, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("ellipsoid/*_case*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(out.glob("ellipsoid/*_case*.json"))) < 4
    assert not (out / "ellipsoid_metrics.csv").exists()
    assert run(cases, out, "--predictor", "ellipsoid") == 0
    assert run(cases, tmp_path / "whole", "--predictor", "ellipsoid") == 0
    assert rows_without_times(out / "ellipsoid_metrics.csv") == rows_without_times(
        tmp_path / "whole" / "ellipsoid_metrics.csv"
    )


def test_failed_predictions_are_told(cases, tmp_path, capsys):
    command = f"{sys.executable} -c pass {{inputs}} {{outputs}}"
    assert run(cases, tmp_path, "--predictor", "command", "--command", command, "--limit", "1") == 1
    said = capsys.readouterr()
    assert "no CT_case0.npz written" in said.err
    assert "6 predictions failed, in CT_case0.npz" in said.out
    assert float(read_csv(tmp_path / "command_metrics.csv")[0]["DSC_AUC"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--predictor", "magic"], "predictor 'magic'; accepted"),
        (["--predictor", "box", "--prompts", "shaky"], "prompts 'shaky'; accepted"),
        (["--predictor", "box", "--limit", "0"], "limit 0; accepted"),
        (["--predictor", "box,ellipsoid", "--name", "both"], "accepted: one"),
        (["--predictor", "box", "--name", "a/b"], "--name 'a/b'; accepted"),
        (["--predictor", "box", "--name", "a@b"], "--name 'a@b'; accepted"),
        (["--predictor", "box", "--name", ""], "--name ''; accepted"),
        (["--predictor", "box", "--name", ".."], "--name '..'; accepted"),
        (["--weights", "/nowhere"], "no weights '/nowhere'"),
        (["--weights", __file__, "--jobs", "2"], "test_evaluate.py: "),
        (["--predictor", "box,magic"], "predictor 'magic'; accepted"),
        (["--predictor", "magic", "--jobs", "2"], "predictor 'magic'; accepted"),
        (["--predictor", "command", "--jobs", "2"], "needs --command"),
        (["--device", "cuda"], "cuda: torch finds no CUDA device here"),
        (["--predictor", "box", "--compare", "/no.csv"], "No such file or directory: '/no.csv'"),
    ],
)
def test_what_cannot_start(cases, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(cases, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tables_without_a_common_case_are_refused_before_the_work(cases, tmp_path, capsys):
    other = official(tmp_path / "other.csv", {"CT_elsewhere.npz": 0.5})
    assert run(cases, tmp_path / "out", "--predictor", "box", "--compare", str(other)) == 2
    assert "other.csv has no case in common" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # A table that the same command is still to write.
    table = str(tmp_path / "out" / "box_metrics.csv")
    assert run(cases, tmp_path / "out", "--predictor", "box,ellipsoid", "--compare", table) == 0


def die(*_):
    os._exit(9)


def test_a_worker_that_is_killed_is_told_in_a_line(cases, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_start_worker", die)
    assert run(cases, tmp_path, "--predictor", "box", "--jobs", "2") == 2
    said = capsys.readouterr().err
    assert "one of 2 processes ended" in said and said.count("\n") == 1


@pytest.mark.parametrize("place", ["run", "out", "references", "link"])
def test_results_never_lie_among_what_is_read(cases, tmp_path, capsys, place):
    here = shutil.copytree(cases, tmp_path / "box")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "box").symlink_to(here)
    arguments = {
        "run": [here, tmp_path],
        "out": [here, here],
        "references": [cases, tmp_path, "--references", str(here)],
        "link": [here, tmp_path / "linked"],
    }[place]
    assert run(*arguments, "--predictor", "ellipsoid,box", "--force") == 2
    said = capsys.readouterr().err
    assert "among what is read; accepted: another --out" in said
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before
    assert not (tmp_path / "ellipsoid").exists()


def test_force_leaves_what_is_no_result(cases, tmp_path):
    assert run(cases, tmp_path, "--predictor", "box", "--limit", "2") == 0
    folder = tmp_path / "box"
    results = {path.name for path in folder.iterdir()}
    assert len(results) == 2 * 2 + 1
    (folder / "drawings").mkdir()
    for name in ("notes.json", "other.npz", "notes.txt"):
        (folder / name).write_text("mine", encoding="utf-8")
    assert run(cases, tmp_path, "--predictor", "box", "--limit", "1", "--no-boxes", "--force") == 0
    left = {path.name for path in folder.iterdir()}
    foreign = {"drawings", "notes.json", "other.npz", "notes.txt"}
    assert left == foreign | {"settings.json", "CT_case0.json", "CT_case0.npz"}
    assert left > foreign and left < results | foreign


def test_no_cases(tmp_path, capsys):
    assert run(tmp_path, tmp_path / "out", "--predictor", "box") == 2
    assert "no .npz file" in capsys.readouterr().err


def test_sloppy_prompts_lose(cases, tmp_path, capsys):
    """Box jitter hurts who trusts the box alone, and the table says by how much."""
    prompts = "exact,box-jitter-20,one-click"
    assert run(cases, tmp_path, "--predictor", "ellipsoid", "--prompts", prompts) == 0
    stress = {row["prompts"]: row for row in read_csv(tmp_path / "stress.csv")}
    assert set(stress) == {"box-jitter-20", "one-click"}
    assert float(stress["box-jitter-20"]["DSC_first_loss"]) > 0.02
    assert float(stress["one-click"]["DSC_first_loss"]) == 0
    exact = read_csv(tmp_path / "ellipsoid_metrics.csv")
    jittered = read_csv(tmp_path / "ellipsoid@box-jitter-20_metrics.csv")
    loss = np.mean([float(row["DSC_Final"]) for row in exact]) - np.mean(
        [float(row["DSC_Final"]) for row in jittered]
    )
    assert float(stress["box-jitter-20"]["DSC_final_loss"]) == pytest.approx(loss)
    assert "ellipsoid one-click" in capsys.readouterr().out


def test_report_holds_everything(cases, tmp_path, capsys):
    assert run(cases, tmp_path, "--predictor", "box") == 0
    compared = str(tmp_path / "box_metrics.csv")
    arguments = ["--cases", str(cases), "--out", str(tmp_path), "--predictor", "ellipsoid"]
    assert main([*arguments, "--compare", compared, "--prompts", "exact,no-box"]) == 0
    assert "sign test p" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("All runs", "Sloppy prompts", "Against the compared run", ">box<", "ellipsoid"):
        assert heading in page
    assert page.count("data:image/png;base64,") == 6
    assert page.count("<svg") == 2 + 2 + 1
    assert "http" not in page.replace("http://www.w3.org", "")  # names of SVG's vocabularies
    assert "<script" not in page


def test_report_tells_of_runs_whose_cases_have_moved(cases, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(cases, here)
    out = ["--out", str(tmp_path / "out"), "--limit", "1"]
    assert main(["--cases", str(here), *out, "--predictor", "box"]) == 0
    here.rename(there)
    assert main(["--cases", str(there), *out, "--predictor", "ellipsoid"]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Worst: CT_case0.npz, not shown: " in page and page.count("data:image/png") == 3


def official(path: Path, finals: dict[str, float]) -> Path:
    columns = ("DSC_1", "DSC_AUC", "DSC_Final", "NSD_1", "NSD_AUC", "NSD_Final")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        times = ["RunningTime_1", "TotalRunningTime", "runtime_upperbound"]
        writer.writerow(["CaseName", *columns, *times])
        writer.writerows([name, *[value] * 6, 1, 6, 90] for name, value in finals.items())
    return path


def test_comparison_is_paired_by_case(tmp_path):
    ours = official(tmp_path / "a.csv", {f"c{i}": 0.5 + 0.01 * i for i in range(10)} | {"x": 0})
    theirs = official(tmp_path / "b.csv", {f"c{9 - i}": 0.5 for i in range(10)} | {"y": 1})
    final = next(d for d in compare(ours, theirs) if d.column == "DSC_Final")
    assert len(final.cases) == 10
    assert (final.better, final.worse) == (9, 0)
    assert final.mean == pytest.approx(0.045)
    assert final.p_value == pytest.approx(2 / 2**9)
    # Cases that one of the runs held without boxes have no first round to compare.
    boxless = read_csv(theirs)
    for row in boxless[:4]:
        row |= {"RunningTime_1": 0.0, "DSC_1": 0.0, "NSD_1": 0.0}
    write_csv(theirs, boxless)
    assert [len(d.cases) for d in compare(ours, theirs)] == [6, 10, 10, 6, 10, 10]
    write_csv(theirs, boxless[:4])
    assert [d.column for d in compare(ours, theirs)][:2] == ["DSC_AUC", "DSC_Final"]
    with pytest.raises(ValueError, match="no case in common"):
        compare(ours, official(tmp_path / "c.csv", {"z": 1}))
    (tmp_path / "d.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="accepted: a metrics CSV"):
        compare(ours, tmp_path / "d.csv")
