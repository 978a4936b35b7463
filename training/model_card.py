"""Write measured figures into a model card, between two marker comments.

    python -m training.model_card --weights W --figures [NAME=]CSV ... --card weights/MODEL_CARD.md

The figures are those of ``summary.csv`` of ``training.evaluation``; none is typed by hand, and an
evaluation of other weights is refused: it keeps the SHA-256 of what it judged. The rest of the
card stays as it is; a card that does not exist is begun.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.model.weights import find_weights, read_weights, sha256_of
from training.evaluation.results import read_csv
from training.evaluation.summary import COLUMNS, MEAN_OF_CASES, MEAN_OF_MODALITIES
from training.marked_text import replace_marked

BEGIN = "<!-- figures: begin (written by training.model_card) -->"
END = "<!-- figures: end -->"

_TURNS = COLUMNS[:-1]  # Final is the last click
_NETWORKS = (
    ("refiner", "refiner"),
    ("unboxed", "refiner of objects without a box"),
    ("sam", "SAM-Med3D"),
)


@dataclass(frozen=True)
class Figures:
    """One evaluation to be shown.

    Attributes:
        heading: what distinguishes it, such as "without boxes"; may be empty.
        path: its ``summary.csv``, with the folders of its runs beside it.
    """

    heading: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Figures:
        """Read ``CSV`` or ``HEADING=CSV``; hyphens of the heading become spaces."""
        heading, equals, path = text.partition("=")
        if not equals or Path(text).is_file():
            return cls("", Path(text))
        return cls(heading.replace("-", " "), Path(path))


def read_figures(figures: Sequence[Figures], weights: Path) -> str:
    """Markdown with what is in a weights file and how well it does.

    Args:
        figures: evaluations, each with a run of these weights; other runs with exact prompts in
            the same summary, such as baselines, are shown beside it.
        weights: the file that was evaluated.

    Raises:
        ValueError: a summary holds no run of these weights, several, or is none.
        OSError: a file cannot be read.
    """
    digest = sha256_of(weights)
    parts = [_describe(weights, digest)]
    for one in figures:
        parts.append(_evaluation(one, digest))
    return "\n\n".join(parts)


def write_figures(card: Path, weights: Path, markdown: str) -> None:
    """Put Markdown between the markers of a card; a card that does not exist is begun.

    Raises:
        ValueError: the file has not exactly one pair of markers.
    """
    if not card.exists():
        card.write_text(f"# Weights: `{weights.name}`\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    replace_marked(card, BEGIN, END, markdown)


def _describe(weights: Path, digest: str) -> str:
    """The file, its networks and how long they were trained, from the file itself."""
    tensors, metadata = read_weights(weights)
    lines = [f"`{weights.name}`, {weights.stat().st_size / 1e6:.1f} MB, SHA-256 `{digest}`:", ""]
    for kind, title in _NETWORKS:
        count = sum(t.numel() for name, t in tensors.items() if name.startswith(f"{kind}."))
        if not count:
            continue
        training = json.loads(metadata.get(f"{kind}_training", metadata.get("training", "{}")))
        lines.append(f"- {title}: {count / 1e6:.2f} M parameters{_trained(training)}")
    return "\n".join(lines)


def _trained(training: Mapping[str, Any]) -> str:
    """How long the last run was, and in which shares its weights are a mean with others'."""
    alone = {key: value for key, value in training.items() if key != "mean_with"}
    if not _length(alone):
        return ""
    text = f"; last run: {_length(alone)}"
    others = training.get("mean_with", [])
    if any("mean_with" in run for run in others):
        text += "; the weights are a mean, of means among others"
    elif others:
        parts = Counter(json.dumps(run, sort_keys=True) for run in [alone, *others])
        own = parts.pop(json.dumps(alone, sort_keys=True))
        shares = [f"{own} part{'s' * (own > 1)} of it"]
        for run, n in parts.items():
            shares.append(f"{n} of a run of {_length(json.loads(run)) or 'unknown length'}")
        text += f"; the weights are a mean: {', '.join(shares)}"
    return text


def _length(training: Mapping[str, Any]) -> str:
    units = ("steps", "windows", "minutes")
    return ", ".join(f"{training[unit]:,.0f} {unit}" for unit in units if unit in training)


