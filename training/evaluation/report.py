"""``report.html``: one self-contained page about all runs in a folder."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.whole_file import replacing
from training.evaluation import figures
from training.evaluation.ablation_table import ablation_tables
from training.evaluation.comparison import Difference
from training.evaluation.protocol import CaseResult
from training.evaluation.results import RunFolder, read_csv
from training.evaluation.summary import (
    COLUMNS,
    MEAN_OF_MODALITIES,
    METRICS,
    modality_rows,
    stress_rows,
)

_LOSS = ("", "_loss")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
       max-width: 1080px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h3 { margin: 1.6rem 0 .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; } tbody tr { border-bottom: 1px solid #eee; }
tr.mean { font-weight: 600; } td.best { background: #e3f3e8; }
svg, img { max-width: 100%; height: auto; display: block; }
figure { margin: 1.2rem 0 1.6rem; } figcaption, .note { color: #555; font-size: .88rem; }
.key b { font-weight: 600; } summary { cursor: pointer; }
"""


def write_report(
    path: Path,
    runs: Sequence[RunFolder],
    differences: Mapping[str, Sequence[Difference]],
) -> None:
    """Write the page, with post-processing's ablation and reliability where their tables lie there.

    Args:
        path: the file.
        runs: what it is about; those without cases are left out.
        differences: by run, against the table it was compared with.
    """
    results = {run.name: run.results() for run in runs}
    results = {name: found for name, found in results.items() if found}
    stressed = stress_rows(results)
    # Sloppy prompts have a table of their own, beside the exact ones.
    results = {
        name: found
        for name, found in results.items()
        if "@" not in name or name.partition("@")[0] not in results
    }
    parts = ["<h1>Interactive segmentation: evaluation</h1>"]
    if results:
        parts += [_introduction(results), _overview(results)]
    if stressed:
        parts.append(_stress(stressed))
    ablation = path.with_name("ablation.csv")
    if ablation.is_file():
        parts.append(_ablation(read_csv(ablation)))
    reliability = path.with_name("reliability.csv")
    if reliability.is_file():
        parts.append(_reliability(read_csv(reliability)))
    for run in runs:
        if run.name in results:
            parts.append(_run(run, results[run.name], differences.get(run.name, ())))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode())


def _introduction(results: Mapping[str, Sequence[CaseResult]]) -> str:
    cases = len({result.name for found in results.values() for result in found})
    return (
        f"<p>{len(results)} runs on {cases} cases, by the rules of the CVPR 2025 challenge on "
        "interactive 3D biomedical segmentation: one prediction from the boxes, then five rounds "
        "with one more click a class at the deepest point of its largest error. Scores are means "
        "over the classes of a case, then over cases; NSD has a tolerance of 2 mm. AUC is the "
        "trapezoid over the five click rounds (at most 4); Final is the last round.</p>"
    )


def _overview(results: Mapping[str, Sequence[CaseResult]]) -> str:
    """Runs side by side: one row a run."""
    parts = ["<h2>All runs</h2>"]
    for metric in METRICS:
        rows = []
        for name, found in results.items():
            # The row over all modalities, or the only one there is.
            means = modality_rows(found, metric)
            overall = next((row for row in means if row[0] == MEAN_OF_MODALITIES), means[0])
            rows.append((name, overall[1], list(overall[2])))
        parts.append(f"<h3>{metric.upper()}, mean of the modalities</h3>")
        parts.append(_table(("run", "cases", *COLUMNS), rows, mark_best=True))
    parts.append(_figure(figures.rounds_by_modality(results), "DSC and NSD by round."))
    parts.append(
        _figure(
            figures.cost_by_volume(results),
            "Time and peak memory by volume size. In-process predictors share the memory of the "
            "evaluation itself.",
        )
    )
    return "\n".join(parts)


