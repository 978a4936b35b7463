"""Figures of a model card where not every case has boxes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from inference.model.weights import save_weights, sha256_of
from tests.phantoms import challenge_case, write_npz
from training.evaluation.evaluate import main as evaluate
from training.model_card import main


def test_rounds_that_were_not_held_are_dashes(tmp_path: Path) -> None:
    """MR comes without boxes, and so does one of the other runs."""
    weights = tmp_path / "w.safetensors"
    save_weights(weights, {"refiner.a": torch.zeros(3)}, {})
    cases, out, card = tmp_path / "cases", tmp_path / "out", tmp_path / "CARD.md"
    cases.mkdir()
    for modality, boxes in (("CT", True), ("MR", False)):
        case = challenge_case((6, 14, 12), 1, modality, boxes=boxes, seed=3)
        write_npz(cases / f"{modality}_phantom_1.npz", case)
    words = ["--cases", str(cases), "--out", str(out), "--no-report", "--predictor", "ellipsoid"]
    assert evaluate([*words, "--name", "ours"]) == 0
    assert evaluate([*words, "--name", "boxless", "--no-boxes"]) == 0
    settings = out / "ours" / "settings.json"
    held = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(held | {"weights": sha256_of(weights)}), encoding="utf-8")
    figures = ["--weights", str(weights), "--figures", str(out / "summary.csv")]
    assert main([*figures, "--card", str(card)]) == 0
    lines = card.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    box = {row[0]: row[2] for row in rows}  # of NSD, the last table
    assert box["MR"] == box["boxless, mean of modalities"] == "–"
    assert box["CT"] == box["mean of modalities"] == box["mean of cases"] == "1.000"
    dashes = {row[0] for row in rows if "–" in row[3:]}
    assert dashes == {"its 95 % interval"}, "a case a modality tells none"
    assert len([row for row in rows if row[0] == "MR"]) == 2  # DSC and NSD
