"""What a choice of cases covers of a pool, beside cases drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from training.coreset import CasePool, Coverage, choose_random

_DRAWS = 100

ROWS = (
    "cases",
    "objects",
    "modalities",
    "datasets",
    "named structures",
    "strata (modality, dataset, size)",
    "coverage, 0..1",
    "distance to the nearest, mean",
    "distance to the nearest, 95th percentile",
)


def measure(pool: CasePool, coverage: Coverage, names: Sequence[str]) -> list[float]:
    """The figures of ``ROWS`` for chosen cases.

    Datasets are counted by modality, structures by modality and name. Distances are those of each
    object to the nearest chosen one of its modality, in standard deviations of the features; the
    objects of a modality without a chosen case count as far as the farthest of all others.
    """
    wanted = set(names)
    chosen = [i for i, case in enumerate(pool.cases) if case.name in wanted]
    inside = np.isin(pool.owner, chosen)
    cases = [pool.cases[i] for i in chosen]
    similarity = np.max([coverage.similarity(i) for i in chosen], axis=0)
    distance = np.min([coverage.distance(i) for i in chosen], axis=0)
    distance[np.isinf(distance)] = distance[np.isfinite(distance)].max()
    structures = {s for s, yes in zip(pool.structures, inside, strict=True) if yes and s}
    return [
        len(chosen),
        int(inside.sum()),
        len({case.modality for case in cases}),
        len({(case.modality, case.dataset) for case in cases}),
        len(structures),
        len(set(pool.stratum[inside].tolist())),
        coverage.value(similarity),
        float(distance.mean()),
        float(np.percentile(distance, 95)),
    ]


def coverage_table(
    pool: CasePool, choices: Mapping[str, Sequence[str]], draws: int = _DRAWS
) -> str:
    """A Markdown table: the pool, random draws, the cases with most objects, and the choices.

    Args:
        pool: all cases.
        choices: names of cases by title, all of one number.
        draws: random choices of each kind; their mean and, in brackets, least and most are shown.
    """
    coverage = Coverage(pool)
    every = [case.name for case in pool.cases]
    count = len(next(iter(choices.values())))
    plain = [
        np.random.default_rng(seed).choice(every, count, replace=False).tolist()
        for seed in range(draws)
    ]
    stratified = [[c.name for c in choose_random(pool, count, seed)] for seed in range(draws)]
    columns = {"all": [measure(pool, coverage, every)]}
    columns["drawn from all"] = [measure(pool, coverage, names) for names in plain]
    columns["drawn from strata"] = [measure(pool, coverage, names) for names in stratified]
    richest = sorted(pool.cases, key=lambda case: (-len(case.objects), case.name))[:count]
    columns["most objects"] = [measure(pool, coverage, [case.name for case in richest])]
    columns |= {title: [measure(pool, coverage, names)] for title, names in choices.items()}
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row, title in enumerate(ROWS):
        cells = [_cell([values[row] for values in column]) for column in columns.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    whole = all(isinstance(value, int) for value in values)
    if len(values) == 1 or len(set(values)) == 1:
        return f"{values[0]}" if whole else f"{values[0]:.3f}"
    if whole:
        return f"{np.mean(values):.1f} ({min(values)}–{max(values)})"
    return f"{np.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"
