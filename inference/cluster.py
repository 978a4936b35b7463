"""Command line: segments every case of a folder on the machines of a Ray cluster.

    python -m inference.cluster --inputs DIR --outputs DIR --workers 16 [--address auto] ...

The switches of ``inference.predict`` and those of the cluster. Folders and weights must lie at the
same paths on all machines. Each worker loads the weights once and is handed one case after the
other; a case that fails for another reason than its own file, or whose worker dies, is tried again
by another worker. Results appear whole or not at all, so after an interruption ``--skip-existing``
goes on where it was. Ray is an optional requirement (cluster-requirements.txt) and imported only
here.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.predict import (
    ALL_WRITTEN,
    NOT_STARTED,
    SOME_FAILED,
    StartError,
    find_work,
    in_one_line,
    load,
    make_parser,
    note_skipped,
    run_program,
    write_line,
)

#: How long a case that one worker failed waits for another one to start, where all else is done:
#: the cluster may have fewer machines than were asked for.
_PATIENCE_S = 60.0


class Worker:
    """Segments cases in a process of its own; the weights are loaded once."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load what the options ask for; :class:`StartError` where that cannot be."""
        self._segment_file = load(options)

    def ready(self) -> None:
        """Return once the weights are loaded."""

    def segment(self, path: Path) -> str:
        """Segment a case and save the result; returns the line to print.

        Raises:
            CaseError: the file is to blame.
        """
        return self._segment_file(path)


@dataclass
class _Job:
    """A case, and who failed it."""

    path: Path
    failed_by: list[int] = field(default_factory=list)


class Pool:
    """Workers on a Ray cluster that is connected already.

    Args:
        options: as parsed, with those of the cluster.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Ask the cluster for the workers; they start one by one."""
        import ray

        self._ray = ray
        self._options = options
        self._remote = ray.remote(Worker).options(
            num_cpus=options.cpus_per_worker,
            num_gpus=options.gpus_per_worker,
            scheduling_strategy="SPREAD",
            max_restarts=0,  # a dead one is replaced below, and its case is not lost
        )
        self._workers: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, _Job | None]] = {}  # a job, or None: getting ready
        self._idle: set[int] = set()
        self._waiting: list[_Job] = []
        self._started = 0
        self._failed_starts = 0
        self._told_waiting = False
        self._worked = False
        self.failed = 0

    def run(self, paths: Sequence[Path]) -> None:
        """Segment cases; prints a line for each, and counts the failed ones in ``failed``.

        Raises:
            StartError: no worker can start, and none has.
        """
        self._waiting = [_Job(path) for path in paths]
        for _ in range(min(self._options.workers, len(paths))):
            self._start()
        while self._waiting or any(job for _, job in self._calls.values()):
            self._hand_out()
            working = any(job for _, job in self._calls.values())
            patience = None if working else _PATIENCE_S
            done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=patience)
            if done:
                self._take(done[0])
            else:
                self._hand_out(to_anybody=True)
                self._tell_waiting()

    def _tell_waiting(self) -> None:
        """Say once that no worker starts: a cluster without room for one says nothing itself."""
        if not self._told_waiting and not any(job for _, job in self._calls.values()):
            self._told_waiting = True
            reason = _lacking(self._ray.nodes(), self._options) or "all nodes are busy or slow"
            write_line(f"waiting for a worker to start: {reason}", sys.stderr)

    def _start(self) -> None:
        number, self._started = self._started, self._started + 1
        self._workers[number] = self._remote.remote(self._options)
        self._calls[self._workers[number].ready.remote()] = number, None

    def _hand_out(self, to_anybody: bool = False) -> None:
        """Give idle workers cases, but none that they failed while there are others to try it."""
        for number in sorted(self._idle):
            job = next((j for j in self._waiting if to_anybody or self._may_try(number, j)), None)
            if job is not None:
                self._waiting.remove(job)
                self._idle.remove(number)
                self._worked = True
                self._calls[self._workers[number].segment.remote(job.path)] = number, job

    def _may_try(self, number: int, job: _Job) -> bool:
        return number not in job.failed_by or set(self._workers) <= set(job.failed_by)

    def _take(self, call: Any) -> None:
        """Take what a call returned; put its case back where another worker may succeed."""
        from inference.case import CaseError

        number, job = self._calls.pop(call)
        try:
            line = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            # The method raised; the worker lives and may do better with other cases.
            self._idle.add(number)
            cause = error.cause
            assert job is not None
            self._fail(job, number, cause, final=isinstance(cause, CaseError))
        except self._ray.exceptions.RayError as error:
            del self._workers[number]
            if job is None:
                self._failed_starts += 1
            else:
                self._fail(job, number, ChildProcessError(f"its worker died: {_reason(error)}"))
            if self._failed_starts < self._options.attempts:
                self._start()
            elif not self._workers:
                self._give_up(StartError(f"no worker can start: {_reason(error)}"))
        else:
            self._idle.add(number)
            self._failed_starts = 0
            if job is not None:
                write_line(line, sys.stdout)

    def _give_up(self, error: StartError) -> None:
        """What waits has failed; where nothing has been tried, nothing could start."""
        if not self._worked:
            raise error
        for job in self._waiting:
            self.failed += 1
            write_line(f"error: {in_one_line(job.path, error)}", sys.stderr)
        self._waiting = []

    def _fail(self, job: _Job, number: int, error: Exception, final: bool = False) -> None:
        job.failed_by.append(number)
        message = in_one_line(job.path, error)
        if final or len(job.failed_by) >= self._options.attempts:
            self.failed += 1
            write_line(f"error: {message}", sys.stderr)
        else:
            self._waiting.append(job)
            write_line(f"trying again: {message}", sys.stderr)


