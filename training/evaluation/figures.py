"""The report's figures, as SVG text or PNG bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from inference.overlay import fullest_slices
from training.evaluation.comparison import Difference
from training.evaluation.label_map import LabelMap, union
from training.evaluation.labelled_case import LabelledCase
from training.evaluation.protocol import ROUNDS, CaseResult
from training.evaluation.summary import METRICS, modality_in_tables, modality_rows

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
_MARKERS = "osD^vPX*"
_REFERENCE, _PREDICTION = "#00e070", "#ff5ca8"
_ROUND_NAMES = ("box", *map(str, range(1, ROUNDS)))
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "svg.fonttype": "none",  # text stays text: smaller, and searchable
    "svg.hashsalt": "report",  # the same figure gives the same bytes
    "figure.constrained_layout.use": True,
}

Runs = Mapping[str, Sequence[CaseResult]]


def rounds_by_modality(runs: Runs) -> str:
    """DSC and NSD against the rounds, a column of panels a modality, a line a run."""
    names = sorted({modality_in_tables(r.name) for results in runs.values() for r in results})
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            2, len(names), figsize=(2.1 * len(names) + 1.2, 4.6), sharex=True, squeeze=False
        )
        for run, (label, results) in enumerate(runs.items()):
            for row, metric in enumerate(METRICS):
                means = {name: values for name, _, values in modality_rows(results, metric)}
                for column, name in enumerate(names):
                    if name in means:
                        axes[row, column].plot(
                            range(ROUNDS),
                            means[name][:ROUNDS],
                            color=_COLOURS[run % len(_COLOURS)],
                            marker=_MARKERS[run % len(_MARKERS)],
                            markersize=4,
                            linewidth=1.5,
                            label=_plain(label),
                        )
        for column, name in enumerate(names):
            axes[0, column].set_title(name)
            axes[1, column].set_xlabel("clicks")
            for row in range(2):
                axes[row, column].set(ylim=(0, 1.02), xticks=range(ROUNDS))
                axes[row, column].set_xticklabels(_ROUND_NAMES)
                axes[row, column].tick_params(labelleft=column == 0)
        for row, metric in enumerate(METRICS):
            axes[row, 0].set_ylabel(metric.upper())
        _legend(figure, axes[0, 0] if len(names) else None)
        return _svg(figure)


def cost_by_volume(runs: Runs) -> str:
    """Seconds a round and peak memory against the volume's voxels, a point a case."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
        for run, (label, results) in enumerate(runs.items()):
            look = {
                "color": _COLOURS[run % len(_COLOURS)],
                "marker": _MARKERS[run % len(_MARKERS)],
                "s": 16,
                "alpha": 0.75,
                "linewidths": 0,
            }
            voxels = [np.prod(r.shape) / 1e6 for r in results]
            # Of rounds held: where clicks end early the last one is carried on, in no time.
            held = [[h.seconds for h in r.rounds if h is not None and h.seconds] for r in results]
            seconds = [np.mean(times or [np.nan]) for times in held]
            left.scatter(voxels, seconds, label=_plain(label), **look)
            peaks = [
                (v, max(h.peak_bytes for h in r.rounds if h and h.peak_bytes) / 2**30)
                for v, r in zip(voxels, results, strict=True)
                if any(h and h.peak_bytes for h in r.rounds)
            ]
            right.scatter(*zip(*peaks, strict=True) if peaks else ((), ()), **look)
        left.set(xscale="log", yscale="log", xlabel="million voxels", ylabel="seconds a round")
        right.set(xscale="log", xlabel="million voxels", ylabel="peak memory, GiB", ylim=(0, None))
        _legend(figure, left)
        return _svg(figure)


def case_scatter(results: Sequence[CaseResult]) -> str:
    """DSC after the last round against DSC after the first, a point a case."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.8))
        names = sorted({modality_in_tables(r.name) for r in results})
        for number, name in enumerate(names):
            of_it = [
                r.counted(r.case_scores("dsc"))
                for r in results
                if modality_in_tables(r.name) == name
            ]
            boxed = [r.has_boxes for r in results if modality_in_tables(r.name) == name]
            first = [s[0] if box else s[1] for s, box in zip(of_it, boxed, strict=True)]
            axes.scatter(
                first,
                [scores[-1] for scores in of_it],
                color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                s=22,
                alpha=0.85,
                linewidths=0,
                label=name,
            )
        _diagonal(axes, "DSC of the first prediction", "DSC after five clicks")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return _svg(figure)


def reliability(rows: Sequence[Mapping[str, Any]]) -> str:
    """Frequency of the object against probability, a curve a modality.

    Args:
        rows: of ``reliability.csv``.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.8))
        for number, name in enumerate(dict.fromkeys(row["modality"] for row in rows)):
            known = [r for r in rows if r["modality"] == name and r["frequency"] not in ("", None)]
            across, up, share = (
                [float(row[key]) for row in known] for key in ("probability", "frequency", "share")
            )
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(across, up, color=colour, linewidth=1)
            axes.scatter(
                across,
                up,
                s=[8 + 60 * s for s in share],
                color=colour,
                marker=_MARKERS[number % len(_MARKERS)],
                linewidths=0,
                label=name,
            )
        _diagonal(axes, "probability", "frequency")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return _svg(figure)


