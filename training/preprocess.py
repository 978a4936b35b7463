"""Medical images and label maps to challenge cases that training and evaluation read.

    python -m training.preprocess IMAGES OUT --modality CT [--window soft] [--labels LABELS]
        [--names TABLE] [--dataset NAME] [--boxes] [--hold-out SHARE] [--jobs N]

IMAGES is a folder of NIfTI, NRRD, MHA or npz files and of folders with a DICOM series each, or a
CSV file with the columns image, labels, case. LABELS holds for each image a label map of the same
name, or a folder of that name with one file a structure. CT is windowed (400,40 unless --window
says otherwise), everything else clipped to its 0.5 and 99.5 percentiles.

OUT gets MODALITY_DATASET_NAME.npz files (with --hold-out, in train/ and val/), a manifest.json that
names their structures, and preprocess.csv: what was done, how each image lay, and what was refused
and why. Run it again and it does what is left, has changed or was refused. A case stays that of its
image: another one of that name is refused. It ends with 0 if every image was converted, 1 if some
were refused, 2 if nothing could start.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from inference.case import MODALITIES
from inference.intensities import CT_WINDOWS, parse_window
from inference.whole_file import replacing
from training.raw_case import Conversion, RawCase, convert, list_cases, read_names

COLUMNS = (
    "case",
    "status",
    "reason",
    "file",
    "image",
    "labels",
    "fingerprint",
    "shape",
    "spacing_xyz_mm",
    "orientation",
    "origin",
    "direction",
    "structures",
    "notes",
)
"""Of ``preprocess.csv``; ``orientation``, ``origin`` and ``direction`` are the image's own, while
its case holds the same voxels turned to LPS."""

_LOG = "preprocess.csv"
Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, 1 where something was refused, 2 where nothing could start."""
    options = _parse(arguments)
    try:
        names = read_names(options.names) if options.names else {}
        how = Conversion(options.modality, options.window, options.boxes, names)
        listed = list_cases(options.images, options.labels, [options.out])
        options.out.mkdir(parents=True, exist_ok=True)
        log = Log(options.out / _LOG)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    prefix = f"{options.modality}_{options.dataset}_"
    cases = []
    for case in listed:
        other = log.other_image(options.out, f"{prefix}{case.name}", case)
        if not other:
            cases.append(case)
            continue
        reason = f"{case.image}: the case was made of {other}; accepted: another --dataset or name"
        print(f"refused {prefix}{case.name}: {reason}", file=sys.stderr)
    taken = len(listed) - len(cases)
    files = _places([f"{prefix}{case.name}.npz" for case in cases], options.hold_out, log.rows)
    left = []
    for case in cases:
        file = files[f"{prefix}{case.name}.npz"]
        if not log.is_done(options.out, f"{prefix}{case.name}", file, case, how):
            left.append((case, file))
    done = len(cases) - len(left)
    refused = 0
    try:
        with tqdm(total=len(cases), initial=done, disable=not sys.stderr.isatty()) as bar:
            for row in _convert_all(left, how, options.out, options.jobs):
                before = log.rows.get(row["case"], {}).get("file")
                log.add(row)
                if row["status"] == "refused":
                    refused += 1
                    bar.write(f"refused {row['case']}: {row['reason']}", file=sys.stderr)
                if before and before != row["file"]:  # nobody trains on what is out of date
                    (options.out / before).unlink(missing_ok=True)
                bar.update()
    except BrokenProcessPool:
        print(
            "error: a process died, perhaps for want of memory; run again with fewer --jobs",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        log.close()
        _write_manifests(options.out, log.rows.values())
    converted = len(left) - refused
    print(
        f"{converted} converted, {done} already there, {refused + taken} refused: "
        f"{options.out / _LOG}",
        flush=True,
    )
    return 1 if refused + taken else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.preprocess",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder, or CSV table")
    add("out", type=Path, metavar="OUT", help="folder; may hold other modalities already")
    add("--modality", choices=MODALITIES, required=True)
    add("--window", metavar="|".join(CT_WINDOWS) + "|W,L", help="CT only; default: soft")
    add("--labels", type=Path, help="folder (a table has a column)")
    add("--names", type=Path, metavar="TABLE", help="names of labels: CSV label,name, or JSON")
    add("--dataset", default="own", help="second part of file names (default: %(default)s)")
    add("--boxes", action="store_true", help="store a box a class, by the challenge's rule")
    add("--hold-out", type=float, default=0.0, metavar="SHARE", help="of the cases, for evaluation")
    add("--jobs", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    options = parser.parse_args(arguments)
    if options.window is not None and options.modality != "CT":
        parser.error(f"--window is for CT; {options.modality} is clipped to percentiles")
    try:
        text = options.window or "soft"
        options.window = parse_window(text) if options.modality == "CT" else None
    except ValueError as error:
        parser.error(f"--window: {error}")
    if not options.dataset.replace("-", "").isalnum():
        parser.error(f"--dataset {options.dataset!r}; accepted: letters, digits and hyphens")
    if not 0 <= options.hold_out < 1:
        parser.error(f"--hold-out {options.hold_out}; accepted: a share from 0 up to 1")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}; accepted: at least 1")
    if options.images.is_file() and options.labels is not None:
        parser.error("--labels; accepted with a table: its column labels")
    return options


