"""Exported weights are the average, in half precision, listed by hash; figures are measured."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from inference.model.refiner import CHANNELS, Refiner, load_refiners
from inference.model.sam_med3d import SamMed3D, load_sam_med3d
from inference.model.weights import read_metadata, sha256_of, verify_weights
from tests.phantoms import challenge_case, write_npz
from tests.training.test_initial_weights import SAM, TINY, noisy, write_checkpoint
from training.evaluation.evaluate import main as evaluate
from training.export import main as export
from training.model_card import BEGIN, END, Figures, _trained
from training.model_card import main as model_card


def run(*words: object) -> int:
    return export([str(word) for word in words])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint.pt", noisy(Refiner(TINY)))


def test_the_average_is_exported_in_half_precision(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert run("--checkpoint", checkpoint, "--out", out, "--note", "data=three cases") == 0
    average = torch.load(checkpoint, weights_only=True)["average"]
    for name, tensor in load_refiners(out)[0].state_dict().items():
        assert torch.equal(tensor, average[name].half().float())
    metadata = read_metadata(out)
    training = json.loads(metadata["training"])
    assert metadata["data"] == "three cases"
    assert (training["steps"], training["windows"], training["minutes"]) == (7, 14, 0.1)
    assert training["config"]["batch"] == 2
    first = out.read_bytes()
    assert run("--checkpoint", checkpoint, "--out", out, "--note", "data=three cases") == 0
    assert out.read_bytes() == first


def test_a_network_of_a_weights_file_stays_as_it_is(tmp_path: Path, checkpoint: Path) -> None:
    """Its tensors and its history, beside a new network or in a mean with one."""
    others = [write_checkpoint(tmp_path / f"{i}.pt", noisy(Refiner(TINY))) for i in range(2)]
    before, out = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    assert run("--checkpoint", others[0], "--unboxed", others[1], "--out", before) == 0
    assert run("--checkpoint", checkpoint, "--unboxed", before, "--out", out) == 0
    (boxed, unboxed), (_, kept) = load_refiners(out), load_refiners(before)
    assert unboxed is not None and kept is not None
    average = torch.load(checkpoint, weights_only=True)["average"]
    for name, tensor in kept.state_dict().items():
        assert torch.equal(unboxed.state_dict()[name], tensor)
        assert torch.equal(boxed.state_dict()[name], average[name].half().float())
    key = "unboxed_training"
    assert read_metadata(out)[key] == read_metadata(before)[key]
    assert run("--checkpoint", before, "--checkpoint", checkpoint, "--out", out) == 0
    first = load_refiners(before)[0].state_dict()["stem.weight"]
    mean = load_refiners(out)[0].state_dict()["stem.weight"]
    torch.testing.assert_close(mean, (first + average["stem.weight"]) / 2, atol=1e-3, rtol=0)
    assert run("--checkpoint", checkpoint, "--unboxed", out, "--out", before) == 1


def test_a_mean_hears_first_passes_if_one_of_its_networks_does(tmp_path: Path) -> None:
    """What is in that channel of one that does not is chance, and counts as nothing."""
    networks = [noisy(Refiner(dataclasses.replace(TINY, coarse=c))) for c in (False, True)]
    paths = [write_checkpoint(tmp_path / f"{i}.pt", one) for i, one in enumerate(networks)]
    out = tmp_path / "w.safetensors"
    assert run("--checkpoint", paths[0], "--checkpoint", paths[1], "--out", out) == 0
    mean, _ = load_refiners(out)
    assert mean.config.coarse
    first, second = (torch.load(path, weights_only=True)["average"] for path in paths)
    first["stem.weight"][:, CHANNELS.index("coarse_logits")] = 0
    for name, tensor in mean.state_dict().items():
        expected = (first[name] + second[name]) / 2
        torch.testing.assert_close(tensor, expected, atol=1e-3, rtol=1e-3)


def test_the_hash_is_listed_once(tmp_path: Path, checkpoint: Path) -> None:
    """Also where an older file of the name is listed: that line would refuse the new file."""
    sums = tmp_path / "SHA256SUMS"
    other = f"{'ab' * 32}  other.safetensors"
    sums.write_text(f"# by hand\n{'00' * 32}  w.safetensors\n{other}\n", encoding="utf-8")
    out = tmp_path / "w.safetensors"
    for _ in range(2):
        assert run("--checkpoint", checkpoint, "--out", out) == 0
        lines = sums.read_text(encoding="utf-8").splitlines()
        assert lines == ["# by hand", other, f"{sha256_of(out)}  w.safetensors"]
    assert verify_weights(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "SHA256SUMS",
        "checkpoint.pt",
        "w.safetensors",
    ]


def test_inference_looks_in_the_windows_of_the_runs_end(tmp_path: Path) -> None:
    network = Refiner(dataclasses.replace(TINY, window=64))
    run_ = {"windows": [[0.0, 32], [0.6, 48]]}
    checkpoint = write_checkpoint(tmp_path / "c.pt", network, config=run_)
    assert run("--checkpoint", checkpoint, "--out", tmp_path / "w.safetensors") == 0
    assert load_refiners(tmp_path / "w.safetensors")[0].config.window == 48


def test_two_checkpoints_make_a_bundle(tmp_path: Path, checkpoint: Path) -> None:
    network = noisy(SamMed3D(SAM))
    sam = write_checkpoint(tmp_path / "sam.pt", network)
    out = tmp_path / "both.safetensors"
    assert run("--checkpoint", checkpoint, "--checkpoint", sam, "--out", out) == 0
    assert load_refiners(out)[0].config == TINY
    loaded = load_sam_med3d(out)
    assert loaded.config == SAM
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert {"refiner_training", "sam_training"} <= set(read_metadata(out))


def test_checkpoints_of_one_kind_are_averaged(tmp_path: Path) -> None:
    networks = [noisy(Refiner(TINY)), noisy(Refiner(TINY))]
    paths = [write_checkpoint(tmp_path / f"{i}.pt", one) for i, one in enumerate(networks)]
    out = tmp_path / "mean.safetensors"
    assert run("--checkpoint", paths[0], "--checkpoint", paths[1], "--out", out) == 0
    first, second = (one.state_dict() for one in networks)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in load_refiners(out)[0].state_dict().items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-3, atol=1e-3)
    training = json.loads(read_metadata(out)["training"])
    assert len(training["mean_with"]) == 1 and "config" in training["mean_with"][0]


def test_a_card_says_what_weights_are_a_mean_of() -> None:
    last = {"config": {"seed": 2}, "steps": 3020, "windows": 24160, "minutes": 82.0}
    first = {"config": {"seed": 1}, "steps": 4368}
    assert _trained({}) == "" and _trained(first) == "; last run: 4,368 steps"
    assert _trained(last | {"mean_with": [first, last]}) == (
        "; last run: 3,020 steps, 24,160 windows, 82 minutes; the weights are a mean: 2 parts of "
        "it, 1 of a run of 4,368 steps"
    )
    assert _trained(first | {"mean_with": [{}]}).endswith("1 of a run of unknown length")
    assert "of means among others" in _trained(last | {"mean_with": [first | {"mean_with": []}]})


def test_a_mean_of_a_mean_says_so(tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / f"{i}.pt", noisy(Refiner(TINY))) for i in range(2)]
    mean, again = tmp_path / "mean.safetensors", tmp_path / "again.safetensors"
    assert run("--checkpoint", paths[0], "--checkpoint", paths[1], "--out", mean) == 0
    assert run("--checkpoint", paths[0], "--checkpoint", mean, "--out", again) == 0
    history = json.loads(read_metadata(again)["training"])
    assert "of means among others" in _trained(history)


def test_objects_without_a_box_can_have_a_refiner_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [TINY, dataclasses.replace(TINY, blocks=(2, 2))]
    networks = [noisy(Refiner(shape)) for shape in shapes]
    boxed, unboxed = (write_checkpoint(tmp_path / f"{i}.pt", one) for i, one in enumerate(networks))
    out = tmp_path / "w.safetensors"
    assert run("--checkpoint", boxed, "--unboxed", unboxed, "--out", out) == 0
    for loaded, network in zip(load_refiners(out), networks, strict=True):
        assert loaded is not None and loaded.config == network.config
        for name, tensor in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert {"refiner_training", "unboxed_training"} <= set(read_metadata(out))
    before = out.read_bytes()
    sam = write_checkpoint(tmp_path / "sam.pt", noisy(SamMed3D(SAM)))
    assert run("--checkpoint", boxed, "--unboxed", sam, "--out", out) == 1
    assert "sam.pt: a sam; accepted" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = noisy(Refiner(TINY))
    with torch.no_grad():
        broken.stem.weight[0, 0] = float("nan")
    nan = write_checkpoint(tmp_path / "nan.pt", broken)
    shape = dataclasses.replace(TINY, channels=(16, 16))
    wider = write_checkpoint(tmp_path / "wider.pt", Refiner(shape))
    out = tmp_path / "w.safetensors"
    assert run("--checkpoint", checkpoint, "--out", out) == 0
    before = out.read_bytes(), (tmp_path / "SHA256SUMS").read_bytes()
    capsys.readouterr()
    for words, message in (
        (["--checkpoint", nan, "--out", out], "stem.weight holds NaN, infinity or more than 65504"),
        (["--checkpoint", checkpoint, "--checkpoint", wider, "--out", out], "another refiner than"),
        (["--checkpoint", checkpoint, "--out", tmp_path / "w.pt"], "named *.safetensors"),
        (["--checkpoint", tmp_path / "SHA256SUMS", "--out", out], "not a checkpoint"),
        (["--checkpoint", checkpoint, "--unboxed", out, "--out", out], "no unboxed in it"),
        (["--checkpoint", tmp_path / "no.pt", "--out", out], "No such file"),
    ):
        assert run(*words) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (out.read_bytes(), (tmp_path / "SHA256SUMS").read_bytes()) == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, its weights, and the summary of an evaluation of them and of a baseline."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    untrained = Refiner(TINY)
    checkpoint = write_checkpoint(folder / "checkpoint.pt", untrained)
    weights = folder / "w.safetensors"
    assert run("--checkpoint", checkpoint, "--out", weights) == 0
    (folder / "cases").mkdir()
    for modality in ("CT", "MR"):
        case = challenge_case((6, 14, 12), 1, modality, seed=3)
        write_npz(folder / "cases" / f"{modality}_phantom_1.npz", case)
    words = ["--cases", folder / "cases", "--out", folder / "evaluation", "--no-report"]
    words += ["--predictor", "segmenter,ellipsoid", "--weights", weights, "--device", "cpu"]
    assert evaluate([str(word) for word in words]) == 0
    return checkpoint, weights, folder / "evaluation" / "summary.csv"


def test_figures_are_those_of_the_evaluation(
    tmp_path: Path, evaluation: tuple[Path, Path, Path]
) -> None:
    checkpoint, weights, summary = evaluation
    card = tmp_path / "CARD.md"
    card.write_text(
        f"# Mine\n\nBefore.\n\n{BEGIN}\nold figures .999\n{END}\n\nAfter.\n", encoding="utf-8"
    )
    words = ["--checkpoint", checkpoint, "--out", weights, "--card", card]
    assert run(*words, "--figures", f"with-boxes={summary}") == 0
    text = card.read_text(encoding="utf-8")
    assert text.startswith(f"# Mine\n\nBefore.\n\n{BEGIN}\n\n`w.safetensors`, ")
    assert text.endswith(f"\n\n{END}\n\nAfter.\n")
    assert "old figures" not in text and sha256_of(weights) in text
    assert "**With boxes.** 2 cases; post-processing: auto." in text
    assert "7 steps, 14 windows, 0 minutes" in text

    printed = {}
    for line in text.splitlines():
        if match := re.match(r"\| ([^|]+) \| [12]? ?\| ?(.*) \|$", line):
            printed.setdefault(match[1], match[2].split(" | "))
    with summary.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    turns = ["box", *(f"click {n}" for n in range(1, 6)), "AUC"]
    for run_name, group, title in (
        ("segmenter", "CT", "CT"),
        ("segmenter", "cases", "mean of cases"),
        ("ellipsoid", "mean of modalities", "ellipsoid, mean of modalities"),
    ):
        expected = {
            row["round"]: f"{float(row['mean']):.3f}"
            for row in rows
            if (row["run"], row["group"], row["metric"]) == (run_name, group, "DSC")
        }
        assert printed[title] == [expected[turn] for turn in turns]

    again = card.read_text(encoding="utf-8")
    words = ["--weights", weights, "--card", card, "--figures", f"with-boxes={summary}"]
    assert model_card([str(word) for word in words]) == 0
    assert card.read_text(encoding="utf-8") == again


def test_a_card_is_begun_where_there_is_none(
    tmp_path: Path, evaluation: tuple[Path, Path, Path]
) -> None:
    _, weights, summary = evaluation
    card = tmp_path / "NEW.md"
    words = ["--weights", weights, "--card", card, "--figures", summary]
    assert model_card([str(word) for word in words]) == 0
    assert card.read_text(encoding="utf-8").startswith("# Weights: `w.safetensors`\n")
    assert "\n2 cases; post-processing: auto" in card.read_text(encoding="utf-8")


def test_figures_of_sam_med3d_alone(
    tmp_path: Path, evaluation: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation keeps its hash under another key; with a refiner beside it, it is not alone."""
    _, weights, summary = evaluation
    shutil.copytree(summary.parent, tmp_path / "evaluation")
    settings = tmp_path / "evaluation" / "segmenter" / "settings.json"
    words = ["--weights", weights, "--card", tmp_path / "c.md"]
    words += ["--figures", tmp_path / "evaluation" / "summary.csv"]
    held = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(
        json.dumps(held | {"sam": held["weights"], "weights": None}), encoding="utf-8"
    )
    assert model_card([str(word) for word in words]) == 0
    settings.write_text(json.dumps(held | {"sam": "ab" * 32}), encoding="utf-8")
    assert model_card([str(word) for word in words]) == 1
    assert ", abababababab" in capsys.readouterr().err


