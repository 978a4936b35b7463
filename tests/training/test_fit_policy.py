"""The command that fits the rules of post-processing: what it takes, and where it writes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.adaptive_steps import Region
from inference.object_features import FEATURES, ObjectFeatures
from inference.policy import Rule, load_policy
from tests.phantoms import challenge_case, write_npz
from tests.training.evaluation.test_ablation import StandIn
from training import fit_policy
from training.evaluation import recording
from training.fit_policy import Fit, Step, Unit


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"stand-in")
    (tmp_path / "cases").mkdir()
    for number in range(6):  # of two nothing can be learnt
        case = challenge_case((12, 30, 28), 1, seed=number)
        write_npz(tmp_path / "cases" / f"CT_set_{number}.npz", case)
    places = ["--cases", str(tmp_path / "cases"), "--cache", str(tmp_path / "cache")]
    return [*places, "--weights", str(weights)]


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (tmp_path / "nowhere" / "policy.toml", tmp_path):
        assert fit_policy.main([*arguments, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error == f"error: --out {out}; accepted: a file in a folder that can be written\n"
    assert not (tmp_path / "cache").exists()


def test_the_table_is_written_whole_or_not_at_all(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recording.Segmenter, "from_files", lambda _: StandIn())
    out = tmp_path / "policy.toml"
    assert fit_policy.main([*arguments, "--out", str(out)]) == 0
    assert load_policy(out).rules
    out.write_text("mine", encoding="utf-8")
    capsys.readouterr()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        assert fit_policy.main([*arguments, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "No space left" in said.err and said.err.count("error: ") == 1
    assert "format = 1" in said.out
    assert out.read_text(encoding="utf-8") == "mine"
    assert not list(tmp_path.glob(".*"))


def fit_and_step(name: str, *parts: tuple[str, int, float, float]) -> tuple[Fit, Step]:
    """Ten units a patient: (modality, patients, gain of the clean ones, gain of the noisy ones)."""
    units, gains = [], []
    empty = np.zeros((0, 0, 0))
    region = Region((1.0, 1.0, 1.0))
    for modality, patients, clean, noisy in parts:
        for patient, k in itertools.product(range(patients), range(10)):
            features = ObjectFeatures(**dict.fromkeys(FEATURES, 1.0))
            who = f"{modality} {patient}"
            units.append(Unit(modality, who, float(k % 2), features, region, empty > 0, 1, empty))
            gains.append((noisy if k % 2 else clean) + 1e-4 * (patient % 3))
    amounts = len(fit_policy.AMOUNTS[name])
    columns = np.array(gains)[:, None] * np.array([1.0] + [0.5] * (amounts - 1))
    return Fit(units, np.random.default_rng(0)), Step(name, columns)


@pytest.mark.parametrize(
    ("parts", "taken"),
    [
        ([("CT", 8, 0.01, 0.01), ("MR", 8, 0.01, 0.01)], True),
        ([("CT", 8, 0.0, 0.02), ("MR", 8, 0.0, 0.02)], True),  # noise alone
        ([("CT", 8, -0.01, -0.01), ("MR", 8, -0.01, -0.01)], False),
    ],
)
def test_a_step_is_taken_where_it_gains(parts: list[Any], taken: bool) -> None:
    fit, step = fit_and_step("islands", *parts)
    fit._choose(step)
    assert bool(step.rules) == taken
    assert ("taken" in step.notes[0]) == taken
    if taken:
        assert step.rules[0] == Rule("islands", 0.02, "any", ())


def test_what_harms_one_modality_is_taken_for_the_others_alone() -> None:
    fit, step = fit_and_step("islands", ("CT", 8, 0.05, 0.05), ("MR", 8, -0.002, 0.05))
    fit._choose(step)
    assert {rule.modality for rule in step.rules} == {"CT"}


def test_what_helps_under_noise_alone_moves_no_threshold() -> None:
    fit, step = fit_and_step("threshold", ("CT", 8, -0.0004, 0.05), ("MR", 8, -0.0004, 0.05))
    fit._choose(step)
    assert not step.rules and "left" in step.notes[0]


def test_a_gain_of_few_patients_is_not_taken() -> None:
    """On all patients together it looks worth it; on those it was not chosen on it is a chance."""
    fit, step = fit_and_step("islands", ("CT", 10, 0.0, 0.0), ("MR", 10, 0.0, 0.0))
    step.gains[:] = 0
    one = np.array([unit.patient == "CT 0" for unit in fit.units])
    step.gains[one] = 0.5
    fit._choose(step)
    assert not step.rules


def test_held_out_patients_do_not_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, step = fit_and_step("islands", ("CT", 10, 0.01, 0.01))
    asked: list[set[str]] = []
    best = fit._best

    def watch(step: Step, left: Any, among: Any) -> Rule | None:
        asked.append({unit.patient for unit, yes in zip(fit.units, among, strict=True) if yes})
        return best(step, left, among)

    monkeypatch.setattr(fit, "_best", watch)
    fit._choose(step)
    *folds, everybody = asked[:6]
    assert len(everybody) == 10 and all(len(fold) == 8 for fold in folds)
    assert set.union(*(everybody - fold for fold in folds)) == everybody
