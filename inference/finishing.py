"""From the objects' logits to the label map: post-processing, and who gets a voxel of two."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from inference.case import Case
from inference.probabilities import Probabilities
from inference.refinement import SURE, ObjectLogits, merge

if TYPE_CHECKING:
    from inference.policy import Policy
    from inference.postprocessing import Span

#: off: masks as the network draws them; paper: the paper's five steps; auto: the fitted policy.
POSTPROCESSING = ("off", "paper", "auto")
DEFAULT = "auto"


@dataclass
class Finisher:
    """Makes the label map of a case out of its objects' logits.

    Attributes:
        postprocess: of :data:`POSTPROCESSING`.
        label_priority: where two objects claim a voxel the lower label gets it, as in the paper;
            else the object with the higher probability there, and of equal ones the lower label.
            ``paper`` implies it.
        save_probabilities: whether to keep what :attr:`probabilities` gives.
        probabilities: of the case finished last, None unless they are to be saved.

    Raises:
        ValueError: an unknown kind of post-processing, or a table of rules that cannot be read.
    """

    postprocess: str = DEFAULT
    label_priority: bool = False
    save_probabilities: bool = False
    probabilities: Probabilities | None = field(default=None, init=False)
    _policy: Policy | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Refuse what is unknown now, not after minutes of work."""
        if self.postprocess not in POSTPROCESSING:
            raise ValueError(
                f"post-processing {self.postprocess!r}; accepted: {', '.join(POSTPROCESSING)}"
            )
        if self.postprocess == "auto":
            from inference.policy import load_policy

            self._policy = load_policy()

    def __call__(self, results: Iterable[ObjectLogits], case: Case) -> NDArray[np.uint8]:
        """The label map.

        Args:
            results: logits of the case's objects, labels ascending; taken one at a time.
            case: what they were made from.

        Returns:
            (D, H, W) uint8. Clicks have their way with ``off`` and ``auto``; with ``paper`` they
            may lose their voxels.
        """
        D, H, W = case.image.shape
        if self.save_probabilities:
            self.probabilities = Probabilities(case.spacing_mm)
            results = self.probabilities.watch(results)
        if self.postprocess == "paper":
            from inference.postprocessing import OBJECT_STEPS, resolve_overlaps

            objects = paper_masks(results, (D, H, W), OBJECT_STEPS)
            return resolve_overlaps(objects, np.zeros((D, H, W), np.uint8))
        if self._policy is not None:
            results = self._policy.clean(results, case)
        if self.label_priority:
            results = (prioritised(result) for result in results)
        return merge(results, (D, H, W))


def paper_masks(
    results: Iterable[ObjectLogits], shape: tuple[int, int, int], steps: Collection[str]
) -> Iterator[tuple[int, Span, NDArray[np.bool_]]]:
    """Some of the paper's steps 1-4 on every object's own mask: label, region and mask in it."""
    from inference.postprocessing import clean_object

    for result in results:
        cleaned = clean_object(result.logits > 0, result.start, shape, steps)
        if cleaned is not None:
            yield (result.label, *cleaned)


def prioritised(result: ObjectLogits) -> ObjectLogits:
    """Logits that win by label: a lower label's mask outvotes a higher one's, clicks outvote both.

    The mask, where logits are positive, stays what it is.
    """
    rank = np.float32((256 - result.label) / 256)
    logits = np.where((result.logits > 0) & (result.logits <= SURE), rank, result.logits)
    return ObjectLogits(result.label, result.start, logits)