def test_figures_of_other_weights_are_refused(
    tmp_path: Path, evaluation: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights, summary = evaluation
    other = tmp_path / "other.safetensors"
    newer = write_checkpoint(tmp_path / "newer.pt", noisy(Refiner(TINY)))
    assert run("--checkpoint", newer, "--out", other) == 0
    (tmp_path / "no.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "bare.md").write_text("no markers\n", encoding="utf-8")
    (tmp_path / "twice.md").write_text(f"{BEGIN}\n{END}\n" * 2, encoding="utf-8")
    capsys.readouterr()
    for weights_file, figures, card, message in (
        (other, summary, "c.md", f"0 runs of weights {sha256_of(other)[:12]} alone (segmenter: "),
        (weights, tmp_path / "no.csv", "c.md", "accepted: a summary.csv of training.evaluation"),
        (weights, summary, "bare.md", "bare.md: accepted: one line '<!-- figures: begin"),
        (weights, summary, "twice.md", "twice.md: accepted: one line"),
    ):
        words = ["--weights", weights_file, "--card", tmp_path / card, "--figures", figures]
        assert model_card([str(word) for word in words]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "c.md").exists()
    assert (tmp_path / "bare.md").read_text(encoding="utf-8") == "no markers\n"


def test_headings_of_figures(tmp_path: Path) -> None:
    assert Figures.parse("a/summary.csv") == Figures("", Path("a/summary.csv"))
    assert Figures.parse("no-box=a/s.csv") == Figures("no box", Path("a/s.csv"))
    odd = tmp_path / "a=b.csv"
    odd.touch()
    assert Figures.parse(str(odd)) == Figures("", odd)


def test_a_card_needs_figures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export(["--checkpoint", "a", "--out", "b", "--card", "c.md"])
    assert "--figures and --card go together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export(["--checkpoint", "a", "--out", "b", "--note", "text"])
    assert "accepted: KEY=TEXT" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["refiner", "unboxed", "sam", "training", "refiner_training"])
def test_a_note_is_nothing_that_the_file_says_of_itself(
    tmp_path: Path, checkpoint: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w.safetensors"
    with pytest.raises(SystemExit):
        run("--checkpoint", checkpoint, "--out", out, "--note", f"{key}=foo")
    assert f"'{key}=foo'; accepted: other keys than" in capsys.readouterr().err
    assert not out.exists()