def _lacking(nodes: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> str | None:
    """What no node has, were it idle, though a worker asks for it; None where one has it."""
    wanted = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    having = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(node.get(kind, 0) >= n for kind, n in wanted.items()) for node in having):
        return None
    asked = " and ".join(f"{n:g} {kind}" for kind, n in wanted.items() if n)
    there = "; ".join(f"{n.get('CPU', 0):g} CPU and {n.get('GPU', 0):g} GPU" for n in having)
    return f"a worker asks for {asked}, nodes have {there or 'gone'}"


def _reason(error: Exception) -> str:
    """What Ray says of a worker's end, without its traceback and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Error: " in line), lines[0] if lines else "unknown")


def make_cluster_parser() -> argparse.ArgumentParser:
    """The parser of predict's command line, and the cluster's switches."""
    parser = make_parser()
    parser.prog = "python -m inference.cluster"
    parser.add_argument(
        "--address", help="of a running Ray cluster, or auto (default: start one on this machine)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--cpus-per-worker", type=int, default=1, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--gpus-per-worker",
        type=float,
        default=0.0,
        metavar="N",
        help="a fraction shares a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=3,
        metavar="N",
        help="a case is given up after so many (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Segment a folder as the command line says; returns the exit status of ``predict.sh``."""
    parser = make_cluster_parser()
    options = parser.parse_args(arguments)
    if min(options.workers, options.cpus_per_worker, options.attempts) < 1:
        parser.error("--workers, --cpus-per-worker and --attempts: accepted: at least 1")
    gpus = options.gpus_per_worker
    if not (0 <= gpus <= 1 or (gpus > 1 and gpus.is_integer())):  # Ray shares one GPU, never two
        parser.error(f"--gpus-per-worker {gpus}: accepted: 0 to 1, or a whole number")
    if options.device == "auto" and not options.gpus_per_worker:
        options.device = "cpu"  # Ray hides no GPU from workers that asked for none
    options.threads = options.threads or options.cpus_per_worker
    for name in ("inputs", "outputs", "overlay"):  # a worker's folder is another
        folder = getattr(options, name)
        setattr(options, name, folder and folder.absolute())
    for name in ("weights", "sam"):  # files, or names of those that ship
        file = getattr(options, name)
        if file and Path(file).is_file():
            setattr(options, name, str(Path(file).absolute()))
    started = time.perf_counter()
    try:
        paths, skipped = find_work(options)
        pool = None
        if paths:
            _connect(options)
            pool = Pool(options)
            pool.run(paths)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_STARTED
    except SystemExit:  # after SIGTERM, with a status of Ray's
        sys.exit(128 + signal.SIGTERM)
    finally:
        _disconnect()
    failed = pool.failed if pool else 0
    write_line(
        f"{len(paths) - failed} of {len(paths)} cases in {time.perf_counter() - started:.1f} s"
        f"{note_skipped(skipped)}; results in {options.outputs}",
        sys.stdout,
    )
    return SOME_FAILED if failed else ALL_WRITTEN


def _connect(options: argparse.Namespace) -> None:
    # Nothing of what is segmented here is anybody else's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise StartError(f"{error}; pip install -r inference/cluster-requirements.txt") from error
    local: dict[str, Any] = {}
    if options.address is None:
        # A secret of this run's: Ray would keep one in the home folder, which may be read-only.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())
        local = {
            "num_cpus": options.workers * options.cpus_per_worker,
            "include_dashboard": False,
        }
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=options.address, log_to_driver=False, logging_level="error", **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise StartError(f"Ray: {' '.join(str(error).split())}") from error
    signal.signal(signal.SIGTERM, on_termination)  # Ray's own prints its stack
    if options.address is None:  # other clusters may yet grow
        lacking = _lacking(ray.nodes(), options)
        if lacking:
            raise StartError(f"this machine: {lacking}")


def _disconnect() -> None:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


if __name__ == "__main__":
    run_program(main)