class Log:
    """``preprocess.csv``: a row a case, appended as they are done, so that a stop loses nothing.

    Raises:
        ValueError: the file is there and is no such table.
    """

    def __init__(self, path: Path) -> None:
        """Read what earlier runs did; a row cut short by a stop is forgotten."""
        self._path = path
        self.rows: dict[str, Row] = {}
        if path.exists():
            try:
                self._read()
            except csv.Error as error:
                accepted = "a table of training.preprocess"
                raise ValueError(f"{path}: {error}; accepted: {accepted}") from None
        self._write()
        # Names of files are bytes: those that are no text come back as they were.
        self._file = path.open("a", encoding="utf-8", errors="surrogateescape", newline="")

    def _read(self) -> None:
        with self._path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{self._path}: accepted: a table of training.preprocess")
            for row in reader:
                if None not in row.values() and None not in row:
                    self.rows[row["case"]] = row

    def add(self, row: Row) -> None:
        """Keep a case that was done or refused."""
        self.rows[row["case"]] = row
        csv.DictWriter(self._file, COLUMNS, lineterminator="\n").writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Leave the table sorted, one row a case."""
        self._file.close()
        self._write()

    def is_done(self, out: Path, name: str, file: str, case: RawCase, how: Conversion) -> bool:
        """Whether a case is there as it would be made now."""
        row = self.rows.get(name)
        if row is None or row["status"] != "done" or row["file"] != file or case.problem:
            return False
        try:
            return (out / file).is_file() and row["fingerprint"] == how.fingerprint(case)
        except OSError:
            return False

    def other_image(self, out: Path, name: str, case: RawCase) -> str:
        """The image that a case is there of, where that is another one which still exists."""
        row = self.rows.get(name)
        if row is None or row["status"] != "done" or not (out / row["file"]).is_file():
            return ""
        made_of = os.path.realpath(row["image"])
        there = os.path.lexists(made_of) and made_of != os.path.realpath(case.image)
        return row["image"] if there else ""

    def _write(self) -> None:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(self.rows.items()))
        with replacing(self._path) as file:
            file.write(table.getvalue().encode(errors="surrogateescape"))


def _places(names: Sequence[str], share: float, rows: Mapping[str, Row]) -> dict[str, str]:
    """The file of each case below OUT; which are held out depends on names only, and stays.

    A case that an earlier run put into a folder is left there; the others fill the share up in the
    order of their names' hashes. They never take the last case, which is one to train on.
    """
    if not share:
        return {name: name for name in names}
    before = {name: rows.get(name.removesuffix(".npz"), {}).get("file", "") for name in names}
    held = {name for name in names if before[name].startswith("val/")}
    free = sorted(
        (n for n in names if not before[n].startswith(("val/", "train/"))),
        key=lambda name: hashlib.sha256(name.encode()).digest(),
    )
    wanted = min(max(1, round(share * len(names))), len(names) - 1) - len(held)
    held.update(free[: max(0, wanted)])
    return {name: f"{'val' if name in held else 'train'}/{name}" for name in names}


def _convert_all(
    cases: Sequence[tuple[RawCase, str]], how: Conversion, out: Path, jobs: int
) -> Iterator[Row]:
    """Rows in the order in which the cases are finished."""
    if jobs == 1 or len(cases) < 2:
        for case, file in cases:
            yield _convert_one(case, file, how, out)
        return
    # Each process reads with one thread: together they are as many as there are jobs.
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(cases)), mp_context=spawn) as pool:
        tasks = [pool.submit(_convert_one, case, file, how, out) for case, file in cases]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _convert_one(case: RawCase, file: str, how: Conversion, out: Path) -> Row:
    """Convert and write one case; whatever is wrong with it becomes its row's reason."""
    row = dict.fromkeys(COLUMNS, "")
    row |= {"case": Path(file).stem, "file": file, "image": str(case.image.absolute())}
    row["labels"] = str(case.labels or "")
    try:
        row["fingerprint"] = how.fingerprint(case)  # before: files that change meanwhile show
        arrays, record = convert(case, how)
        save_case(out / file, arrays)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        return row | {"status": "refused", "file": "", "reason": " ".join(reason.split())}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
    return row | {"status": "done"} | texts


def save_case(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write an npz that appears under its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=True, **arrays)


def _write_manifests(out: Path, rows: Iterable[Row]) -> None:
    """``manifest.json`` beside the cases of each folder: evaluation names structures after it."""
    by_folder: dict[Path, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["case"]):
        path = out / row["file"]
        if row["status"] == "done" and path.is_file():
            by_folder.setdefault(path.parent, []).append(
                {
                    "file": path.name,
                    "modality": path.name.partition("_")[0],
                    "source": row["image"],
                    "orientation": row["orientation"],
                    "structures": json.loads(row["structures"]),
                }
            )
    for folder, entries in by_folder.items():
        with replacing(folder / "manifest.json") as file:
            file.write(json.dumps(entries, indent=1, ensure_ascii=False).encode())


if __name__ == "__main__":
    sys.exit(main())
