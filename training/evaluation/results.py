"""What an evaluation leaves behind: a file a case, and the official table.

The file of a case is written when the case is done, under a temporary name first. An interrupted
run continues from these files, and everything else is made from them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.npz import NpzError, NpzFile
from inference.whole_file import replacing
from training.evaluation.labelled_case import LabelledCase, load_labelled_case
from training.evaluation.protocol import CaseResult, official_row

#: A case of this name has no place beside a run's ``settings.json``.
CASE_REFUSED = "settings.npz"


class RunFolder:
    """Where one run of one predictor keeps its files.

    ``NAME_metrics.csv`` is the official table; ``NAME/`` holds a JSON and the last label map of
    each case, and ``settings.json``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Use ``folder``; files of other runs in it stay as they are."""
        self.name = name
        self.metrics_csv = folder / f"{name}_metrics.csv"
        self._cases = folder / name
        self._settings = self._cases / "settings.json"

    def open(self, settings: Mapping[str, Any], *, force: bool) -> None:
        """Start or continue a run.

        Args:
            settings: whatever the scores depend on; plain JSON values.
            force: forget the cases already done; files of others stay.

        Raises:
            ValueError: the folder holds cases of a run with other settings.
        """
        self._cases.mkdir(parents=True, exist_ok=True)
        if force:
            self._forget()
        if self._settings.is_file():
            before = self.settings()
            differing = [k for k in {*before, *settings} if before.get(k) != settings.get(k)]
            if differing:
                changes = ", ".join(
                    f"{k} {before.get(k)!r} -> {settings.get(k)!r}" for k in sorted(differing)
                )
                raise ValueError(
                    f"{self._cases} holds a run with other settings ({changes}); accepted: the "
                    "same settings, another --out or --name, or --force to start over"
                )
        with replacing(self._settings) as file:
            file.write(json.dumps(settings, indent=1).encode())

    def _forget(self) -> None:
        """Remove the table and the cases done, the settings last: without them no case is left."""
        self.metrics_csv.unlink(missing_ok=True)
        for path in self._cases.glob("*.json"):
            segs = path.with_suffix(".npz")
            if path != self._settings and segs.is_file():
                path.unlink()
                segs.unlink()
        self._settings.unlink(missing_ok=True)

    def keep_apart(self, *inputs: Path) -> None:
        """See to it that the run's files will not lie among those it reads.

        Raises:
            ValueError: its folder, or the one that holds that, is one of the ``inputs``.
        """
        for folder in (self.metrics_csv.parent, self._cases):
            for read in inputs:
                if is_same_folder(folder, read):
                    raise ValueError(
                        f"results would lie in {folder}, among what is read; accepted: another "
                        "--out or --name"
                    )

    @property
    def is_known(self) -> bool:
        """Whether the run's settings and cases are here, not only its table."""
        return self._settings.is_file()

    def settings(self) -> dict[str, Any]:
        """What the run depends on; ValueError with the file's name where it is damaged."""
        try:
            return dict(json.loads(self._settings.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self._settings}: damaged ({error}); accepted: as evaluate wrote it, or --force"
            ) from None

    def save(self, result: CaseResult, segs: NDArray[np.uint8]) -> None:
        """Keep a finished case."""
        with replacing(self._segs(result.name)) as file:
            np.savez_compressed(file, segs=segs)
        # Last: a case whose JSON exists is done.
        with replacing(self._json(result.name)) as file:
            file.write(json.dumps(result.to_json()).encode())

    def load(self, name: str, sources: Sequence[Path] = ()) -> CaseResult | None:
        """A finished case, or None, also where one of its sources was written since.

        Raises:
            ValueError: its file is damaged.
        """
        path = self._json(name)
        if not path.is_file():
            return None
        done = path.stat().st_mtime
        if any(source.is_file() and source.stat().st_mtime > done for source in sources):
            return None
        try:
            return CaseResult.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: damaged ({type(error).__name__}: {error}); accepted: as evaluate wrote "
                "it; without the file its case is done again"
            ) from None

    def results(self) -> list[CaseResult]:
        """The cases of the official table, in its order."""
        if not self.metrics_csv.is_file():
            return []
        loaded = (self.load(str(row["CaseName"])) for row in read_csv(self.metrics_csv))
        return [result for result in loaded if result is not None]

    def load_case(self, name: str) -> LabelledCase:
        """A case of the run, from where it lay then.

        Raises:
            ValueError, OSError: it is not there any more, or cannot be read.
        """
        settings = self.settings()
        references = settings.get("references")
        return load_labelled_case(
            Path(settings["cases"], name), Path(references) if references else None
        )

    def load_segs(self, name: str) -> NDArray[np.uint8]:
        """The last label map of a finished case; ValueError where it is damaged."""
        path = self._segs(name)
        try:
            with NpzFile(path) as file:
                return np.asarray(file["segs"])
        except (KeyError, NpzError) as error:
            raise ValueError(f"{path}: damaged ({error}); accepted: as evaluate wrote it") from None

    def write_metrics(self, results: Iterable[CaseResult]) -> None:
        """Write the official table, sorted by case name."""
        rows = [official_row(result) for result in sorted(results, key=lambda r: r.name)]
        write_csv(self.metrics_csv, rows)

    def _json(self, name: str) -> Path:
        return self._cases / f"{name.removesuffix('.npz')}.json"

    def _segs(self, name: str) -> Path:
        return self._cases / f"{name.removesuffix('.npz')}.npz"


def is_same_folder(one: Path, other: Path) -> bool:
    """Whether both are there and the same, by whatever links and names."""
    return one.is_dir() and other.is_dir() and one.samefile(other)


def list_runs(folder: Path) -> list[RunFolder]:
    """The runs in a folder that have a table, the segmenter's first, then by name."""
    names = (path.name.removesuffix("_metrics.csv") for path in folder.glob("*_metrics.csv"))
    ordered = sorted(names, key=lambda name: (not name.startswith("segmenter"), name))
    runs = (RunFolder(folder, name) for name in ordered)
    return [run for run in runs if run.is_known]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a table as text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys; floats in full, so that reading gives them back exactly."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(table.getvalue().encode())
