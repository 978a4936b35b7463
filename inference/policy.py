"""The adaptive policy: which post-processing steps an object gets, read from a table of rules.

``policy.toml`` beside this file holds the rules. Each names a step, its amount and when it applies:
for one modality or any, and where all its conditions on the object's measurements hold. Of several
rules for one step the first that applies counts; a step without one is left out. The table is
fitted (``python -m training.fit_policy``), and can be read and edited by hand.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.adaptive_steps import STEPS, Region, apply_step
from inference.case import Case, modality_of
from inference.object_features import FEATURES, ObjectFeatures, measure
from inference.refinement import ObjectLogits

POLICY_FILE = Path(__file__).with_name("policy.toml")
ANY = "any"

_FORMAT = 1
_LARGEST_AMOUNT = 2.0  # of shares of an object; smoothing by more would take minutes
_CONDITION = re.compile(r"\s*(\w+)\s*(<|>=)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Condition:
    """``feature < limit``, or ``feature >= limit`` where ``below`` is False."""

    feature: str
    below: bool
    limit: float

    def holds(self, features: ObjectFeatures) -> bool:
        """Whether an object fulfils it."""
        return (float(getattr(features, self.feature)) < self.limit) == self.below

    def __str__(self) -> str:
        return f"{self.feature} {'<' if self.below else '>='} {self.limit:g}"


@dataclass(frozen=True)
class Rule:
    """One row of the table: a step, how much of it, and for which objects."""

    step: str
    amount: float
    modality: str = ANY
    conditions: tuple[Condition, ...] = ()

    def applies(self, modality: str, features: ObjectFeatures) -> bool:
        """Whether it is for this object."""
        return self.modality in (ANY, modality) and all(c.holds(features) for c in self.conditions)


@dataclass(frozen=True)
class Policy:
    """An ordered table of rules."""

    rules: tuple[Rule, ...] = ()

    def steps(self, modality: str, features: ObjectFeatures) -> list[tuple[str, float]]:
        """Step and amount of all that an object gets, in the order of application."""
        chosen: dict[str, float] = {}
        for rule in self.rules:
            if rule.step not in chosen and rule.applies(modality, features):
                chosen[rule.step] = rule.amount
        return [(step, chosen[step]) for step in STEPS if step in chosen]

    def clean(self, results: Iterable[ObjectLogits], case: Case) -> Iterator[ObjectLogits]:
        """Post-process the objects of a case, each by itself, in the order given.

        An object may lie about another; what is then added to it competes for its voxels with a
        logit barely above zero. One that nothing is said about stays as it is: it has been here.
        """
        modality = modality_of(case.name)
        prompts = {one.label: one for one in case.objects}
        for result in results:
            own = prompts[result.label]
            if not self.rules or own.is_empty or not (result.logits > 0).any():
                yield result
                continue
            region = Region.of(result, own, case.spacing_mm)
            image = case.image[result.place]
            features = measure(result.logits, image, region, len(own.clicks))
            logits = result.logits
            for step, amount in self.steps(modality, features):
                logits = apply_step(step, logits, region, amount)
            yield ObjectLogits(result.label, result.start, logits)


def load_policy(path: Path | None = None) -> Policy:
    """Read a table of rules, by default :data:`POLICY_FILE`.

    Raises:
        ValueError: the file is no such table.
        OSError: it cannot be read.
    """
    path = path or POLICY_FILE
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: {error}; accepted: a TOML table of rules") from None
    if table.get("format") != _FORMAT:
        raise ValueError(f"{path.name}: format {table.get('format')!r}; accepted: {_FORMAT}")
    rows = table.get("rule", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path.name}: rule is no array of tables; accepted: [[rule]] entries")
    return Policy(tuple(_rule(row, f"{path.name}: rule {i}") for i, row in enumerate(rows, 1)))


def _rule(row: dict[str, Any], source: str) -> Rule:
    step, amount = row.get("step"), row.get("amount")
    if not isinstance(step, str) or step not in STEPS:
        raise ValueError(f"{source}: step {step!r}; accepted: {', '.join(STEPS)}")
    refusal = ValueError(
        f"{source}: amount {amount!r}; accepted: a number above 0, at most {_LARGEST_AMOUNT:g}"
    )
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise refusal
    if not 0 < amount <= _LARGEST_AMOUNT:
        raise refusal
    modality, where = row.get("modality", ANY), row.get("where", [])
    if not isinstance(modality, str):
        raise ValueError(f"{source}: modality {modality!r}; accepted: a name, or {ANY!r}")
    if not isinstance(where, list):
        raise ValueError(f"{source}: where {where!r}; accepted: a list of conditions")
    return Rule(step, float(amount), modality, tuple(_condition(text, source) for text in where))


def _condition(text: object, source: str) -> Condition:
    match = _CONDITION.fullmatch(text) if isinstance(text, str) else None
    try:
        if match is None or match[1] not in FEATURES:
            raise ValueError
        return Condition(match[1], match[2] == "<", float(match[3]))
    except ValueError:
        raise ValueError(
            f"{source}: condition {text!r}; accepted: 'FEATURE < NUMBER' or 'FEATURE >= NUMBER', "
            f"features {', '.join(FEATURES)}"
        ) from None