def _stress(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a sloppy user loses."""
    columns = [f"{m.upper()}_{c}{k}" for m in METRICS for c in ("first", "final") for k in _LOSS]
    header = ["loss" if c.endswith("_loss") else c.replace("_", " ") for c in columns]
    return "\n".join(
        [
            "<h2>Sloppy prompts</h2>",
            '<p class="note">Means over cases; the loss is against the exact prompts on the same '
            "cases. First is the box round, or the first click where a run has no boxes. A box "
            "jitter moves each face by up to that percentage of the edge, a click shift each click "
            "by up to that many voxels along each axis.</p>",
            _table(
                ("run and prompts", "cases", *header),
                [
                    (f"{r['run']}, {r['prompts']}", r["cases"], [float(r[c]) for c in columns])
                    for r in rows
                ],
            ),
        ]
    )


def _ablation(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the steps of post-processing are worth."""
    parts = [
        "<h2>Post-processing</h2>",
        '<p class="note">Each of the paper\'s steps alone, each left out of their chain, the whole '
        "chain, and steps chosen by rules (auto), on the same logits: the rounds were held once, "
        "without post-processing. In brackets the 95 % interval over cases of the paired "
        "difference.</p>",
    ]
    for table in ablation_tables(rows):
        parts.append(f"<h3>{html.escape(table.title)}</h3>")
        lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
        parts.append(_html_table(table.header, [f"<tr>{line}</tr>" for line in lines]))
    return "\n".join(parts)


def _reliability(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether probabilities are what they say."""
    errors = {row["modality"]: f"{row['modality']} {float(row['error']):.3f}" for row in rows}
    return "\n".join(
        (
            "<h2>Reliability of probabilities</h2>",
            '<p class="note">Voxels of each object\'s cut-out by tenths of probability, before '
            "post-processing, all rounds; each object counts as one. Expected calibration error: "
            f"{html.escape(', '.join(errors.values()))}.</p>",
            _figure(
                figures.reliability(rows),
                "How often voxels of a probability belong to the object: on the line, if it is "
                "what it says. The larger a point, the more voxels.",
            ),
        )
    )


def _run(run: RunFolder, results: Sequence[CaseResult], differences: Sequence[Difference]) -> str:
    settings = "; ".join(
        f"{key} {value}" for key, value in run.settings().items() if value not in (None, "")
    )
    parts = [
        f"<h2>{html.escape(run.name)}</h2>",
        f'<details class="note"><summary>Settings</summary>{html.escape(settings)}</details>',
    ]
    for metric in METRICS:
        rows = [(n, count, list(values)) for n, count, values in modality_rows(results, metric)]
        parts.append(f"<h3>{metric.upper()} by modality</h3>")
        parts.append(_table(("", "cases", *COLUMNS), rows))
    late = sorted(r.name for r in results if r.is_late)
    if late:
        names = html.escape(", ".join(late))
        parts.append(f'<p class="note">Over the time limit, counted as 0: {names}.</p>')
    parts.append(_figure(figures.case_scatter(results), "Each case, before and after the clicks."))
    if differences:
        parts.append(_differences(run.name, differences))
    parts.append(_pictures(run, results))
    return "\n".join(parts)


def _pictures(run: RunFolder, results: Sequence[CaseResult]) -> str:
    """The best, the median and the worst case, each through its most typical object."""
    ordered = sorted(results, key=lambda r: r.counted(r.case_scores("dsc"))[-1])
    chosen = {"Worst": ordered[0], "Median": ordered[len(ordered) // 2], "Best": ordered[-1]}
    parts = [
        "<h3>Worst, median and best case</h3>",
        '<p class="note key">Of each case the object whose final DSC is nearest to the case\'s '
        "mean, cut where most of it is seen. Green: reference. Pink: prediction after five clicks. "
        "Yellow +: foreground clicks; blue ×: background clicks; faint where they lie on other "
        "slices.</p>",
    ]
    for word, result in chosen.items():
        dsc = [result.class_scores("dsc", i)[-1] for i in range(len(result.labels))]
        index = int(np.argmin(np.abs(np.array(dsc) - np.mean(dsc))))
        try:
            case, segs = run.load_case(result.name), run.load_segs(result.name)
            reference = case.reference
            if (reference.voxels.shape, tuple(reference.labels)) != (result.shape, result.labels):
                raise ValueError("the case has other labels or another shape since")
            if segs.shape != result.shape:
                raise ValueError(f"a label map of shape {segs.shape}")
            png = figures.slices_through_object(case, result, segs, index)
        except (ValueError, OSError) as error:  # an old run's cases may have moved
            note = html.escape(f"{word}: {result.name}, not shown: {error}")
            parts.append(f'<p class="note">{note}</p>')
            continue
        structure = result.structures[index]
        caption = (
            f"{word}: {result.name}, mean DSC {np.mean(dsc):.3f}; shown: class "
            f"{result.labels[index]}{f' ({structure})' if structure else ''}, DSC {dsc[index]:.3f}"
        )
        data = base64.b64encode(png).decode()
        image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        parts.append(_figure(image, caption))
    return "\n".join(parts)


def _differences(name: str, differences: Sequence[Difference]) -> str:
    rows = [(d.column, len(d.cases), [d.mean, d.better, d.worse, d.p_value]) for d in differences]
    final = next(d for d in differences if d.column == "DSC_Final")
    gaps = sorted(zip(final.ours - final.theirs, final.cases, strict=True))
    extreme = [
        (case, "", [gap]) for gap, case in (gaps if len(gaps) <= 10 else gaps[:5] + gaps[-5:])
    ]
    return "\n".join(
        [
            "<h3>Against the compared run</h3>",
            _table(("", "cases", "mean difference", "better", "worse", "sign test p"), rows),
            _figure(figures.difference_scatter(final, name, "compared"), "Each case, both runs."),
            "<h3>Largest differences in DSC_Final</h3>",
            _table(("case", "", "difference"), extreme),
        ]
    )


def _table(
    header: Sequence[str],
    rows: Sequence[tuple[str, object, list[float]]],
    *,
    mark_best: bool = False,
) -> str:
    """An HTML table; counts as such, other numbers with four digits, NaN as a dash."""
    best: list[float] = []
    if mark_best and len(rows) > 1:
        columns = np.array([values for _, _, values in rows])
        best = [
            float(np.nanmax(column)) if not np.isnan(column).all() else math.nan
            for column in columns.T
        ]
    body = []
    for name, count, values in rows:
        cells = [
            f"<td{' class=best' if best and value == best[i] else ''}>{_number(value)}</td>"
            for i, value in enumerate(values)
        ]
        kind = ' class="mean"' if name.startswith("mean of") else ""
        body.append(f"<tr{kind}><td>{html.escape(name)}</td><td>{count}</td>{''.join(cells)}</tr>")
    return _html_table(header, body)


def _html_table(header: Sequence[str], body: Sequence[str]) -> str:
    """A table of finished rows that scrolls where the page is too narrow."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return (
        f'<div class="scroll"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "–" if math.isnan(value) else f"{value:.4f}"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"
