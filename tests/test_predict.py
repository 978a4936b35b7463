"""The command line: flow, exit statuses, messages, and outputs that survive every accident.

A stand-in takes the segmenter's place here, so that faults can be staged; what the real one makes
of every kind of input is in test_predict_contract.py.
"""

from __future__ import annotations

import io
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from inference import predict
from inference.finishing import DEFAULT, POSTPROCESSING, Finisher
from inference.refinement import ObjectLogits
from tests.phantoms import challenge_case, write_npz

CHECKOUT = Path(__file__).resolve().parents[1]
SHAPE = (6, 8, 10)


def write_case(folder: Path, name: str, **changes: object) -> Path:
    """A case of two classes with boxes; ``changes`` replace keys."""
    folder.mkdir(exist_ok=True)
    return write_npz(folder / name, challenge_case(SHAPE, n_classes=2) | changes)


class StandIn:
    """Gives class 1 the first half of the slices and class 2 the rest; fails where told to."""

    def __init__(self, faults: dict[str, Exception] | None = None) -> None:
        self.used_device = torch.device("cpu")
        self.faults = faults or {}
        self.received: dict[str, object] = {}
        self.apart = True  # or class 2, the more probable one, claims everything

    def from_files(self, weights, sam=None, refiner=True, device="auto"):
        self.received = {"weights": weights, "sam": sam, "refiner": refiner, "device": device}
        return self

    def segment_case(self, case, finish):
        if case.name in self.faults:
            raise self.faults[case.name]
        D, H, W = case.image.shape
        first = np.full((D, H, W), 1.0, np.float32)
        first[D // 2 :] = -1
        second = np.full((D, H, W), 3.0, np.float32)
        second[: D // 2] = -3 if self.apart else 3
        results = [ObjectLogits(1, (0, 0, 0), first), ObjectLogits(2, (0, 0, 0), second)]
        return finish(results, case)


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    stand_in = StandIn()
    module = types.ModuleType("inference.segmenter")
    module.Segmenter = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "inference.segmenter", module)
    return stand_in


@pytest.fixture
def run(tmp_path: Path, capfd):
    """Runs main() on tmp_path/in and tmp_path/out; gives status, stdout lines, stderr lines.

    Without post-processing unless the arguments ask for it: what the stand-in draws is no object.
    """

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        folders = ["--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out")]
        status = predict.main([*folders, "--postprocess", "off", *arguments])
        captured = capfd.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


def segmentation(path: Path) -> np.ndarray:
    with np.load(path) as file:
        assert file.files == ["segs"]
        return file["segs"]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_every_case_is_written_under_its_name(stand_in, run, tmp_path):
    for name in ("CT_b.npz", "CT_a.npz"):
        write_case(tmp_path / "in", name)
    (tmp_path / "in" / "notes.txt").touch()
    status, out, err = run()
    assert (status, err) == (0, [])
    assert names(tmp_path / "out") == ["CT_a.npz", "CT_b.npz"]
    label_map = segmentation(tmp_path / "out" / "CT_a.npz")
    assert label_map.dtype == np.uint8
    assert label_map.shape == SHAPE
    assert (label_map[:3] == 1).all()
    assert (label_map[3:] == 2).all()
    assert len(out) == 3
    assert out[0].startswith("CT_a.npz: 6x8x10, 2 classes, ")
    assert out[0].endswith(" s, cpu, voxels 1:240 2:240")
    assert out[2].startswith("2 of 2 cases in ")
    assert str(tmp_path / "out") in out[2]


def test_repairs_are_said_on_the_line_of_the_case(stand_in, run, tmp_path):
    write_case(tmp_path / "in", "CT_a.npz", spacing=np.array([0.0, 1.0, 1.0]))
    status, out, err = run()
    assert (status, err) == (0, [])
    assert "spacing" in out[0]


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="file names are ASCII here")
def test_a_name_that_the_terminal_cannot_write_is_escaped(stand_in, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    folders = ["--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out")]
    write_case(tmp_path / "in", "CT_é.npz")
    with pytest.raises(SystemExit, match="0"):
        predict.run_program(lambda: predict.main(folders))
    assert terminal.buffer.getvalue().startswith(b"CT_\\xe9.npz: 6x8x10")


