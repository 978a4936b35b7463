"""SAM-Med3D before the refiner: its windows, its prompts, and the whole way through predict.sh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.case import Box, Click, ObjectPrompts
from inference.geometry import Window
from inference.model.refiner import Refiner, RefinerConfig
from inference.model.sam_med3d import SamMed3D, SamMed3DConfig, build_sam_med3d
from inference.model.weights import save_weights
from inference.resampling import resample, transfer
from inference.sam_stage import SamStage
from inference.segmenter import Segmenter
from tests.phantoms import challenge_case, write_npz

SMALL = SamMed3DConfig(
    image_size=32, embed_dim=24, depth=2, num_heads=2, global_blocks=(1,), prompt_width=48,
    mask_in_chans=4,
)  # fmt: skip
CHECKOUT = Path(__file__).resolve().parents[1]


def _sam(windows: str = "1.5mm", patch_size: int = 16) -> SamMed3D:
    torch.manual_seed(0)
    config = SamMed3DConfig(**{**SMALL.__dict__, "windows": windows, "patch_size": patch_size})
    return build_sam_med3d(config).eval()


def test_public_windows_are_cubes_of_one_and_a_half_millimetres() -> None:
    stage = SamStage(_sam(), torch.device("cpu"))
    region = Window((10, 20, 30), (14, 24, 34), (64, 64, 64))
    window = stage.window(region, (3.0, 1.5, 0.75))
    assert window.shape == (32, 32, 32)
    assert window.size == (16, 32, 64)  # 48 mm
    assert [(a + b) / 2 for a, b in zip(window.start, window.stop, strict=True)] == [12, 22, 32]


def test_an_object_too_large_for_them_is_not_cut() -> None:
    stage = SamStage(_sam(), torch.device("cpu"))
    region = Window((0, 0, 0), (180, 90, 90), (64, 64, 64))  # 1.8 x an object of 100 mm
    window = stage.window(region, (1.0, 1.0, 1.0))
    assert min(window.size) >= 100
    assert window.start[0] <= 40 and window.stop[0] >= 140


def test_box_windows_are_the_region_itself() -> None:
    stage = SamStage(_sam("box"), torch.device("cpu"))
    region = Window((1, 2, 3), (50, 70, 30), (64, 64, 64))
    assert stage.window(region, (3.0, 2.0, 1.0)) == Window(region.start, region.stop, (32, 32, 32))


@pytest.mark.parametrize(("windows", "patch_size"), [("1.5mm", 16), ("box", 16), ("box", 8)])
def test_every_prompt_reaches_the_network(windows: str, patch_size: int) -> None:
    """Each kind of prompt changes the logits; asking twice does not."""
    stage = SamStage(_sam(windows, patch_size), torch.device("cpu"))
    window = Window((0, 0, 0), (32, 32, 32), (32, 32, 32))
    image = torch.rand(1, 32, 32, 32) * 255
    box = Box((8, 8, 8), (20, 22, 24), 14)
    ask = {
        "box": ObjectPrompts(1, box),
        "box and click": ObjectPrompts(1, box, (Click((4, 5, 6), True),)),
        "background": ObjectPrompts(1, box, (Click((4, 5, 6), False),)),
        "two": ObjectPrompts(1, box, (Click((4, 5, 6), False), Click((9, 15, 11), True))),
        "click alone": ObjectPrompts(1, None, (Click((4, 5, 6), True),)),
    }
    said = {name: stage.logits(image, window, prompts, None) for name, prompts in ask.items()}
    said["mask"] = stage.logits(image, window, ask["box"], (image > 128).float())
    assert all(logits.shape == (32, 32, 32) for logits in said.values())
    assert torch.equal(said["box"], stage.logits(image, window, ask["box"], None))
    # A public network never learnt boxes: beside a positive click its box says nothing.
    same = {frozenset(("box and click", "click alone"))} if windows == "1.5mm" else set()
    names = list(said)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert torch.equal(said[one], said[other]) == (frozenset((one, other)) in same)


def test_clicks_beyond_the_window_are_not_told() -> None:
    stage = SamStage(_sam(), torch.device("cpu"))
    window = Window((0, 0, 0), (32, 32, 32), (32, 32, 32))
    image = torch.rand(1, 32, 32, 32) * 255
    box = Box((8, 8, 8), (20, 22, 24), 14)
    alone = stage.logits(image, window, ObjectPrompts(1, box), None)
    for at, told in (((4, 5, 31), True), ((4, 5, 32), False), ((-1, 5, 6), False)):
        prompts = ObjectPrompts(1, box, (Click(at, False),))
        assert torch.equal(stage.logits(image, window, prompts, None), alone) != told


@pytest.mark.parametrize("known", ["box", "previous", "nothing"])
def test_a_background_click_far_away_does_not_move_the_window(
    monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    stage = SamStage(_sam(), torch.device("cpu"))
    asked: list[Window] = []
    ask = stage.logits
    monkeypatch.setattr(stage, "logits", lambda i, w, *rest: asked.append(w) or ask(i, w, *rest))
    segmenter = Segmenter(None, stage)
    segmenter.set_image(np.zeros((30, 30, 400), np.uint8), (1.5, 1.5, 1.5))
    box = Box((10, 10, 10), (20, 20, 20), 15) if known == "box" else None
    previous = np.zeros((30, 30, 400), np.uint8)
    if known == "previous":
        previous[10:20, 10:20, 10:20] = 1
    near, far = (ObjectPrompts(1, box, (Click((15, 15, x), False),)) for x in (12, 390))
    for prompts in (near, far):
        list(segmenter.segment([prompts], previous))
    assert (asked[0] == asked[1]) == (known != "nothing")


def test_logits_move_between_windows() -> None:
    source = Window((2, 4, 6), (18, 20, 22), (16, 16, 16))
    values = torch.randn(1, 16, 16, 16)
    torch.testing.assert_close(transfer(values, source, source, 0.0), values)
    target = Window((6, 8, 10), (14, 16, 18), (8, 8, 8))
    torch.testing.assert_close(transfer(values, source, target, 0.0), values[:, 4:12, 4:12, 4:12])
    finer = Window(source.start, source.stop, (32, 32, 32))
    torch.testing.assert_close(
        transfer(values, source, finer, 0.0), resample(values, (32, 32, 32)), atol=1e-5, rtol=0
    )
    outside = Window((100, 4, 6), (116, 20, 22), (16, 16, 16))
    assert (transfer(values, source, outside, -6.0) == -6).all()


def test_the_refiner_hears_the_sam_stage() -> None:
    """In place of a missing mask."""
    torch.manual_seed(0)
    refiner = Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32))
    torch.nn.init.normal_(refiner.head.weight, std=0.1)
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 40), dtype=np.uint8)
    said = []
    for stage in (None, SamStage(_sam("box"), torch.device("cpu"))):
        segmenter = Segmenter(refiner, stage)
        segmenter.set_image(image, (1.0, 1.0, 1.0))
        (result,) = segmenter.segment([ObjectPrompts(1, Box((8, 8, 8), (30, 30, 30), 18))])
        said.append(result)
    assert said[0].logits.shape != said[1].logits.shape or (said[0].logits != said[1].logits).any()


def test_no_network_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted: one or both"):
        Segmenter(None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A SAM-Med3D file, a refiner bundle, and a bundle of both."""
    folder = tmp_path_factory.mktemp("weights")
    sam, refiner = _sam(), Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32))
    sam_tensors = {f"sam.{k}": v for k, v in sam.state_dict().items()}
    tensors = {f"refiner.{k}": v for k, v in refiner.state_dict().items()}
    about_sam, about = {"sam": sam.config.to_json()}, {"refiner": refiner.config.to_json()}
    paths = {name: folder / f"{name}.safetensors" for name in ("sam", "refiner", "both")}
    save_weights(paths["sam"], dict(sam.state_dict()), about_sam)
    save_weights(paths["refiner"], tensors, about)
    save_weights(paths["both"], {**sam_tensors, **tensors}, {**about_sam, **about})
    return paths


