"""The command that fits the rules of post-processing: where it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference.policy import load_policy
from tests.phantoms import challenge_case, write_npz
from tests.training.evaluation.test_ablation import StandIn
from training import fit_policy
from training.evaluation import recording


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
