"""Predictors: in this process, by command, and as a container image."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import CHECKOUT
from tests.phantoms import challenge_case, write_npz
from tests.training.evaluation.obedient import obedient
from training.evaluation import baselines, predictors
from training.evaluation.baselines import BASELINES
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.predictors import (
    Command,
    Image,
    InProcess,
    PredictionError,
    PredictorChoice,
    build_predictor,
)
from training.evaluation.protocol import official_row, run_case

OBEDIENT = f"""
import os
import sys
sys.path.insert(0, {str(CHECKOUT)!r})
from pathlib import Path
from tests.training.evaluation.obedient import by_files
by_files(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return f"{sys.executable} {path} {{inputs}} {{outputs}}"


@pytest.fixture
def arrays():
    case = challenge_case((8, 24, 24), 2)
    del case["gts"]
    return case


@pytest.mark.parametrize("boxes", [True, False])
def test_command_scores_as_in_process_does(tmp_path, boxes):
    """The same predictor, once in this process and once as one process a round."""
    path = write_npz(tmp_path / "MR_both.npz", challenge_case((8, 24, 24), 2, "MR", boxes=boxes))
    case = load_labelled_case(path)
    inside, segs = run_case(case, InProcess(obedient))
    outside, segs_by_command = run_case(case, Command(script(tmp_path, OBEDIENT)))
    assert (segs == segs_by_command).all()
    assert inside.clicks == outside.clicks
    rows = [official_row(inside), official_row(outside)]
    for column in rows[0]:
        if "RunningTime" not in column:
            assert rows[0][column] == rows[1][column], column
    held = [r for r in outside.rounds if r is not None]
    assert all(r.seconds > 0 for r in held)
    assert all(r.peak_bytes > 10 << 20 for r in held)


def test_predict_sh_scores_as_the_segmenter_does(tmp_path, monkeypatch):
    """What ships, started once a round as in the challenge, and in this process."""
    monkeypatch.setenv("PYTHON", sys.executable)
    path = write_npz(tmp_path / "PET_ours.npz", challenge_case((16, 40, 36), 2, "PET", boxes=False))
    case = load_labelled_case(path)
    predict = shlex.quote(str(CHECKOUT / "predict.sh"))
    # Another number of threads adds up in another order, and a voxel on the fence may fall.
    same = f"--device cpu --threads {torch.get_num_threads()}"
    command = Command(f"sh {predict} --inputs {{inputs}} --outputs {{outputs}} {same}")
    inside, segs = run_case(case, build_predictor(PredictorChoice("segmenter", device="cpu")))
    outside, segs_by_command = run_case(case, command)
    assert (segs == segs_by_command).all()
    assert inside.clicks == outside.clicks
    assert inside.case_scores("dsc") == outside.case_scores("dsc")
    assert inside.case_scores("nsd") == outside.case_scores("nsd")
    assert {r.error for r in (*inside.rounds, *outside.rounds) if r is not None} == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; print('out of luck'); sys.exit(3)", "exit status 3, .*out of luck"),
        ("pass", "exit status 0, no CT_case.npz written"),
        (
            "import sys; open(sys.argv[2] + '/CT_case.npz', 'wb').write(b'PK')",
            "output CT_case.npz: .*zip",
        ),
        (
            "import sys, numpy as np\n"
            "np.savez(sys.argv[2] + '/CT_case.npz', other=np.zeros((8, 24, 24)))",
            "segs",
        ),
        (
            "import sys, numpy as np\n"
            "np.savez(sys.argv[2] + '/CT_case.npz', segs=np.zeros((8, 24, 23)))",
            r"segs of shape \(8, 24, 23\)",
        ),
        (
            "import sys, numpy as np\n"
            "np.savez(sys.argv[2] + '/CT_case.npz', segs=np.full((8, 24, 24), 300))",
            "accepted: 0 to 255",
        ),
    ],
)
def test_commands_that_fail(tmp_path, arrays, text, message):
    with pytest.raises(PredictionError, match=message) as failure:
        Command(script(tmp_path, text))(arrays, "CT_case.npz")
    assert failure.value.seconds > 0


def test_a_case_can_be_read_by_a_containers_user_whatever_the_umask(tmp_path, arrays):
    text = "import os, sys\nprint(oct(os.stat(sys.argv[1] + '/CT_case.npz').st_mode))"
    before = os.umask(0o077)
    try:
        with pytest.raises(PredictionError, match="written: 0o100644"):
            Command(script(tmp_path, text))(arrays, "CT_case.npz")
    finally:
        os.umask(before)