def _evaluation(figures: Figures, digest: str) -> str:
    """Tables of one summary: modality by round, in DSC and NSD, and other runs' means."""
    rows = read_csv(figures.path)
    needed = {"run", "grouping", "group", "metric", "round", "mean", "ci95_low", "ci95_high", "n"}
    if not rows or not needed <= set(rows[0]):
        raise ValueError(f"{figures.path}: accepted: a summary.csv of training.evaluation")
    runs = list(dict.fromkeys(row["run"] for row in rows))
    settings = {run: _settings(figures.path, run) for run in runs}
    exact = [run for run in runs if settings[run].get("prompts") == "exact"]
    judged = {
        run: [settings[run][k] for k in ("weights", "sam") if settings[run].get(k)] for run in runs
    }
    ours = [run for run in exact if judged[run] == [digest]]
    if len(ours) != 1:
        said = "; ".join(
            f"{run}: {', '.join(d[:12] for d in judged[run]) or 'none'}" for run in runs
        )
        raise ValueError(
            f"{figures.path}: {len(ours)} runs of weights {digest[:12]} alone ({said}); "
            "accepted: one, evaluated with exactly this file"
        )
    run = ours[0]
    table: dict[tuple[str, ...], Mapping[str, str]] = {
        (row["run"], row["group"], row["metric"], row["round"]): row
        for row in rows
        if row["grouping"] in ("all", "modality")
    }
    modalities = list(
        dict.fromkeys(
            row["group"] for row in rows if row["run"] == run and row["grouping"] == "modality"
        )
    )
    turns = [t for t in _TURNS if (run, "cases", "DSC", t) in table]
    count = table[run, "cases", "DSC", turns[-1]]["n"]
    heading = f"**{figures.heading[:1].upper()}{figures.heading[1:]}.** " if figures.heading else ""
    applied = settings[run].get("postprocess", "off")
    parts = [
        f"{heading}{count} cases; post-processing: {applied}. Scores are means over a case's "
        "classes, then over cases; AUC is that of the challenge, at most 4."
    ]
    for metric in ("DSC", "NSD"):
        title = "DSC" if metric == "DSC" else "NSD (2 mm)"
        lines = [
            f"| {title} | cases | {' | '.join(turns)} |",
            "|---|" + "---:|" * (len(turns) + 1),
        ]
        means = ["cases", MEAN_OF_MODALITIES] if len(modalities) > 1 else []
        for group in [*modalities, *means]:
            name = MEAN_OF_CASES if group == "cases" else group
            cells = [_cell(table.get((run, group, metric, t)), "mean") for t in turns]
            n = table[run, group, metric, turns[-1]]["n"]
            lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
        overall = [table.get((run, MEAN_OF_MODALITIES, metric, t)) for t in turns]
        ranges = [_cell(row, "ci95_low", "ci95_high") for row in overall]
        lines.append(f"| its 95 % interval | | {' | '.join(ranges)} |")
        for other in exact:
            found = [table.get((other, MEAN_OF_MODALITIES, metric, t)) for t in turns]
            if other != run and any(found):
                cells = [_cell(row, "mean") for row in found]
                lines.append(f"| {other}, {MEAN_OF_MODALITIES} | | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _settings(summary: Path, run: str) -> dict[str, Any]:
    """What a run of an evaluation depended on; empty where its folder is not there."""
    path = summary.parent / run / "settings.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _cell(row: Mapping[str, str] | None, *keys: str) -> str:
    """Figures of a row; a dash where there are none, as of the box round without boxes."""
    if row is None or any(math.isnan(float(row[key])) for key in keys):
        return "–"
    return "–".join(f"{float(row[key]):.3f}" for key in keys)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 after an error (one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m training.model_card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", required=True, help="file, or its name in weights/")
    parser.add_argument(
        "--figures", action="append", required=True, type=Figures.parse, metavar="[NAME=]CSV"
    )
    parser.add_argument("--card", type=Path, required=True, help="Markdown file with the markers")
    options = parser.parse_args(arguments)
    try:
        weights = find_weights(options.weights)
        write_figures(options.card, weights, read_figures(options.figures, weights))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(options.card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
