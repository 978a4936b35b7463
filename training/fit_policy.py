"""Fit the table of post-processing rules (``inference/policy.toml``) on training cases.

    python -m training.fit_policy --cases TRAIN --cache DIR [--weights FILE] [--out FILE]

The procedure:

1. The challenge's protocol is held on a spread of the training cases with post-processing off,
   every fourth case without boxes. What the engine hands to post-processing is recorded, and copied
   with noise on the logits: the network has trained on these cases and errs less on them than on
   new ones. A unit is one object in one round at one level of noise.
2. Step by step, in the order of application and on top of the rules found so far, every unit gets
   every amount of the step. A candidate is an amount, for one modality or any, without a condition
   or with one on a measurement of the object, split at a quantile. (More conditions, or worth
   without the standard error, chose rules that cross-validation then refused.) The threshold mends
   what the network's own probabilities have wrong, so it is fitted on undegraded units alone, and
   its conditions are given: a box, since without one the network is unsure which object is meant
   rather than where its outline lies, and a click, since before the first the engine cuts lower by
   itself.
3. A candidate is worth its mean gain in DSC less one standard error; modalities weigh alike, so do
   patients in them and units in those. A candidate is out where, for any modality's undegraded
   units, mean gain less one standard error is a loss beyond the tolerance.
4. Cross-validation over patients: the best candidate on four fifths is applied to the last fifth. A
   step is taken only if that gains (the 95 % interval over patients lies above 0) and no
   modality's undegraded units lose more than the tolerance. Then the best candidate on all patients
   becomes a rule, and the step is tried again on what its rules leave out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from inference.adaptive_steps import STEPS, Region, apply_step
from inference.case import modality_of
from inference.model.weights import find_weights, sha256_of
from inference.object_features import FEATURES, ObjectFeatures, measure
from inference.policy import ANY, POLICY_FILE, Condition, Rule
from inference.whole_file import replacing
from training.evaluation.degradation import degrade
from training.evaluation.intervals import mean_intervals
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.recording import load_record, record_folder, restrict

#: Amounts that are tried of each step.
AMOUNTS = {
    "threshold": (0.25, 0.5, 0.75),
    "trim": (0.2, 0.5),  # never to the very slice: boxes are drawn by people
    "islands": (0.02, 0.05, 0.1, 0.2),
    "cavities": (0.02, 1.0),
    "gaps": (0.03, 0.06),
    "smooth": (0.02, 0.04, 0.08),
}
#: Conditions of a step's rules that are given, not fitted; such rules get no others.
PRECONDITIONS = {
    "threshold": (
        Condition("boxed", False, 1.0),
        Condition("clicks", False, 1.0),
    ),
}
#: Steps whose worth is judged on undegraded units alone.
UNDEGRADED = ("threshold",)
#: Levels of noise, and the rounds that count at each.
LEVELS = {0.0: (0, 1, 2, 3), 1.0: (0, 3), 3.0: (0, 3)}
TOLERANCE = 0.0005  # of DSC
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_FOLDS = 5
_RULES_A_STEP = 3


@dataclass
class Unit:
    """One object in one round at one level of noise.

    Attributes:
        modality: of its case.
        patient: the same for all images of one patient.
        level: of noise.
        features: measured before any step.
        region: what its prompts say.
        reference: (d, h, w) true mask in the cut-out.
        voxels: of the whole true mask.
        logits: (d, h, w) after the steps so far.
    """

    modality: str
    patient: str
    level: float
    features: ObjectFeatures
    region: Region
    reference: NDArray[np.bool_]
    voxels: int
    logits: NDArray[np.float32]

    def dice(self, logits: NDArray[np.float32]) -> float:
        """DSC of the mask of some logits."""
        mask = logits > 0
        common = np.count_nonzero(mask & self.reference)
        return 2 * common / (np.count_nonzero(mask) + self.voxels)


@dataclass
class Step:
    """What is known of one step: the gain of every unit by every amount."""

    name: str
    gains: NDArray[np.float64]  # (units, amounts)
    rules: list[Rule] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_units(records: Sequence[Path], cases: Path) -> Iterator[Unit]:
    """The units of recorded cases whose files lie in ``cases``; objects not found are left out."""
    for path in records:
        record = load_record(path)
        case = restrict(load_labelled_case(cases / path.name), record.labels)
        image, truth = case.arrays["imgs"], case.reference.voxels
        D, H, W = truth.shape
        for level, rounds in LEVELS.items():
            for turn in rounds:
                for prompts, recorded in record.rounds.get(turn, ()):
                    seed = f"{path.name} {turn} {prompts.label}"
                    result = degrade(recorded, (D, H, W), level, seed)
                    if not (result.logits > 0).any():
                        continue
                    place = result.place
                    region = Region.of(result, prompts, case.spacing_mm)
                    box = case.reference.boxes[prompts.label]
                    yield Unit(
                        modality_of(path.name),
                        path.stem.split("_", 1)[-1],
                        level,
                        measure(result.logits, image[place], region, len(prompts.clicks)),
                        region,
                        truth[place] == prompts.label,
                        int(np.count_nonzero(truth[box] == prompts.label)),
                        result.logits,
                    )


class Fit:
    """Fits rules on units, step by step."""

    def __init__(self, units: Sequence[Unit], random: np.random.Generator) -> None:
        """Take the units; ``random`` deals patients into folds."""
        self.units = units
        self.modality = np.array([unit.modality for unit in units])
        self.modalities = sorted(set(self.modality))
        self.clean = np.array([unit.level == 0 for unit in units])
        self.features = np.array(
            [[getattr(unit.features, name) for name in FEATURES] for unit in units]
        )
        groups = [f"{unit.modality} {unit.patient}" for unit in units]
        self.groups, self.group = np.unique(groups, return_inverse=True)
        self.group_modality = np.array([name.split(" ")[0] for name in self.groups])
        patients, patient = np.unique([unit.patient for unit in units], return_inverse=True)
        self.fold = random.permutation(len(patients))[patient] % _FOLDS

    def run(self) -> list[Step]:
        """Rules of all steps; the units' logits are those after them."""
        steps = []
        for name, amounts in AMOUNTS.items():
            before = np.array([unit.dice(unit.logits) for unit in self.units])
            gains = np.empty((len(self.units), len(amounts)))
            for i, unit in enumerate(tqdm(self.units, desc=name, disable=not sys.stderr.isatty())):
                for j, amount in enumerate(amounts):
                    logits = apply_step(name, unit.logits, unit.region, amount)
                    gains[i, j] = unit.dice(logits) - before[i]
            step = Step(name, gains)
            self._choose(step)
            for unit in self.units:
                rule = next(
                    (r for r in step.rules if r.applies(unit.modality, unit.features)), None
                )
                if rule is not None:
                    unit.logits = apply_step(name, unit.logits, unit.region, rule.amount)
            steps.append(step)
        return steps

    def _choose(self, step: Step) -> None:
        """Add rules to a step while cross-validation says that they help."""
        left = np.ones(len(self.units), bool)
        judges = self.clean if step.name in UNDEGRADED else np.ones(len(self.units), bool)
        while len(step.rules) < _RULES_A_STEP:
            held_out = np.zeros(len(self.units))
            for fold in range(_FOLDS):
                rule = self._best(step, left, judges & (self.fold != fold))
                if rule is not None:
                    there = self.fold == fold
                    covers = left & self._covers(rule)
                    held_out[there] = self._gain(step, rule, covers)[there]
            mean, low, high = self._interval(held_out, judges)
            worst = float(self._by_modality(held_out, self.clean)[0].min())
            best = self._best(step, left, judges)
            verdict = best is not None and low > 0 and worst >= -TOLERANCE
            what = "nothing" if best is None else _in_words(best)
            step.notes.append(
                f"{step.name}: {what}; cross-validated gain {mean:+.4f} [{low:+.4f}, {high:+.4f}], "
                f"worst modality undegraded {worst:+.4f}: {'taken' if verdict else 'left'}"
            )
            if best is None or not verdict:
                return
            step.rules.append(best)
            left &= ~self._covers(best)
            if not left.any():
                return

    def _best(self, step: Step, left: NDArray[np.bool_], among: NDArray[np.bool_]) -> Rule | None:
        """The candidate of the highest worth on some units, None where none is worth anything."""
        best, most = None, 0.0
        for modality in (ANY, *self.modalities):
            base = Rule(step.name, 0, modality, PRECONDITIONS.get(step.name, ()))
            covers = left & self._covers(base)
            if not (covers & among).any():
                continue
            narrower = () if base.conditions else self._narrower(base, covers, among)
            for rule, inside in ((base, covers), *narrower):
                for amount in AMOUNTS[step.name]:
                    candidate = replace(rule, amount=amount)
                    worth = self._worth(step, candidate, inside, among)
                    if worth > most and self._harmless(step, candidate, inside, among):
                        best, most = candidate, worth
        return best

    def _narrower(
        self, rule: Rule, covers: NDArray[np.bool_], among: NDArray[np.bool_]
    ) -> Iterator[tuple[Rule, NDArray[np.bool_]]]:
        """The rule with one more condition, and the units it then covers."""
        for column, feature in enumerate(FEATURES):
            values = self.features[:, column]
            quantiles = np.quantile(values[covers & among], _QUANTILES)
            for limit in sorted({float(f"{quantile:.3g}") for quantile in quantiles}):
                for below in (True, False):
                    inside = covers & ((values < limit) == below)
                    if (inside & among).any() and inside.sum() < covers.sum():
                        condition = Condition(feature, below, limit)
                        yield replace(rule, conditions=(*rule.conditions, condition)), inside

    def _covers(self, rule: Rule) -> NDArray[np.bool_]:
        return np.array([rule.applies(unit.modality, unit.features) for unit in self.units])

    def _gain(self, step: Step, rule: Rule, covers: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.where(covers, step.gains[:, AMOUNTS[step.name].index(rule.amount)], 0)

    def _patients(
        self, gain: NDArray[np.float64], among: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Mean gain of each patient in each modality, and which of them have units at all."""
        counts = np.bincount(self.group[among], minlength=len(self.groups))
        sums = np.bincount(self.group[among], gain[among], minlength=len(self.groups))
        return sums / np.maximum(counts, 1), counts > 0

    def _worth(
        self, step: Step, rule: Rule, covers: NDArray[np.bool_], among: NDArray[np.bool_]
    ) -> float:
        """Mean gain over modalities less its standard error."""
        means, errors = self._by_modality(self._gain(step, rule, covers), among)
        return float(means.mean() - np.sqrt(np.square(errors).sum()) / len(means))

    def _harmless(
        self, step: Step, rule: Rule, covers: NDArray[np.bool_], among: NDArray[np.bool_]
    ) -> bool:
        """Whether no modality's undegraded units lose beyond the tolerance."""
        means, errors = self._by_modality(self._gain(step, rule, covers), among & self.clean)
        return bool((means - errors >= -TOLERANCE).all())

    def _by_modality(
        self, gain: NDArray[np.float64], among: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean over patients and its standard error (0 for a single one) of each modality."""
        means, known = self._patients(gain, among)
        parts = [means[known & (self.group_modality == m)] for m in self.modalities]
        parts = [part for part in parts if len(part)]
        errors = [part.std(ddof=1) / np.sqrt(len(part)) if len(part) > 1 else 0 for part in parts]
        return np.array([part.mean() for part in parts]), np.array(errors)

    def _interval(
        self, gain: NDArray[np.float64], among: NDArray[np.bool_]
    ) -> tuple[float, float, float]:
        """Mean over modalities and its 95 % interval over patients."""
        means, known = self._patients(gain, among)
        strata = [known & (self.group_modality == m) for m in self.modalities]
        mean, low, high, _ = mean_intervals(means[:, None], strata)[0]
        return mean, low, high


def format_policy(steps: Sequence[Step], facts: Sequence[str]) -> str:
    """The table as TOML, with what it was fitted on and what was tried as comments."""
    lines = [
        "# Which post-processing step an object gets with --postprocess auto. Of several rules",
        "# for one step the first that applies counts; a step without one is left out. What steps",
        "# and amounts mean stands in inference/adaptive_steps.py, what is measured in",
        "# inference/object_features.py.",
        "# Written by python -m training.fit_policy, whose head describes the procedure.",
        "#",
        *(f"# {fact}" for fact in facts),
        "#",
        *(f"# {note}" for step in steps for note in step.notes),
        "",
        "format = 1",
    ]
    for step in steps:
        for rule in step.rules:
            where = ", ".join(f'"{condition}"' for condition in rule.conditions)
            lines += [
                "",
                "[[rule]]",
                f'step = "{rule.step}"',
                f"amount = {rule.amount:g}",
                f'modality = "{rule.modality}"',
                f"where = [{where}]",
            ]
    return "\n".join(lines) + "\n"


def _in_words(rule: Rule) -> str:
    where = " and ".join(str(condition) for condition in rule.conditions) or "always"
    return f"{rule.amount:g} for {rule.modality}, {where}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Record where needed, fit, and write the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.fit_policy", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--cases", type=Path, required=True, metavar="DIR", help="training cases with gts")
    add("--cache", type=Path, required=True, metavar="DIR", help="where records are kept")
    add("--weights", default="default", metavar="FILE", help="bundle, or its name")
    add("--out", type=Path, default=POLICY_FILE, metavar="FILE", help="default: %(default)s")
    add("--per-modality", type=int, default=8, metavar="N", help="cases (default: %(default)s)")
    add("--objects", type=int, default=5, metavar="N", help="a case at most, default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        _check_place(options.out)
        weights = find_weights(options.weights)
        records = record_folder(
            options.cases,
            options.cache,
            weights=weights,
            objects=options.objects,
            per_modality=options.per_modality,
            click_rounds=max(max(rounds) for rounds in LEVELS.values()),
            without_boxes_every=4,
        )
        units = list(load_units(records, options.cases))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    before = np.array([unit.dice(unit.logits) for unit in units])
    fit = Fit(units, np.random.default_rng(0))
    steps = fit.run()
    after = np.array([unit.dice(unit.logits) for unit in units])
    facts = [
        f"Fitted on {len(records)} training cases, {len(units)} objects in rounds and levels of "
        f"noise {', '.join(f'{level:g}' for level in LEVELS)}.",
        f"Weights: sha256 {sha256_of(weights)[:16]}.",
        "Mean DSC of these units before and after, not cross-validated:",
    ]
    for level in LEVELS:
        cells = []
        for modality in sorted(set(fit.modality)):
            chosen = (fit.modality == modality) & np.array([unit.level == level for unit in units])
            if chosen.any():
                means = before[chosen].mean(), after[chosen].mean()
                cells.append(f"{modality} {means[0]:.4f} {means[1]:.4f}")
        facts.append(f"  noise {level:g}: {'; '.join(cells)}")
    text = format_policy(steps, facts)
    print(text)  # first, for the hours of work in it
    try:
        with replacing(options.out) as file:
            file.write(text.encode())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_place(path: Path) -> None:
    """Make sure now, not after hours of work, that a file can be written."""
    folder = path.parent
    if path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"--out {path}; accepted: a file in a folder that can be written")


if __name__ == "__main__":
    assert set(AMOUNTS) == set(STEPS)
    sys.exit(main())
