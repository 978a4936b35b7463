"""The challenge's protocol: a box round, then five rounds with one more click a class.

The rules are those of the evaluator of the CVPR 2025 challenge on interactive 3D biomedical
segmentation, to the letter; where a rule looks odd it is meant to be reproduced:

- A case without boxes has no box round; its scores there are 0.
- Spacing is passed to the surface distances as the file stores it, (x, y, z), for (z, y, x)
  arrays.
- Where a prediction fails the previous one is scored again, or nothing where there is none.
- A class that is already perfect gets no click, and None in its order.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.evaluation.clicks import next_click
from training.evaluation.label_map import LabelMap
from training.evaluation.labelled_case import LabelledCase
from training.evaluation.metrics import (
    CLICK_ROUNDS,
    SECONDS_PER_CLASS,
    area_under_curve,
    score,
)
from training.evaluation.perturbation import EXACT, PromptVariant
from training.evaluation.predictors import Arrays, PredictionError, Predictor

ROUNDS = 1 + CLICK_ROUNDS


@dataclass(frozen=True)
class Round:
    """One prediction: what it cost and how good it is, scores by class in order of the labels.

    Attributes:
        seconds: run time.
        peak_bytes: peak resident memory, None where unknown.
        dsc: DSC of each class.
        nsd: NSD of each class, all 0 where the mean DSC is 0.2 or less.
        error: why the prediction failed; the scores are then those of the previous one.
    """

    seconds: float
    peak_bytes: int | None
    dsc: tuple[float, ...]
    nsd: tuple[float, ...]
    error: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """A case after all its rounds.

    Attributes:
        name: file name.
        labels: the classes, ascending.
        structures: their names.
        voxels: their volumes in the reference.
        shape: of the image, (D, H, W).
        has_boxes: whether there was a box round.
        rounds: six entries, the first None without boxes.
        clicks: of each class the shown clicks ``(round, "fg" or "bg", (z, y, x))``.
    """

    name: str
    labels: tuple[int, ...]
    structures: tuple[str, ...]
    voxels: tuple[int, ...]
    shape: tuple[int, ...]
    has_boxes: bool
    rounds: tuple[Round | None, ...]
    clicks: tuple[tuple[tuple[int, str, tuple[int, ...]], ...], ...]

    @property
    def seconds(self) -> float:
        """Sum over the rounds."""
        return float(sum(r.seconds for r in self.rounds if r is not None))

    @property
    def seconds_allowed(self) -> int:
        """The challenge's limit on the sum over the rounds."""
        return SECONDS_PER_CLASS * len(self.labels)

    @property
    def is_late(self) -> bool:
        """Whether it took longer than allowed."""
        return self.seconds > self.seconds_allowed

    def counted(self, scores: list[float]) -> list[float]:
        """``scores`` as they count: 0 throughout where the case is late."""
        return [0.0] * len(scores) if self.is_late else scores

    def case_scores(self, metric: str) -> list[float]:
        """``dsc`` or ``nsd`` of each round, averaged over the classes; 0 without a box round."""
        return [0.0 if r is None else float(np.mean(getattr(r, metric))) for r in self.rounds]

    def class_scores(self, metric: str, index: int) -> list[float]:
        """``dsc`` or ``nsd`` of each round of one class (by position); 0 without a box round."""
        return [0.0 if r is None else float(getattr(r, metric)[index]) for r in self.rounds]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; floats survive it exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CaseResult:
        """The inverse of :meth:`to_json`."""
        rounds = [
            None if r is None else Round(**{**r, "dsc": tuple(r["dsc"]), "nsd": tuple(r["nsd"])})
            for r in values["rounds"]
        ]
        clicks = [
            tuple((turn, kind, tuple(position)) for turn, kind, position in one)
            for one in values["clicks"]
        ]
        plain = {key: tuple(values[key]) for key in ("labels", "structures", "voxels", "shape")}
        return cls(
            name=values["name"],
            has_boxes=values["has_boxes"],
            rounds=tuple(rounds),
            clicks=tuple(clicks),
            **plain,
        )


def official_row(result: CaseResult) -> dict[str, str | float | int]:
    """One line of the evaluator's CSV: its columns, in its order."""
    row: dict[str, str | float | int] = {
        "CaseName": result.name,
        "TotalRunningTime": result.seconds,
    }
    for turn, held in enumerate(result.rounds, 1):
        row[f"RunningTime_{turn}"] = 0.0 if held is None else held.seconds
    scores = {name: result.case_scores(name.lower()) for name in ("DSC", "NSD")}
    row |= {f"{name}_AUC": area_under_curve(rounds) for name, rounds in scores.items()}
    row |= {f"{name}_Final": rounds[-1] for name, rounds in scores.items()}
    for name, rounds in scores.items():
        row |= {f"{name}_{turn}": value for turn, value in enumerate(rounds, 1)}
    row["num_class"] = len(result.labels)
    row["runtime_upperbound"] = result.seconds_allowed
    return row