@pytest.mark.parametrize(
    "options",
    [
        ["--weights", "refiner", "--sam", "sam"],
        ["--weights", "both"],
        ["--sam", "sam", "--refiner", "off"],
        ["--weights", "both", "--refiner", "off"],
    ],
)
def test_sam_med3d_runs_from_the_command_line(
    options: list[str], weights: dict[str, Path], tmp_path: Path
) -> None:
    case = challenge_case((24, 40, 36), 2)
    (tmp_path / "in").mkdir()
    write_npz(tmp_path / "in" / "CT_a.npz", case)
    words = [str(weights.get(word, word)) for word in options]
    folders = ["--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out")]
    command = ["sh", str(CHECKOUT / "predict.sh"), *folders, *words]
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=False, env=environment
    )
    assert run.returncode == 0 and run.stderr == "", run.stderr
    with np.load(tmp_path / "out" / "CT_a.npz") as result:
        assert result["segs"].shape == (24, 40, 36) and result["segs"].dtype == np.uint8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "refiner", "--refiner", "off"], "holds no SAM-Med3D"),
        (["--weights", "sam"], "no refiner in it"),
        (["--weights", "refiner", "--sam", "refiner"], "not SAM-Med3D weights"),
    ],
)
def test_weights_that_do_not_fit_the_options_are_refused(
    options: list[str], message: str, weights: dict[str, Path]
) -> None:
    words = dict(zip(options[::2], options[1::2], strict=True))
    with pytest.raises(ValueError, match=message):
        Segmenter.from_files(
            weights.get(words.get("--weights", "")),
            weights.get(words.get("--sam", "")),
            words.get("--refiner", "on") == "on",
            "cpu",
        )


def test_a_configuration_survives_its_file() -> None:
    config = RefinerConfig(channels=(8, 16), blocks=(1, 2), window=48, coarse=True)
    assert RefinerConfig.from_json(config.to_json(), "a file") == config
    with pytest.raises(ValueError, match="accepted: channels, blocks, window, coarse"):
        RefinerConfig.from_json(json.dumps({"depth": 3}), "a file")
