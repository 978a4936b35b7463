"""Choose a part of the labelled cases to train on, and say why each of them is in.

    python -m training.coreset --data DIR --out LIST.json [--share 0.1 | --cases N]
        [--method diverse|random] [--seed 0] [--embeddings WEIGHTS] [--jobs N]

``random`` draws from strata of modality, dataset and size in proportion to their numbers of cases,
with every case as likely to be in. ``diverse`` adds, one by one, the case that makes the objects of
the whole folder most similar to some chosen object (facility location, greedily; Wei et al. 2015,
"Submodularity in data subset selection and active learning"). A stratum counts as much as the
square root of its number of objects, so that rare ones are heard; objects of different modalities
never stand for each other. Both give the same list for the same folder and seed. A table of what
the list covers, beside random draws, is printed.

``python -m training.train --cases LIST.json`` reads the list; so does :func:`read_case_list`, which
also takes a text file with a name a line.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inference.model.weights import find_weights, sha256_of
from inference.whole_file import replacing
from training.case_statistics import DescribedCase, describe_folder

SIZES = ("small", "medium", "large")
VERSION = 1
"""Of the format of a case list."""

_CLIENTS = 5000  # objects whose coverage is counted; more are sampled


@dataclass(frozen=True)
class Choice:
    """A chosen case.

    Attributes:
        name: its file's name without ending.
        stratum: modality, dataset and size of its middle object.
        reason: why it is in.
    """

    name: str
    stratum: str
    reason: str


class CasePool:
    """Described cases with their objects side by side.

    Attributes:
        cases: by name.
        owner: (objects,) index of each object's case.
        modality: (objects,) of each object.
        stratum: (objects,) modality, dataset and size of each object; sizes are thirds of the
            modality's objects.
        features: (objects, n) z-scores.
    """

    def __init__(self, cases: Sequence[DescribedCase]) -> None:
        """Number the objects of all cases."""
        self.cases = sorted(cases, key=lambda case: case.name)
        pairs = [(i, o) for i, case in enumerate(self.cases) for o in case.objects]
        self.owner = np.array([i for i, _ in pairs])
        self.modality = np.array([self.cases[i].modality for i, _ in pairs])
        self.structures = [
            f"{self.cases[i].modality} {o.structure}" if o.structure else "" for i, o in pairs
        ]
        voxels = np.array([o.voxels for _, o in pairs])
        self.size = np.empty(len(pairs), int)
        for modality in set(self.modality):
            mask = self.modality == modality
            cuts = np.quantile(voxels[mask], (1 / 3, 2 / 3))
            self.size[mask] = np.searchsorted(cuts, voxels[mask], side="right")
        self.stratum = np.array(
            [
                f"{case.modality} {case.dataset} {SIZES[size]}"
                for case, size in zip((self.cases[i] for i in self.owner), self.size, strict=True)
            ]
        )
        raw = np.array([o.features for _, o in pairs])
        spread = raw.std(0)
        self.features = (raw - raw.mean(0)) / np.where(spread > 0, spread, 1)

    def strata(self) -> list[str]:
        """Of each case: modality, dataset and size of its middle object."""
        found = []
        for i, case in enumerate(self.cases):
            size = SIZES[int(np.median(self.size[self.owner == i]))]
            found.append(f"{case.modality} {case.dataset} {size}")
        return found


def choose_random(pool: CasePool, count: int, seed: int) -> list[Choice]:
    """Systematic sampling: every (cases / count)-th of the cases in order of their strata.

    The start and the order within a stratum are random, so that every case is as likely to be in;
    a stratum of n cases gets its share of them, rounded up or down (Cochran 1977, "Sampling
    Techniques", chapter 8).
    """
    rng = np.random.default_rng(seed)
    strata = pool.strata()
    keys = rng.random(len(strata))
    order = sorted(range(len(strata)), key=lambda i: (strata[i], keys[i]))
    step = len(order) / count
    drawn = [order[int(place)] for place in (rng.random() + np.arange(count)) * step]
    sizes, taken = Counter(strata), Counter(strata[i] for i in drawn)
    return [
        Choice(
            pool.cases[i].name,
            strata[i],
            f"drawn, one in {step:.1f}: {taken[strata[i]]} of {sizes[strata[i]]} cases of "
            f"{strata[i]}",
        )
        for i in drawn
    ]


def choose_diverse(pool: CasePool, count: int, seed: int) -> list[Choice]:
    """Greedy facility location over objects, lazily evaluated (Minoux 1978).

    The seed matters only where there are so many objects that their coverage is estimated on some.
    """
    coverage = Coverage(pool, seed)
    strata = pool.strata()
    best = np.zeros(len(coverage.clients))
    # Gains only shrink as cases are added, so a case whose old gain is not the largest can wait.
    heap = [(-coverage.gain(i, best), i) for i in range(len(pool.cases))]
    heapq.heapify(heap)
    chosen: list[Choice] = []
    while heap and len(chosen) < count:
        _, i = heapq.heappop(heap)
        gain = coverage.gain(i, best)
        if heap and -gain > heap[0][0]:
            heapq.heappush(heap, (-gain, i))
            continue
        before = coverage.value(best)
        closer = coverage.similarity(i) > best
        best = np.maximum(best, coverage.similarity(i))
        stands_for = Counter(pool.stratum[coverage.clients[closer]].tolist())
        most = ", ".join(f"{n} {name}" for name, n in stands_for.most_common(2))
        reason = (
            f"choice {len(chosen) + 1}: coverage {before:.3f} -> {coverage.value(best):.3f}; "
            f"now nearest to {int(closer.sum())} objects ({most})"
        )
        chosen.append(Choice(pool.cases[i].name, strata[i], reason))
    return chosen


class Coverage:
    """How well chosen cases stand for all objects of a pool, 0..1.

    The similarity of two objects is ``exp(-(d / m)^2)`` with their distance d and the root mean
    square distance m of their modality's objects; 0 across modalities. An object is covered as
    well as its most similar chosen one; the value is the mean over objects, each stratum weighted
    by the square root of its number of objects.

    Attributes:
        clients: indices of the objects that are counted; all of them where there are not too many.
    """

    def __init__(self, pool: CasePool, seed: int = 0) -> None:
        """Weigh objects and measure typical distances."""
        self._pool = pool
        rng = np.random.default_rng(seed)
        every = np.arange(len(pool.owner))
        self.clients = every
        if len(every) > _CLIENTS:
            self.clients = np.sort(rng.choice(every, _CLIENTS, replace=False))
        _, index, counts = np.unique(
            pool.stratum[self.clients], return_inverse=True, return_counts=True
        )
        weights = np.sqrt(counts)[index] / counts[index]
        self._weights = weights / weights.sum()
        self._modality = pool.modality[self.clients]
        self._scale = np.ones(len(self.clients))
        for modality in np.unique(self._modality):
            variance = float(pool.features[pool.modality == modality].var(0).sum())
            if variance:
                self._scale[self._modality == modality] = np.sqrt(2 * variance)

    def similarity(self, case: int) -> NDArray[np.float64]:
        """(clients,) similarity of each object to the case's most similar one."""
        return np.exp(-np.square(self.distance(case) / self._scale))

    def distance(self, case: int) -> NDArray[np.float64]:
        """(clients,) distance of each object to the case's nearest one of its modality."""
        pool = self._pool
        own = np.flatnonzero(pool.owner == case)
        result = np.full(len(self.clients), np.inf)
        same = self._modality == pool.cases[case].modality
        points = pool.features[self.clients[same]]
        squares = (
            np.square(points).sum(1)[:, None]
            + np.square(pool.features[own]).sum(1)
            - 2 * points @ pool.features[own].T
        )
        result[same] = np.sqrt(np.maximum(squares, 0)).min(1)
        return result

    def gain(self, case: int, best: NDArray[np.float64]) -> float:
        """What a case adds to the value of similarities ``best`` (clients,)."""
        return float(self._weights @ np.maximum(self.similarity(case) - best, 0))

    def value(self, best: NDArray[np.float64]) -> float:
        """The coverage where each client's best similarity is this."""
        return float(self._weights @ best)


METHODS = {"diverse": choose_diverse, "random": choose_random}


def write_case_list(path: Path, chosen: Sequence[Choice], facts: dict[str, object]) -> None:
    """Write a case list; the same choice gives the same bytes."""
    content = {
        "case_list": VERSION,
        **facts,
        "cases": [
            {"name": c.name, "stratum": c.stratum, "reason": c.reason}
            for c in sorted(chosen, key=lambda c: c.name)
        ],
    }
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_case_list(path: Path) -> list[str]:
    """Names of the cases of a list, without ``.npz``, sorted.

    Args:
        path: what ``write_case_list`` wrote, or a text file with a name a line (``#`` begins a
            comment).

    Raises:
        ValueError: it is no case list, of an unknown version, empty, or names a case twice.
        OSError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            content = json.loads(text)
            version, names = content["case_list"], [case["name"] for case in content["cases"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no case list ({type(error).__name__}: {error})") from None
        if version != VERSION:
            raise ValueError(f"{path}: a case list of version {version}; accepted: {VERSION}")
    else:
        names = [line.partition("#")[0].strip() for line in text.splitlines()]
    names = [name.removesuffix(".npz") for name in names if name]
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if not names or repeated:
        received = f"{repeated[0]} twice" if repeated else "no case"
        raise ValueError(f"{path}: received {received}; accepted: each case once, at least one")
    return sorted(names)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 after an error (one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m training.coreset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="challenge files with gts")
    add("--out", type=Path, required=True, metavar="LIST.json")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--share", type=float, default=0.1, help="of the cases (default: 0.1)")
    amount.add_argument("--cases", type=int, metavar="N", help="number of cases instead")
    add("--method", choices=METHODS, default="diverse", help="default: %(default)s")
    add("--seed", type=int, default=0)
    add("--embeddings", metavar="WEIGHTS", help="SAM-Med3D whose image embeddings tell objects")
    add("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="for embeddings")
    add("--jobs", type=int, default=1, metavar="N", help="cases at a time (default: 1)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}; accepted: at least 1")
    if options.out.suffix != ".json":
        parser.error(f"--out {options.out}; accepted: a name ending in .json")
    try:
        if not 0 < options.share <= 1:  # also of NaN
            raise ValueError(f"--share {options.share:g}; accepted: over 0, up to 1")
        weights = find_weights(options.embeddings) if options.embeddings else None
        pool = CasePool(describe_folder(options.data, options.jobs, weights, options.device))
        total = len(pool.cases)
        count = options.cases
        if count is None:
            count = max(1, round(options.share * total))
        if not 1 <= count <= total:
            raise ValueError(f"received {count} cases of {total}; accepted: 1 to {total}")
        chosen = METHODS[options.method](pool, count, options.seed)
        facts: dict[str, object] = {
            "method": options.method,
            "seed": options.seed,
            "told_apart_by": f"embeddings {sha256_of(weights)[:12]}" if weights else "statistics",
            "pool": {"cases": total, "objects": len(pool.owner), "sha256": _digest(pool)},
        }
        write_case_list(options.out, chosen, facts)
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    from training.coverage import coverage_table

    print(f"{options.out}: {count} of {total} cases, {options.method}\n")
    print(coverage_table(pool, {options.method: [c.name for c in chosen]}))
    return 0


def _digest(pool: CasePool) -> str:
    """Differs when other cases, or cases with other objects, were chosen from."""
    text = json.dumps([[c.name, [[o.label, o.voxels] for o in c.objects]] for c in pool.cases])
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