def run_case(
    case: LabelledCase, predictor: Predictor, variant: PromptVariant = EXACT
) -> tuple[CaseResult, NDArray[np.uint8]]:
    """Hold all rounds of one case.

    Args:
        case: what to segment.
        predictor: who segments it.
        variant: how the prompts differ from the challenge's, as a sloppy user would give them.

    Returns:
        The scores and clicks of all rounds, and the last label map, (D, H, W) uint8.
    """
    reference = case.reference
    shape = reference.voxels.shape
    labels = reference.labels
    random = variant.generator(case.name)
    # Clicks and a previous result that a file may hold are none of this protocol's.
    image = {key: case.arrays[key] for key in ("imgs", "spacing")}
    boxes = case.arrays.get("boxes")
    if boxes is not None:
        boxes = variant.boxes(boxes, shape, random)
    prompts = _Clicks(len(labels))
    current = LabelMap(np.zeros(shape, np.uint8), {})
    rounds: list[Round | None] = []
    for turn in range(ROUNDS):
        if turn == 0:
            if boxes is None:
                rounds.append(None)
                continue
            arrays = {**image, "boxes": boxes}
        elif turn > variant.click_rounds:
            held = rounds[-1]
            rounds.append(None if held is None else _carried_on(held))
            continue
        else:
            for index, label in enumerate(labels):
                click = next_click(reference, current, label)
                if click is None:
                    prompts.skip(index)
                else:
                    position = variant.move(click.position, shape, random)
                    prompts.add(index, turn, position, click.positive)
            arrays = {**image, **prompts.arrays(), "prev_pred": current.voxels}
            if boxes is not None:
                arrays["boxes"] = boxes
        held, current = _hold(arrays, case, predictor, current)
        rounds.append(held)
    result = CaseResult(
        name=case.name,
        labels=tuple(labels),
        structures=case.structures,
        voxels=tuple(
            int(np.count_nonzero(reference.voxels[reference.boxes[label]] == label))
            for label in labels
        ),
        shape=tuple(shape),
        has_boxes=boxes is not None,
        rounds=tuple(rounds),
        clicks=prompts.shown(),
    )
    return result, current.voxels.astype(np.uint8, copy=False)


def _hold(
    arrays: Arrays, case: LabelledCase, predictor: Predictor, previous: LabelMap
) -> tuple[Round, LabelMap]:
    """One round: predict and score; a failure leaves the previous label map in force."""
    error, seconds, peak = None, 0.0, None
    try:
        prediction = predictor(arrays, case.name)
    except PredictionError as failure:
        error, seconds = str(failure), failure.seconds
    else:
        _, seconds, peak = prediction
        previous = LabelMap.of(prediction.segs)
    scores = score(case.reference, previous, case.stored_spacing)
    return Round(seconds, peak, scores.dsc, scores.nsd, error), previous


def _carried_on(held: Round) -> Round:
    """A round in which nothing was asked, and so nothing failed."""
    return replace(held, seconds=0.0, peak_bytes=None, error=None)


class _Clicks:
    """The clicks of all classes so far, as the evaluator stores them."""

    def __init__(self, classes: int) -> None:
        self._positions: list[dict[str, list[list[np.int64]]]] = [
            {"fg": [], "bg": []} for _ in range(classes)
        ]
        self._order: list[list[str | None]] = [[] for _ in range(classes)]
        self._shown: list[list[tuple[int, str, tuple[int, ...]]]] = [[] for _ in range(classes)]

    def skip(self, index: int) -> None:
        self._order[index].append(None)

    def add(self, index: int, turn: int, position: Sequence[int], positive: bool) -> None:
        kind = "fg" if positive else "bg"
        self._positions[index][kind].append([np.int64(c) for c in position])
        self._order[index].append(kind)
        self._shown[index].append((turn, kind, tuple(int(c) for c in position)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """``clicks`` and ``clicks_order`` as a challenge file gives them back."""
        return {
            "clicks": np.array(copy.deepcopy(self._positions)),
            "clicks_order": np.array(self._order),
        }

    def shown(self) -> tuple[tuple[tuple[int, str, tuple[int, ...]], ...], ...]:
        return tuple(tuple(one) for one in self._shown)