def difference_scatter(difference: Difference, ours: str, theirs: str) -> str:
    """Our score against theirs, a point a case."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 3.8))
        axes.scatter(difference.theirs, difference.ours, color=_COLOURS[0], s=22, linewidths=0)
        across, up = (_plain(f"{difference.column}, {run}") for run in (theirs, ours))
        _diagonal(axes, across, up)
        return _svg(figure)


def slices_through_object(
    case: LabelledCase, result: CaseResult, segs: NDArray[np.uint8], index: int
) -> bytes:
    """Three orthogonal slices through one object: image, outlines, clicks; PNG.

    Args:
        case: the image and its reference.
        result: the clicks.
        segs: (D, H, W), the last label map.
        index: position of the object's class.
    """
    label = result.labels[index]
    reference = case.reference
    box = union([reference.boxes[label], LabelMap.of(segs).boxes.get(label)])
    assert box is not None
    crop = tuple(
        slice(max(edge.start - margin, 0), edge.stop + margin)
        for edge in box
        for margin in [4 + (edge.stop - edge.start) // 4]
    )
    image = np.asarray(case.arrays["imgs"][crop], np.float32)
    truth, found = reference.voxels[crop] == label, segs[crop] == label
    centre = fullest_slices(truth)
    spacing = case.spacing_mm
    low, high = np.percentile(image, (0.5, 99.5))
    clicks = [
        (np.subtract(position, [edge.start for edge in crop]), kind)
        for _, kind, position in result.clicks[index]
    ]
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.3))
        for axis, panel in enumerate(panels):
            down, across = (a for a in range(3) if a != axis)
            cut = [np.take(volume, centre[axis], axis) for volume in (image, truth, found)]
            panel.imshow(
                cut[0], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest"
            )
            panel.set_aspect(spacing[down] / spacing[across])
            for mask, colour in ((cut[1], _REFERENCE), (cut[2], _PREDICTION)):
                if mask.any():
                    # With a border, so that an outline is closed at the edge of the picture.
                    edges = np.pad(mask.astype(float), 1)
                    rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
                    panel.contour(columns, rows, edges, [0.5], colors=colour, linewidths=1.3)
            for position, kind in clicks:
                depth = abs(int(position[axis]) - centre[axis]) * spacing[axis]
                near = depth <= 2 * max(spacing)
                panel.plot(
                    position[across],
                    position[down],
                    marker="+" if kind == "fg" else "x",
                    color="#ffe000" if kind == "fg" else "#40c4ff",
                    markersize=8 if near else 5,
                    markeredgewidth=2 if near else 1,
                    alpha=1 if near else 0.45,
                    linestyle="",
                )
            panel.set(
                xlim=(-0.5, cut[0].shape[1] - 0.5),
                # Slice 0 is at the feet in most scans, and a viewer shows the head on top.
                ylim=(cut[0].shape[0] - 0.5, -0.5) if axis == 0 else (-0.5, cut[0].shape[0] - 0.5),
                xticks=[],
                yticks=[],
                xlabel=f"{('axial', 'coronal', 'sagittal')[axis]}, "
                f"{'zyx'[axis]} = {centre[axis] + crop[axis].start}",
            )
        return _png(figure)


def _plain(text: str) -> str:
    """``text`` for matplotlib, which takes what lies between dollars for a formula."""
    return text.replace("$", r"\$")


def _diagonal(axes: Axes, across: str, up: str) -> None:
    low, high = 0.0, max(1.0, *(axis[1] for axis in (axes.get_xlim(), axes.get_ylim())))
    axes.plot([low, high], [low, high], color="#999999", linewidth=1, zorder=0)
    axes.set(xlim=(low, high * 1.02), ylim=(low, high * 1.02), xlabel=across, ylabel=up)


def _legend(figure: Figure, axes: Axes | None) -> None:
    handles, labels = axes.get_legend_handles_labels() if axes is not None else ([], [])
    if len(labels) > 1:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False
        )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    # Inline SVG needs neither the XML header nor the description of its origin.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
