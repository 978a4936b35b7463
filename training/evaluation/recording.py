"""What the engine hands to post-processing, recorded: logits and prompts of every object and round.

    python -m training.evaluation.recording --cases DIR --out DIR [--objects 6] [--weights FILE]

The protocol is held once, with post-processing off; any number of post-processing variants can then
be applied to its records within seconds. That is open loop: the clicks are those that followed from
the masks as the engine made them.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.case import MAX_CLASSES, Box, Case, Click, ObjectPrompts, modality_of
from inference.model.weights import find_weights, sha256_of
from inference.refinement import ObjectLogits, merge
from inference.segmenter import Segmenter
from inference.whole_file import replacing
from training.evaluation.code_version import code_of
from training.evaluation.label_map import LabelMap
from training.evaluation.labelled_case import LabelledCase, load_labelled_case
from training.evaluation.metrics import CLICK_ROUNDS
from training.evaluation.perturbation import EXACT, PromptVariant
from training.evaluation.predictors import InProcess
from training.evaluation.protocol import run_case
from training.manifest import case_files, read_structures


@dataclass(frozen=True)
class RecordedCase:
    """The rounds of one case.

    Attributes:
        name: file name of the case.
        labels: of the case's file, in the order of the recorded labels 1..N.
        rounds: of each round held (number, 0 is the box round) each object's prompts and logits.
    """

    name: str
    labels: tuple[int, ...]
    rounds: dict[int, list[tuple[ObjectPrompts, ObjectLogits]]]


def restrict(case: LabelledCase, labels: Sequence[int]) -> LabelledCase:
    """The case with some of its classes only, renumbered 1..N in the order given."""
    everything = case.reference.labels
    number = np.zeros(int(case.reference.voxels.max()) + 1, np.uint8)
    number[list(labels)] = np.arange(1, len(labels) + 1)
    indices = [everything.index(label) for label in labels]
    arrays = dict(case.arrays)
    if "boxes" in arrays:
        arrays["boxes"] = arrays["boxes"][indices]
    return replace(
        case,
        arrays=arrays,
        reference=LabelMap.of(number[case.reference.voxels]),
        structures=tuple(case.structures[i] for i in indices),
    )


def choose_labels(case: LabelledCase, most: int) -> list[int]:
    """At most ``most`` of a case's labels, spread evenly over their order."""
    labels = case.reference.labels
    if len(labels) <= most:
        return labels
    return [labels[i] for i in np.linspace(0, len(labels) - 1, most).round().astype(int)]


def choose_cases(paths: Sequence[Path], per_modality: int) -> list[Path]:
    """At most ``per_modality`` cases of each modality, its sources taking turns."""
    by_source: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(paths):
        by_source[modality_of(path.name)]["_".join(path.name.split("_")[:2])].append(path)
    chosen = []
    for sources in by_source.values():
        queues = list(sources.values())
        turns = max(len(queue) for queue in queues)
        in_turn = [queue[i] for i in range(turns) for queue in queues if i < len(queue)]
        chosen += in_turn[:per_modality]
    return sorted(chosen)


def record_case(
    case: LabelledCase, segmenter: Segmenter, variant: PromptVariant = EXACT
) -> RecordedCase:
    """Hold the protocol with post-processing off and keep what post-processing would be given."""
    rounds: dict[int, list[tuple[ObjectPrompts, ObjectLogits]]] = {}
    prompts_of: dict[int, ObjectPrompts] = {}

    def keep(objects: Iterable[ObjectLogits], arrays: Case) -> NDArray[np.uint8]:
        results = list(objects)
        prompts_of.update({prompts.label: prompts for prompts in arrays.objects})
        turn = len(rounds) + ("boxes" not in case.arrays)  # without boxes there is no round 0
        rounds[turn] = [(prompts_of[result.label], result) for result in results]
        D, H, W = arrays.image.shape
        return merge(results, (D, H, W))

    predictor = InProcess(lambda arrays: segmenter.segment_case(arrays, keep))
    result, _ = run_case(case, predictor, variant)
    for held in result.rounds:
        if held is not None and held.error is not None:
            raise ValueError(f"{case.name}: {held.error}")
    return RecordedCase(case.name, tuple(case.reference.labels), rounds)


def save_record(path: Path, record: RecordedCase) -> None:
    """Write a record; the file appears whole or not at all."""
    arrays: dict[str, NDArray[Any]] = {"labels": np.array(record.labels, np.int64)}
    for turn, objects in record.rounds.items():
        for prompts, result in objects:
            key = f"{turn}.{result.label}"
            arrays[f"{key}.start"] = np.array(result.start, np.int64)
            arrays[f"{key}.logits"] = result.logits.astype(np.float16)
            clicks = [(*click.position, click.positive) for click in prompts.clicks]
            arrays[f"{key}.clicks"] = np.array(clicks, np.int64).reshape(-1, 4)
            if prompts.box is not None:
                box = prompts.box
                arrays[f"{key}.box"] = np.array([*box.start, *box.stop, box.middle], np.int64)
    with replacing(path) as file:
        np.savez(file, **arrays)