@pytest.mark.parametrize("terminal", [True, False])
def test_nobody_has_to_read_what_is_said(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", errors := io.StringIO())
    monkeypatch.setattr(errors, "isatty", lambda: terminal)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as pipe:
        paths, write = predict._progress([Path("a"), Path("b"), Path("c")])
        assert all(write(path.name * 70_000, pipe) is None for path in paths)


def test_one_bad_case_stops_no_other(stand_in, run, tmp_path):
    write_case(tmp_path / "in", "CT_a.npz")
    (tmp_path / "in" / "CT_b.npz").write_text("not an archive")
    write_case(tmp_path / "in", "CT_c.npz")
    status, out, err = run()
    assert status == 1
    assert names(tmp_path / "out") == ["CT_a.npz", "CT_c.npz"]
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert "CT_b.npz" in err[0]
    assert out[-1].startswith("2 of 3 cases in ")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "OutOfMemoryError"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line second line"),
        (KeyError("weight"), "KeyError"),
        (ValueError("internal"), "ValueError: internal"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_fault_fails_its_case_only_and_is_told_in_one_line(
    stand_in, run, tmp_path, fault, words
):
    for name in ("CT_a.npz", "CT_b.npz"):
        write_case(tmp_path / "in", name)
    stand_in.faults["CT_a.npz"] = fault
    status, _, err = run()
    assert status == 1
    assert names(tmp_path / "out") == ["CT_b.npz"]
    assert len(err) == 1
    assert "CT_a.npz" in err[0]
    assert words in err[0]


def test_a_failed_case_keeps_its_earlier_output(stand_in, run, tmp_path):
    write_case(tmp_path / "in", "CT_a.npz")
    assert run()[0] == 0
    before = (tmp_path / "out" / "CT_a.npz").read_bytes()
    stand_in.faults["CT_a.npz"] = RuntimeError("no")
    assert run()[0] == 1
    assert (tmp_path / "out" / "CT_a.npz").read_bytes() == before
    assert names(tmp_path / "out") == ["CT_a.npz"]


def test_options_reach_the_segmenter(stand_in, run, tmp_path):
    write_case(tmp_path / "in", "CT_a.npz")
    sam, weights = tmp_path / "sam.pth", tmp_path / "ours.safetensors"
    sam.touch()
    weights.touch()
    threads = torch.get_num_threads()
    try:
        assert run("--threads", "1", "--device", "cpu")[0] == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    expected = {"weights": None, "sam": None, "refiner": True, "device": "cpu"}
    assert stand_in.received == expected
    assert run("--sam", str(sam), "--weights", str(weights))[0] == 0
    expected = {"weights": weights, "sam": sam, "refiner": True, "device": "auto"}
    assert stand_in.received == expected
    assert run("--sam", str(sam), "--refiner", "off")[0] == 0
    expected = {"weights": None, "sam": sam, "refiner": False, "device": "auto"}
    assert stand_in.received == expected


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_shards_share_all_cases_among_them(stand_in, run, tmp_path, shards):
    expected = [f"CT_{letter}.npz" for letter in "abcd"]
    for name in expected:
        write_case(tmp_path / "in", name)
    written = []
    for number in range(1, shards + 1):
        status, out, err = run("--shard", f"{number}/{shards}")
        assert (status, err) == (0, [])
        written += [line.partition(":")[0] for line in out[:-1]]
    assert sorted(written) == expected  # each once
    assert names(tmp_path / "out") == expected


def test_existing_results_are_skipped_only_on_demand(stand_in, run, tmp_path):
    for name in ("CT_a.npz", "CT_b.npz"):
        write_case(tmp_path / "in", name)
    stand_in.faults["CT_b.npz"] = RuntimeError("no")
    assert run("--skip-existing")[0] == 1
    before = (tmp_path / "out" / "CT_a.npz").stat().st_mtime_ns
    stand_in.faults.clear()

    status, out, _ = run("--skip-existing")
    assert status == 0
    assert [line.partition(":")[0] for line in out[:-1]] == ["CT_b.npz"]
    assert out[-1].startswith("1 of 1 cases in ")
    assert "1 skipped" in out[-1]
    assert (tmp_path / "out" / "CT_a.npz").stat().st_mtime_ns == before

    stand_in.received = {}
    status, out, err = run("--skip-existing")
    assert (status, err) == (0, [])
    assert out == [f"0 of 0 cases, 2 skipped; results in {tmp_path / 'out'}"]
    assert stand_in.received == {}  # no weights were read for nothing

    status, out, _ = run()
    assert status == 0
    assert out[-1].startswith("2 of 2 cases in ")


def test_command_line_and_finisher_agree_on_the_kinds_of_postprocessing():
    # Written twice, because --help must not wait for numpy.
    [action] = [a for a in predict.make_parser()._actions if a.dest == "postprocess"]
    assert tuple(action.choices) == POSTPROCESSING
    assert action.default == DEFAULT == Finisher().postprocess


def test_the_papers_steps_on_demand(stand_in, run, tmp_path):
    write_case(tmp_path / "in", "CT_a.npz", imgs=np.zeros((2, 4, 4), np.uint8))
    run()
    assert np.count_nonzero(segmentation(tmp_path / "out" / "CT_a.npz")) == 32
    run("--postprocess", "paper")
    assert not segmentation(tmp_path / "out" / "CT_a.npz").any(), "both objects are under 64 voxels"


def test_rules_choose_the_steps_of_each_object(stand_in, run, tmp_path, monkeypatch):
    table = tmp_path / "policy.toml"
    rule = 'format = 1\n[[rule]]\nstep = "trim"\namount = 0.01\nmodality = "PET"\n'
    table.write_text(rule, encoding="utf-8")
    monkeypatch.setattr("inference.policy.POLICY_FILE", table)
    for name in ("CT_a.npz", "PET_a.npz"):  # the name tells the modality
        path = write_case(tmp_path / "in", name)
    with np.load(path, allow_pickle=True) as file:
        slices = [slice(box["z_min"], box["z_max"] + 1) for box in file["boxes"]]
    assert run("--postprocess", "auto")[0] == 0
    untrimmed = np.repeat([1, 2], 3)
    trimmed = np.zeros(6, int)
    for label, kept in enumerate(slices, start=1):
        trimmed[kept] = np.where(untrimmed[kept] == label, label, trimmed[kept])
    assert not np.array_equal(trimmed, untrimmed)
    for name, expected in (("CT_a.npz", untrimmed), ("PET_a.npz", trimmed)):
        label_map = segmentation(tmp_path / "out" / name)
        assert (label_map == expected[:, None, None]).all()


def test_the_more_probable_class_gets_a_voxel_unless_priority_goes_by_label(
    stand_in, run, tmp_path
):
    stand_in.apart = False
    write_case(tmp_path / "in", "CT_a.npz")
    run()
    assert (segmentation(tmp_path / "out" / "CT_a.npz") == 2).all()
    run("--label-priority")
    label_map = segmentation(tmp_path / "out" / "CT_a.npz")
    assert (label_map[:3] == 1).all()
    assert (label_map[3:] == 2).all()


def test_probabilities_are_saved_beside_the_label_map(stand_in, run, tmp_path):
    write_case(tmp_path / "in", "CT_a.npz", spacing=np.array([1.0, 1.0, 2.5]))
    assert run("--save-probabilities")[0] == 0
    with np.load(tmp_path / "out" / "CT_a.npz") as file:
        arrays = dict(file)
    keys = ["segs", "regions", "probability_1", "outline_1", "probability_2", "outline_2"]
    assert list(arrays) == keys
    assert (arrays["segs"][:3] == 1).all()
    assert arrays["regions"].tolist() == [[1, 0, 0, 0, *SHAPE], [2, 0, 0, 0, *SHAPE]]
    assert arrays["probability_1"].dtype == np.uint8
    odds = np.exp([0.0, 1.0, -3.0])  # of none, of the first object, of the second
    _, first, second = np.rint(255 * odds / odds.sum())
    assert (arrays["probability_1"][:3] == first).all()
    assert (arrays["probability_2"][:3] == second).all()
    # Two log-odds a slice of 2.5 mm: one log-odd is 1.25 mm, 13 tenths when rounded up.
    assert (arrays["outline_1"][2] == 13).all()
    assert not arrays["outline_1"][[0, 1, 3, 4, 5]].any()


def test_a_table_of_rules_that_cannot_be_read_stops_the_start(stand_in, run, tmp_path, monkeypatch):
    write_case(tmp_path / "in", "CT_a.npz")
    broken = tmp_path / "policy.toml"
    broken.write_text("format = 2\n", encoding="utf-8")
    monkeypatch.setattr("inference.policy.POLICY_FILE", broken)
    status, _, err = run("--postprocess", "auto")
    assert (status, len(err)) == (2, 1)
    assert "format 2" in err[0]


def test_overlay_is_drawn_beside_the_result(stand_in, run, tmp_path):
    write_case(tmp_path / "in", "CT_a.npz")
    status, out, _ = run("--overlay", str(tmp_path / "pictures"))
    assert status == 0
    assert names(tmp_path / "pictures") == ["CT_a.png"]
    assert str(tmp_path / "pictures") in out[-1]


class TestNothingCanStart:
    def check(self, outcome: tuple[int, list[str], list[str]], *words: str) -> None:
        status, out, err = outcome
        assert status == 2
        assert out == []
        assert len(err) == 1
        for word in ("error: ", *words):
            assert word in err[0]

    def test_no_inputs_folder(self, stand_in, run, tmp_path):
        self.check(run(), str(tmp_path / "in"), "No such file or directory")

    def test_no_case_in_it(self, stand_in, run, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.nii.gz").touch()
        self.check(run(), str(tmp_path / "in"), "no .npz file among 1 entries")

    def test_outputs_is_a_file(self, stand_in, run, tmp_path):
        write_case(tmp_path / "in", "CT_a.npz")
        (tmp_path / "out").touch()
        self.check(run(), "cannot write to", str(tmp_path / "out"))

    def test_outputs_are_the_inputs(self, stand_in, run, tmp_path):
        path = write_case(tmp_path / "in", "CT_a.npz")
        before = path.read_bytes()
        self.check(run("--outputs", str(tmp_path / "in")), "is the inputs folder")
        assert path.read_bytes() == before

    @pytest.mark.parametrize("option", ["--weights", "--sam"])
    def test_weights_are_not_there(self, stand_in, run, tmp_path, option):
        write_case(tmp_path / "in", "CT_a.npz")
        self.check(run(option, "absent.pth"), "no weights 'absent.pth'")

    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            (ValueError("a.pth: received text;\naccepted: safetensors"), "received text; accepted"),
            (RuntimeError("no CUDA device"), "RuntimeError: no CUDA device"),
            (KeyError("refiner"), "KeyError: 'refiner'"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_weights_are_of_no_use(self, stand_in, run, tmp_path, monkeypatch, fault, words):
        write_case(tmp_path / "in", "CT_a.npz")

        def refuse(*_, **__):
            raise fault

        monkeypatch.setattr(stand_in, "from_files", refuse)
        self.check(run(), words)


@pytest.mark.parametrize(
    "arguments",
    [["--threads", text] for text in ("0", "x", "10000000000")]
    + [["--device", "tpu"], ["--refiner"], ["--x"], ["y"]]
    + [["--shard", text] for text in ("0/2", "3/2", "2", "1/", "a/b", "1/2/3", "-1/2")],
)
def test_wrong_arguments_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        predict.main(arguments)
    assert exit_.value.code == 2
    assert "error: " in (said := capsys.readouterr().err) and "invalid _" not in said