def test_a_result_counts_whatever_the_exit_status(tmp_path, arrays):
    """The challenge looks at the file alone."""
    text = OBEDIENT + "\nsys.exit(1)\n"
    found = Command(script(tmp_path, text))(arrays, "CT_case.npz")
    assert found.segs.max() == 2


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie, as an orphan is until init looks at it."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_that_hangs_is_stopped_with_all_it_started(tmp_path, arrays, monkeypatch):
    monkeypatch.setattr(predictors, "SECONDS_PER_CLASS", 1.5)
    pids = tmp_path / "pids"
    text = f"""
        import os, subprocess
        child = subprocess.Popen(["sleep", "60"])
        open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        child.wait()
    """
    with pytest.raises(PredictionError, match=r"stopped after \d+ s, no CT_case.npz") as failure:
        Command(script(tmp_path, text))(arrays, "CT_case.npz")
    assert 3 <= failure.value.seconds < 40, "1.5 s for each of two classes"
    deadline = time.monotonic() + 10
    while any(_runs(int(pid)) for pid in pids.read_text(encoding="utf-8").split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_container_that_hangs_is_killed_by_its_name(tmp_path, arrays, monkeypatch):
    monkeypatch.setattr(predictors, "SECONDS_PER_CLASS", 0.5)
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/$2\n[ $2 = kill ] || exec sleep 60\n'
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(PredictionError, match="stopped after"):
        Image("sammed3d:latest", gpu=False)(arrays, "CT_case.npz")
    started, killed = (
        (tmp_path / verb).read_text(encoding="utf-8").splitlines() for verb in ("run", "kill")
    )
    assert killed == ["container", "kill", started[started.index("--name") + 1]]


def test_command_without_folders():
    with pytest.raises(ValueError, match=r"accepted: one with \{inputs\} and \{outputs\}"):
        Command("predict.sh --inputs {inputs}")


@pytest.mark.parametrize("gpu", [True, False])
def test_image_is_started_as_the_challenge_starts_it(tmp_path, monkeypatch, arrays, gpu):
    """A stand-in for docker that notes its arguments and runs nothing."""
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > ' + f"{tmp_path}/arguments\nexit 125\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(PredictionError, match="exit status 125"):
        Image("sammed3d:latest", gpu=gpu)(arrays, "CT_case.npz")
    words = (tmp_path / "arguments").read_text(encoding="utf-8").splitlines()
    assert words[:2] == ["container", "run"]
    assert ("--gpus" in words) == gpu
    assert words[words.index("-m") + 1] == "32G"
    assert "--rm" in words
    mounts = [words[i + 1] for i, word in enumerate(words) if word == "-v"]
    assert [m.split(":")[1] for m in mounts] == ["/workspace/inputs/", "/workspace/outputs/"]
    assert words[-4:] == ["sammed3d:latest", "/bin/bash", "-c", "sh predict.sh"]


def test_an_exception_is_a_failed_prediction(arrays):
    def broken(case):
        raise KeyError("oops")

    with pytest.raises(PredictionError, match="KeyError: 'oops'") as failure:
        InProcess(broken)(arrays, "CT_case.npz")
    assert failure.value.seconds > 0


def test_choices_that_cannot_be_built():
    for choice, message in (
        (PredictorChoice("magic"), "accepted: segmenter, command, image, box, ellipsoid"),
        (PredictorChoice("command"), "needs --command"),
        (PredictorChoice("image"), "needs --image"),
    ):
        with pytest.raises(ValueError, match=message):
            build_predictor(choice)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("boxes", [True, False])
def test_baselines_find_contrasted_ellipsoids(tmp_path, monkeypatch, name, boxes):
    """Phantoms are bright ellipsoids in dark noise: easy for all; worse without boxes."""
    monkeypatch.setattr(baselines, "_WALKER_CELLS", 24)
    monkeypatch.setattr(baselines, "_GEODESIC_CELLS", 24)
    path = write_npz(tmp_path / "PET_easy.npz", challenge_case((20, 40, 40), 2, "PET", boxes=boxes))
    result, segs = run_case(load_labelled_case(path), build_predictor(PredictorChoice(name)))
    assert [r.error for r in result.rounds if r is not None] == [None] * (5 + boxes)
    assert set(np.unique(segs)) == {0, 1, 2}
    assert result.case_scores("dsc")[-1] > (0.55 if boxes else 0.3)


def test_shape_baselines_are_what_they_say():
    from inference.case import parse_case

    case = challenge_case((21, 33, 25), 1, padding=(0, 0))
    box = case["boxes"][0]
    parsed = parse_case(case, "CT_shape.npz")
    filled, inscribed = BASELINES["box"](parsed), BASELINES["ellipsoid"](parsed)
    expected = np.zeros_like(filled)
    expected[
        box["z_min"] : box["z_max"] + 1,
        box["z_mid_y_min"] : box["z_mid_y_max"] + 1,
        box["z_mid_x_min"] : box["z_mid_x_max"] + 1,
    ] = 1
    assert (filled == expected).all()
    assert (inscribed <= filled).all()
    share = np.count_nonzero(inscribed) / np.count_nonzero(filled)
    assert share == pytest.approx(np.pi / 6, abs=0.03)
    both = np.count_nonzero((inscribed == 1) & (case["gts"] == 1))
    assert 2 * both / (np.count_nonzero(inscribed) + np.count_nonzero(case["gts"] == 1)) > 0.9
