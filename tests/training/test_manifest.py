"""Names of structures beside cases, and what is refused in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.phantoms import challenge_case, write_npz
from training.coreset import main as coreset
from training.evaluation.evaluate import main as evaluate
from training.manifest import read_structures


def test_names_by_file_and_label(tmp_path: Path) -> None:
    assert read_structures(tmp_path) == {}
    entries = [
        {"file": "CT_a.npz", "modality": "CT", "structures": {"1": "liver", "2": 7}},
        {"file": "CT_b.npz", "structures": None},
        {"file": "CT_c.npz"},
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
    assert read_structures(tmp_path) == {
        "CT_a.npz": {"1": "liver", "2": "7"},
        "CT_b.npz": {},
        "CT_c.npz": {},
    }


@pytest.mark.parametrize(
    ("text", "received"),
    [
        ("[{", "no JSON"),
        ('{"file": "CT_a.npz"}', 'received {"file": "CT_a.npz"}'),
        ("7", "received 7"),
        ('["CT_a.npz"]', 'received "CT_a.npz"'),
        ('[{"structures": {}}]', 'received {"structures": {}}'),
        ('[{"file": ["CT_a.npz"]}]', 'received {"file": ["CT_a.npz"]}'),
        ('[{"file": "CT_a.npz", "structures": ["liver"]}]', '"structures": ["liver"]}'),
    ],
)
def test_other_shapes_are_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, received: str
) -> None:
    cases = tmp_path / "cases"
    cases.mkdir()
    for name in ("CT_a.npz", "CT_b.npz"):
        write_npz(cases / name, challenge_case((6, 14, 12), 1))
    (cases / "manifest.json").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    words = ["--cases", str(cases), "--out", str(out), "--no-report", "--predictor", "box"]
    assert evaluate(words) == 2
    errors = [capsys.readouterr().err]
    assert coreset(["--data", str(cases), "--out", str(tmp_path / "list.json")]) == 1
    errors.append(capsys.readouterr().err)
    for error in errors:
        assert error.startswith(f"error: {cases / 'manifest.json'}: ") and received in error
        assert "accepted: a list of objects" in error and error.count("\n") == 1
    assert not out.exists() and not (tmp_path / "list.json").exists()
