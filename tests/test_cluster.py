"""A run on a local Ray cluster of two workers, with faults of every kind staged in one go."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from inference.predict import main as predict
from tests.conftest import CHECKOUT
from tests.phantoms import challenge_case, write_npz

pytest.importorskip("ray", reason="Ray is optional: inference/cluster-requirements.txt")


# Workers that die or fail where told to, once or always, and keep a diary: one line a start, one
# line an attempt. A module of its own, since Ray sends classes of scripts by value.
FAULTY = """
    import os
    from pathlib import Path
    from inference.cluster import Worker

    DIARY = Path(__file__).with_name("diary")

    def note(*words):
        with DIARY.open("a") as diary:
            print(os.getpid(), *words, file=diary)

    class Faulty(Worker):
        def __init__(self, options):
            note("starts")
            super().__init__(options)

        def segment(self, path):
            earlier = DIARY.read_text().count(path.name)
            note(path.name)
            if path.stem == "CT_dies_once" and not earlier:
                os._exit(1)
            if path.stem == "CT_fails_once" and not earlier:
                raise MemoryError("no room here")
            if path.stem == "CT_fails_always":
                raise RuntimeError("cannot be done")
            return super().segment(path)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "faulty.py").write_text(textwrap.dedent(FAULTY))
    (folder / "diary").touch()
    inputs, outputs = folder / "in", folder / "out"
    inputs.mkdir()
    outputs.mkdir()
    names = ("CT_a", "CT_b", "CT_dies_once", "CT_done", "CT_fails_always", "CT_fails_once")
    for seed, name in enumerate(names):
        write_npz(inputs / f"{name}.npz", challenge_case((12, 24, 20), 2, gts=False, seed=seed))
    (inputs / "CT_broken.npz").write_text("not an archive")
    (outputs / "CT_done.npz").write_bytes(b"of an earlier run")
    arguments = ["--inputs", str(inputs), "--outputs", str(outputs), "--workers", "2"]
    arguments += ["--skip-existing", "--attempts", "2"]
    code = (  # patient, however busy the machine is
        "import sys, faulty, inference.cluster as c; c._PATIENCE_S = 600; "
        f"c.Worker = faulty.Faulty; sys.exit(c.main({arguments}))"
    )
    path = os.pathsep.join([str(CHECKOUT), str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "HOME": "/nonexistent"},  # nothing is left there
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    return folder, done


def diary(folder: Path) -> list[tuple[int, str]]:
    lines = [line.split() for line in (folder / "diary").read_text().splitlines()]
    return [(int(process), words) for process, words in lines]


def attempts(folder: Path, name: str) -> list[int]:
    """The processes that tried a case, in order."""
    return [process for process, words in diary(folder) if words == f"{name}.npz"]


def test_all_that_can_be_written_is_written(run) -> None:
    folder, done = run
    assert done.returncode == 1, done.stderr
    written = {path.stem for path in (folder / "out").iterdir()}
    assert written == {"CT_a", "CT_b", "CT_dies_once", "CT_done", "CT_fails_once"}
    assert done.stdout.splitlines()[-1].startswith("4 of 6 cases in ")
    assert ", 1 skipped; " in done.stdout


def test_results_are_those_of_one_process(run, tmp_path: Path) -> None:
    folder, _ = run
    options = ["--outputs", str(tmp_path), "--device", "cpu", "--threads", "1"]
    assert predict(["--inputs", str(folder / "in"), *options]) == 1
    for name in ("CT_a", "CT_dies_once"):
        here, there = (np.load(f / f"{name}.npz")["segs"] for f in (tmp_path, folder / "out"))
        assert np.array_equal(here, there)


def test_failures_are_tried_again_by_another_worker(run) -> None:
    folder, _ = run
    for name in ("CT_dies_once", "CT_fails_once", "CT_fails_always"):
        first, second = attempts(folder, name)
        assert first != second, name


def test_a_broken_file_is_not_tried_again(run) -> None:
    folder, done = run
    assert len(attempts(folder, "CT_broken")) == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert any("CT_broken.npz" in line and "no zip archive" in line for line in errors)
    assert any("CT_fails_always.npz: RuntimeError: cannot be done" in line for line in errors)


def test_finished_cases_are_left_alone(run) -> None:
    folder, _ = run
    assert attempts(folder, "CT_done") == []
    assert (folder / "out" / "CT_done.npz").read_bytes() == b"of an earlier run"


def test_weights_are_loaded_once_a_worker(run) -> None:
    folder, _ = run
    starts = [process for process, words in diary(folder) if words == "starts"]
    assert len(starts) == len(set(starts)) == 2 + 1  # one died and was replaced
    assert len(diary(folder)) - len(starts) > len(starts)


def test_what_cannot_start_is_told_without_starting_a_cluster(tmp_path: Path, capsys) -> None:
    from inference.cluster import main

    options = ["--inputs", str(tmp_path / "none"), "--outputs", str(tmp_path / "out")]
    assert main(options) == 2
    assert "inputs folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "--workers", "0"])


def options_of(tmp_path: Path, *more: str) -> list[str]:
    write_npz(tmp_path / "CT_a.npz", challenge_case((12, 24, 20), 1, gts=False))
    return ["--inputs", str(tmp_path), "--outputs", str(tmp_path / "out"), *more]


def test_a_machine_that_can_never_have_a_worker_says_so(tmp_path: Path, monkeypatch, capsys):
    import ray

    from inference.cluster import main

    nodes = [{"Alive": alive, "Resources": {"CPU": 2.0, "GPU": 1.0}} for alive in (True, False)]
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert main(options_of(tmp_path, "--cpus-per-worker", "3", "--gpus-per-worker", ".5")) == 2
    said = "error: this machine: a worker asks for 3 CPU and 0.5 GPU, nodes have 2 CPU and 1 GPU\n"
    assert capsys.readouterr().err == said
    with pytest.raises(SystemExit):
        main(options_of(tmp_path, "--gpus-per-worker", "1.5"))
    assert "accepted: 0 to 1, or a whole number" in capsys.readouterr().err


def test_a_cluster_without_room_is_waited_for_with_one_line(tmp_path: Path, capsys) -> None:
    """No worker gets ready in three spans of patience; then the cluster goes away."""
    from inference.cluster import Pool, make_cluster_parser

    cluster = mock.MagicMock()
    cluster.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 0.5}}]
    cluster.wait.side_effect = [([], []), ([], []), ([], []), ConnectionError]
    options = make_cluster_parser().parse_args(options_of(tmp_path))
    with mock.patch.dict(sys.modules, ray=cluster):
        pool = Pool(options)
    with pytest.raises(ConnectionError):
        pool.run([tmp_path / "CT_a.npz"])
    said = "waiting for a worker to start: a worker asks for 1 CPU, nodes have 0.5 CPU and 0 GPU\n"
    assert capsys.readouterr().err == said


