"""Which records are made, made anew and kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.phantoms import challenge_case, write_npz
from tests.training.evaluation.test_ablation import StandIn, no_engine
from training.evaluation import code_version, recording
from training.evaluation.recording import load_record, record_folder

Record = Callable[..., list[Path]]


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Of one class each: CT_b.npz, CT_c.npz, CT_d.npz."""
    folder = tmp_path / "cases"
    folder.mkdir()
    for name in "bcd":
        write_npz(folder / f"CT_{name}.npz", challenge_case((8, 24, 28), 1))
    return folder


@pytest.fixture
def record(cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Records them as a stand-in for the engine has them."""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"stand-in")
    monkeypatch.setattr(recording.Segmenter, "from_files", lambda _: StandIn())

    def record(click_rounds: int = 0, every: int | None = None) -> list[Path]:
        return record_folder(
            cases,
            tmp_path / "out",
            weights=weights,
            objects=1,
            click_rounds=click_rounds,
            without_boxes_every=every,
        )

    return record


def test_records_of_another_engine_are_not_reused(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record()
    assert record() == before
    monkeypatch.setattr(code_version, "_SCORING", ("clicks",))  # as if the code had changed
    assert not {*before} & {*record()}


def test_a_bad_case_does_not_keep_others_from_being_recorded(
    record: Record, cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cases / "CT_a.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="1 of 4 cases cannot be recorded"):
        record()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CT_a.npz: ")
    (cases / "CT_a.npz").unlink()
    monkeypatch.setattr(recording.Segmenter, "from_files", no_engine)
    assert [path.name for path in record()] == ["CT_b.npz", "CT_c.npz", "CT_d.npz"]


def test_every_second_case_is_without_boxes_whatever_was_recorded_before(
    record: Record, cases: Path
) -> None:
    def boxed() -> list[bool]:
        records = map(load_record, record(click_rounds=1, every=2))
        return [0 in one.rounds for one in records]

    assert boxed() == [False, True, False]
    shutil.copy(cases / "CT_b.npz", cases / "CT_a.npz")
    assert boxed() == [False, True, False, True]