def load_record(path: Path) -> RecordedCase:
    """Read what :func:`save_record` wrote."""
    rounds: dict[int, list[tuple[ObjectPrompts, ObjectLogits]]] = defaultdict(list)
    with np.load(path) as file:
        labels = tuple(int(label) for label in file["labels"])
        for key in file.files:
            if not key.endswith(".logits"):
                continue
            stem = key.removesuffix(".logits")
            turn, label = (int(part) for part in stem.split("."))
            box = None
            if f"{stem}.box" in file.files:
                z0, y0, x0, z1, y1, x1, middle = (int(v) for v in file[f"{stem}.box"])
                box = Box((z0, y0, x0), (z1, y1, x1), middle)
            clicks = tuple(
                Click((int(z), int(y), int(x)), bool(positive))
                for z, y, x, positive in file[f"{stem}.clicks"]
            )
            z, y, x = (int(v) for v in file[f"{stem}.start"])
            logits = ObjectLogits(label, (z, y, x), file[key].astype(np.float32))
            rounds[turn].append((ObjectPrompts(label, box, clicks), logits))
    return RecordedCase(path.name, labels, dict(rounds))


def record_folder(
    cases: Path,
    out: Path,
    *,
    weights: Path,
    objects: int,
    per_modality: int | None = None,
    click_rounds: int = CLICK_ROUNDS,
    without_boxes_every: int | None = None,
) -> list[Path]:
    """Record the cases of a folder; those recorded before stay as they are.

    Args:
        cases: challenge files with ``gts``.
        out: a folder for these cases, weights and code (by content) and settings is made in it. A
            record there that is older than its case is made anew.
        weights: the segmenter's bundle.
        objects: most classes of a case.
        per_modality: most cases of a modality; all by default.
        click_rounds: rounds with clicks.
        without_boxes_every: every so many-th case goes without boxes.

    Returns:
        The records.

    Raises:
        ValueError: no case, a manifest that is none, a number out of range; cases that cannot be
            recorded, each named on stderr: the others are by then.
        OSError: a file cannot be read or written.
    """
    _check("objects", objects, 1, MAX_CLASSES)
    _check("per-modality", per_modality, 1)
    _check("click-rounds", click_rounds, 0, CLICK_ROUNDS)
    _check("without-boxes-every", without_boxes_every, 1)
    paths = case_files(cases)
    if not paths:
        raise ValueError(f"cases folder {cases}: no .npz file")
    read_structures(cases)  # or each case would tell what is wrong with it
    if per_modality is not None:
        paths = choose_cases(paths, per_modality)
    settings = f"{objects}-{per_modality or 'all'}-{click_rounds}-{without_boxes_every or 'never'}"
    if without_boxes_every is not None:  # which those are depends on all
        settings += f"-{zlib.crc32(repr([path.name for path in paths]).encode()):08x}"
    place = hashlib.sha256(str(cases.resolve()).encode()).hexdigest()
    engine = f"{sha256_of(weights)[:8]}-{code_of('segmenter')[:8]}"
    folder = out / f"{cases.name}-{place[:8]}-{engine}-{settings}"
    folder.mkdir(parents=True, exist_ok=True)
    variant = PromptVariant("recorded", click_rounds=click_rounds)
    segmenter: Segmenter | None = None
    records, refused = [], 0
    for index, path in enumerate(paths):
        record = folder / path.name
        records.append(record)
        if record.is_file() and record.stat().st_mtime >= path.stat().st_mtime:
            continue
        segmenter = segmenter or Segmenter.from_files(weights)
        boxes = without_boxes_every is None or index % without_boxes_every != 0
        try:
            case = load_labelled_case(path, boxes=boxes)
            labels = choose_labels(case, objects)
            recorded = record_case(restrict(case, labels), segmenter, variant)
        except (ValueError, OSError) as error:  # the others' records are kept for the next time
            print(f"error: {error}", file=sys.stderr, flush=True)
            refused += 1
            continue
        save_record(record, replace(recorded, labels=tuple(labels)))
        print(f"{index + 1}/{len(paths)} {path.name}: {len(labels)} objects", flush=True)
    if refused:
        raise ValueError(
            f"cases folder {cases}: {refused} of {len(paths)} cases cannot be recorded; the others "
            "are. Accepted: the folder once these are mended or removed"
        )
    return records


def _check(option: str, number: int | None, least: int, most: float = math.inf) -> None:
    if number is not None and not least <= number <= most:
        accepted = f"at least {least}" if math.isinf(most) else f"{least} to {most}"
        raise ValueError(f"--{option} {number}; accepted: {accepted}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Record a folder as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.recording", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--cases", type=Path, required=True, metavar="DIR", help="challenge files with gts")
    add("--out", type=Path, required=True, metavar="DIR", help="where the records go")
    add("--weights", default="default", metavar="FILE", help="bundle, or its name")
    add("--objects", type=int, default=6, metavar="N", help="most classes of a case")
    add("--per-modality", type=int, metavar="N", help="most cases of a modality (default: all)")
    add("--click-rounds", type=int, default=CLICK_ROUNDS, metavar="N", help="default: %(default)s")
    add("--without-boxes-every", type=int, metavar="N", help="every Nth case goes without boxes")
    add("--threads", type=int, metavar="N", help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads {options.threads}; accepted: at least 1")
        import torch

        torch.set_num_threads(options.threads)
    try:
        record_folder(
            options.cases,
            options.out,
            weights=find_weights(options.weights),
            objects=options.objects,
            per_modality=options.per_modality,
            click_rounds=options.click_rounds,
            without_boxes_every=options.without_boxes_every,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