def test_cases_no_worker_is_left_for_have_failed(tmp_path: Path, capsys) -> None:
    """One case is done, one kills its worker, and no other worker starts."""
    from inference.cluster import Pool, StartError, make_cluster_parser

    class DiedError(Exception):
        pass

    cluster = mock.MagicMock()
    cluster.exceptions = mock.Mock(RayTaskError=type("Task", (DiedError,), {}), RayError=DiedError)
    cluster.wait.side_effect = lambda calls, **_: (calls[:1], calls[1:])
    options = make_cluster_parser().parse_args(
        options_of(tmp_path, "--workers", "1", "--attempts", "2")
    )
    paths = [tmp_path / f"CT_{name}.npz" for name in "abc"]
    with mock.patch.dict(sys.modules, ray=cluster):
        pool = Pool(options)
        cluster.get.side_effect = [
            None,
            "a",
            DiedError("killed"),
            DiedError("full"),
            DiedError("full"),
        ]
        pool.run(paths)
        assert pool.failed == 2
        captured = capsys.readouterr()
        assert captured.out == "a\n"
        lines = captured.err.splitlines()
        assert lines[0] == "trying again: CT_b.npz: ChildProcessError: its worker died: killed"
        assert sorted(lines[1:]) == [
            f"error: CT_{name}.npz: StartError: no worker can start: full" for name in "bc"
        ]
        pool = Pool(options)
        cluster.get.side_effect = [DiedError("full"), DiedError("full")]
        with pytest.raises(StartError, match="no worker can start: full"):
            pool.run(paths)


@pytest.mark.parametrize("status", [15, 1])
def test_termination_has_the_usual_status_though_ray_gives_another(
    tmp_path: Path, monkeypatch, status: int
) -> None:
    """Its own handler exits with 15, and what ours raises while it waits becomes a 1."""
    import ray

    from inference.cluster import main

    monkeypatch.setattr(ray, "init", mock.Mock(side_effect=SystemExit(status)))
    with pytest.raises(SystemExit) as stopped:
        main(options_of(tmp_path))
    assert stopped.value.code == 143
